"""`sepcap modules`: do the neurons of tasks form modules? Clusters, overlaps, effects on other tasks, checks of the selection."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from sepcap.cli.options import Loading, config_in, show
from sepcap.studies.clusters.config import ModularityConfig
from sepcap.studies.cross_task.config import CrossTaskConfig
from sepcap.studies.overlaps.config import OverlapConfig
from sepcap.studies.selection_checks.config import SelectionChecksConfig


@dataclass(frozen=True)
class Concentration(ModularityConfig, Loading):
    """Are a task's neurons concentrated in clusters of neurons with similar input weights (MoEfication), more than by chance?"""

    RESUMES = True

    tasks: tuple[str, ...] = ModularityConfig.tasks
    """Tasks whose neurons are selected: names (see `sepcap tasks`) or paths."""
    retain: str = ModularityConfig.retain
    """The task against which all of them are scored."""
    out: Path = Path("runs/modules/concentration")
    """Folder of the study; repeat the command to resume after an interruption."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap

        model = self.load()
        show(sepcap.measure_modularity(model, config_in(ModularityConfig, self), out=self.out, say=print), self.out)


@dataclass(frozen=True)
class Overlaps(OverlapConfig, Loading):
    """How much do the neuron sets of tasks overlap, compared with a randomly initialised model?"""

    RESUMES = True

    tasks: tuple[str, ...] = OverlapConfig.tasks
    """Tasks whose neurons are selected: names (see `sepcap tasks`) or paths."""
    retain: str = OverlapConfig.retain
    """The task against which all of them are scored, or "others": each against all other tasks together."""
    out: Path = Path("runs/modules/overlaps")
    """Folder of the study; repeat the command to resume after an interruption."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap

        model = self.load()
        show(sepcap.measure_overlap(model, config_in(OverlapConfig, self), out=self.out, say=print), self.out)


@dataclass(frozen=True)
class CrossTask(CrossTaskConfig, Loading):
    """Prune each task to a target accuracy: how much accuracy is left on every other task?"""

    RESUMES = True

    tasks: tuple[str, ...] = CrossTaskConfig.tasks
    """Tasks that are pruned and evaluated: names (see `sepcap tasks`) or paths."""
    retain: str = CrossTaskConfig.retain
    """The task against which all of them are scored, or "others": each against all other tasks together."""
    out: Path = Path("runs/modules/cross-task")
    """Folder of the study; repeat the command to resume after an interruption."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap

        model = self.load()
        show(sepcap.prune_across_tasks(model, config_in(CrossTaskConfig, self), out=self.out, say=print), self.out)


@dataclass(frozen=True)
class CrossChecks(SelectionChecksConfig, Loading):
    """Keep only the selected neurons; compare small and large steps; prune layers from the last; find where both prunings meet."""

    RESUMES = True

    forget: str = SelectionChecksConfig.forget
    """One task of the pair: a name (see `sepcap tasks`) or a path."""
    retain: str = SelectionChecksConfig.retain
    """The other task; every check is made in both directions."""
    out: Path = Path("runs/modules/cross-checks")
    """Folder of the study; repeat the command to resume after an interruption."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap

        model = self.load()
        show(sepcap.check_selection(model, config_in(SelectionChecksConfig, self), out=self.out, say=print), self.out)


@dataclass(frozen=True)
class Modules:
    """Do the neurons of tasks form modules? One of four studies; without a name, the concentration in clusters."""

    study: (
        Annotated[Concentration, tyro.conf.subcommand("concentration")]
        | Annotated[Overlaps, tyro.conf.subcommand("overlap")]
        | Annotated[CrossTask, tyro.conf.subcommand("cross-task")]
        | Annotated[CrossChecks, tyro.conf.subcommand("selection")]
    ) = field(default_factory=Concentration)
    """Which study."""

    def run(self) -> None:
        """Carry out the command."""
        self.study.run()
