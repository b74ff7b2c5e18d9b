"""`sepcap modules`: do the neurons of tasks form modules? Clusters, overlaps, effects on other tasks, checks of the selection."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from sepcap.cli.options import Group, Study, study_command
from sepcap.studies.clusters.config import ModularityConfig
from sepcap.studies.cross_task.config import CrossTaskConfig
from sepcap.studies.overlaps.config import OverlapConfig
from sepcap.studies.selection_checks.config import SelectionChecksConfig


@study_command("measure_modularity", out="runs/modules/concentration")
class Concentration(ModularityConfig, Study):
    """Are a task's neurons concentrated in clusters of neurons with similar input weights (MoEfication), more than by chance?"""


@study_command("measure_overlap", out="runs/modules/overlap")
class Overlap(OverlapConfig, Study):
    """How much do the neuron sets of tasks overlap, compared with a randomly initialised model?"""


@study_command("prune_across_tasks", out="runs/modules/cross-task")
class CrossTask(CrossTaskConfig, Study):
    """Prune each task to a target accuracy: how much accuracy is left on every other task?"""


@study_command("check_selection", out="runs/modules/selection")
class Selection(SelectionChecksConfig, Study):
    """Keep only the selected neurons; compare small and large steps; prune layers from the last; find where both prunings meet."""


@dataclass(frozen=True)
class Modules(Group):
    """Do the neurons of tasks form modules? One of four studies; without a name, the concentration in clusters."""

    study: (
        Annotated[Concentration, tyro.conf.subcommand("concentration")]
        | Annotated[Overlap, tyro.conf.subcommand("overlap")]
        | Annotated[CrossTask, tyro.conf.subcommand("cross-task")]
        | Annotated[Selection, tyro.conf.subcommand("selection")]
    ) = field(default_factory=Concentration)
    """Which study."""
