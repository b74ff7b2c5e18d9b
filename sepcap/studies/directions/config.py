"""Configuration of the comparison of directions. The API, the command line and the saved JSON use the same object."""

from dataclasses import dataclass, field, fields
from typing import Literal

from sepcap.checks import checked
from sepcap.studies.pruning.config import Direction, PruningConfig, check_baseline_steps


@dataclass(frozen=True)
class DirectionComparisonConfig(PruningConfig):
    """A pair of tasks pruned in both directions, and random neurons to compare with ([SP] section 4; METHODS 10, 11).

    The fields of `PruningConfig` are those of the forward run; the reverse run differs only in direction.
    """

    baselines: tuple[Literal["uniform", "per_layer", "activity"], ...] = ("per_layer",)
    """Random neurons to compare both directions with: "per_layer" prunes as many per layer as each run at the same step, "activity" also
    as many per tenth of a layer by activity on the retain task, "uniform" is drawn over the whole model."""
    baseline_seeds: int = 5
    """Number of draws of each."""
    baseline_steps: int | None = None
    """Number of steps at which baselines are evaluated, a divisor of `steps`; default is from 3 to 5, or all steps if there is none."""
    baseline: Literal["uniform"] = field(default="uniform", init=False)
    """Not a field here: the kinds are `baselines`."""
    matched: None = field(default=None, init=False)
    """Not a field here: baselines are matched with the runs of the comparison."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_baseline_steps(self.steps, self.baseline_steps)

    @checked()
    def pruning(self, direction: Direction) -> PruningConfig:
        """The configuration of the run of one direction."""
        shared = {f.name: getattr(self, f.name) for f in fields(PruningConfig)}
        return PruningConfig(**shared if direction == "forward" else shared | {"forget": self.retain, "retain": self.forget})
