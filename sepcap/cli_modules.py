"""`sepcap modules`: do the neurons of tasks form modules? Clusters, overlaps, effects on other tasks, checks from the other side."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from sepcap.cli_options import Loading, config_in, show
from sepcap.experiments.modules_config import ModulesConfig
from sepcap.experiments.neuron_sets_config import CrossChecksConfig, CrossTaskConfig, OverlapConfig


@dataclass(frozen=True)
class Concentration(ModulesConfig, Loading):
    """Are a task's neurons concentrated in clusters of neurons that read alike (MoEfication), more than chance gives?"""

    RESUMES = True

    tasks: tuple[str, ...] = ModulesConfig.tasks
    """Whose neurons are selected: names (see `sepcap tasks`) or paths."""
    retain: str = ModulesConfig.retain
    """The task that all of them are scored against."""
    out: Path = Path("runs/modules/concentration")
    """Folder of the study; the same command goes on where an interrupted one stopped."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap

        model = self.load()
        show(sepcap.modules(model, config_in(ModulesConfig, self), out=self.out, say=print), self.out)


@dataclass(frozen=True)
class Overlaps(OverlapConfig, Loading):
    """How much do the neuron sets of tasks have in common, beside a randomly initialised model?"""

    RESUMES = True

    tasks: tuple[str, ...] = OverlapConfig.tasks
    """Whose neurons are selected: names (see `sepcap tasks`) or paths."""
    retain: str = OverlapConfig.retain
    """The task that all of them are scored against, or "others": each against all other tasks together."""
    out: Path = Path("runs/modules/overlaps")
    """Folder of the study; the same command goes on where an interrupted one stopped."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap

        model = self.load()
        show(sepcap.overlaps(model, config_in(OverlapConfig, self), out=self.out, say=print), self.out)


@dataclass(frozen=True)
class CrossTask(CrossTaskConfig, Loading):
    """Prune each task to a target accuracy: what is left of every other one?"""

    RESUMES = True

    tasks: tuple[str, ...] = CrossTaskConfig.tasks
    """Tasks that are pruned and evaluated: names (see `sepcap tasks`) or paths."""
    retain: str = CrossTaskConfig.retain
    """The task that all of them are scored against, or "others": each against all other tasks together."""
    out: Path = Path("runs/modules/cross-task")
    """Folder of the study; the same command goes on where an interrupted one stopped."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap

        model = self.load()
        show(sepcap.cross_task(model, config_in(CrossTaskConfig, self), out=self.out, say=print), self.out)


@dataclass(frozen=True)
class CrossChecks(CrossChecksConfig, Loading):
    """Keep only the selected neurons; small steps against large ones; layers from the last; where both prunings meet."""

    RESUMES = True

    forget: str = CrossChecksConfig.forget
    """One task of the pair: a name (see `sepcap tasks`) or a path."""
    retain: str = CrossChecksConfig.retain
    """The other one; every check is made from both sides."""
    out: Path = Path("runs/modules/cross-checks")
    """Folder of the study; the same command goes on where an interrupted one stopped."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap

        model = self.load()
        show(sepcap.cross_checks(model, config_in(CrossChecksConfig, self), out=self.out, say=print), self.out)


@dataclass(frozen=True)
class Modules:
    """Do the neurons of tasks form modules? One of four studies; without a name, the concentration in clusters."""

    study: (
        Annotated[Concentration, tyro.conf.subcommand("concentration")]
        | Annotated[Overlaps, tyro.conf.subcommand("overlaps")]
        | Annotated[CrossTask, tyro.conf.subcommand("cross-task")]
        | Annotated[CrossChecks, tyro.conf.subcommand("cross-checks")]
    ) = field(default_factory=Concentration)
    """Which study."""

    def run(self) -> None:
        """Carry out the command."""
        self.study.run()
