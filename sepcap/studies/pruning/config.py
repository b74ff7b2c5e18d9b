"""Configuration of a pruning run: the same object is the API, the command line and the saved JSON."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from sepcap.checks import FROM_1, check_fields, checked, wrong
from sepcap.learning.fitting import Fitting
from sepcap.selection.names import DIVERGENCES, Contrast, ImportanceName, gradients_for, resolve_contrast
from sepcap.studies.base.fields import FRACTION_KEYS, Sampled, Schedule, check_fractions, check_schedule

Direction = Literal["forward", "reverse"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "reverse")
"""Which task of a pair is forgotten: the first or the second."""


OF_A_CONTRAST = (("lam", "difference", 1.0), ("q", "guarded", 0.5))
"""Fields that belong to one contrast: name, contrast, default."""


def check_baseline_steps(steps: int, baseline_steps: int | None) -> None:
    """Raise if the steps at which baselines are evaluated are not at equal numbers of pruned neurons as steps of the run."""
    if baseline_steps is not None and steps % baseline_steps:
        raise ValueError(f"baseline_steps={baseline_steps}: give a divisor of the {steps} steps of the run")


@dataclass(frozen=True)
class PruningConfig(Sampled):
    """What to prune from which model, how far, and how to measure it ([SP] section 4; METHODS 10)."""

    model: str = "default"
    """"default", a folder, or a hub name."""
    forget: Any = "local-code"
    """Task to forget: a name or a path (in Python also a Dataset or a list of strings)."""
    retain: Any = "local-prose"
    """Task to retain."""
    fractions: dict[str, float] = field(default_factory=lambda: {"mlp": 0.02})
    """Share of each site's original neurons that is pruned at every step, or a whole number of them: 0.02 is two percent, 20 are twenty
    neurons. "heads" prunes whole heads."""
    steps: int = 50
    """Number of pruning steps."""
    schedule: tuple[dict[str, float], ...] | list[dict[str, float]] = ()
    """Shares or counts of every step, if they differ between steps ([SEP] 4.3.5): [{"mlp": 0.05}] * 10 + [{"mlp": 0.05, "heads": 1}] * 10
    first prunes mlp, then both, as does `--schedule 10:mlp=0.05 10:mlp=0.05,heads=1`. `steps` becomes their number and `fractions` the
    total; do not give these two."""
    importance: Literal[ImportanceName, "random", "learned"] = "abs"
    """Importance function; "random" for a baseline; or "learned" for one order learned by gradient descent, from that of "abs" on (METHODS
    21): it is learned once, on the unpruned model, so that it needs recollect=False."""
    learning_steps: int = Fitting.steps
    """For "learned": number of gradient steps."""
    baseline: Literal["uniform", "per_layer", "activity"] = "uniform"
    """For "random": neurons drawn uniformly over the model; as many per layer as another run pruned at the same step; or as many per layer
    and per tenth of it by activity on the retain task as that run pruned."""
    matched: str | None = None
    """Folder of the run that "per_layer" and "activity" are matched with; it must be finished."""
    rotation: Literal["none", "fold", "rotate"] = "none"
    """Prune attention in the singular basis of its value/output circuits; the value bias is folded into b_O or rotated along."""
    offset: Literal["none", "mean", "peak"] = "none"
    """Add the output of the pruned neurons at their mean or peak activation on the retain task to the output bias."""
    eps: float | None = None
    """ε of the score; default 1e-3 for mlp and 1e-4 for attention. For importances from gradients, 1e-4 of the mean on the retain task."""
    contrast: Contrast | None = None
    """How the importances on both tasks are combined: "ratio"; "difference" of their shares of the site, or of nats; or "guarded", by
    importance on forget among the neurons with the lowest on retain. Default ratio, but difference for signed importances and wanda."""
    lam: float = 1.0
    """Weight of the retain task in the difference."""
    q: float = 0.5
    """Share of a site's neurons, those with the lowest importance on retain, that a guarded score ranks first."""
    tokens: int = 100_000
    """Token positions per task and step from which statistics are collected."""
    eval_tokens: int = 100_000
    """Predictions per task and step on which the model is evaluated."""
    positions: Literal["all", "correct"] = "all"
    """Positions that statistics are collected from: all, or only those at which the unpruned model's first choice is the right
    prediction ([SEP] 4.3.3), the same ones at every step."""
    recollect: bool = True
    """Recollect statistics at every step with the current model; else reuse the statistics of step 0."""
    per_layer: bool = False
    """Prune the same share of every layer, instead of the highest scores over all layers."""
    aggregate: Literal["mean", "median"] = "mean"
    """How the scores of its neurons are combined into the score of a head."""
    seed: int = 0
    """Seed of random selections and of the order in which the documents of the collect split are read; 0 reads them in their
    original order. Evaluation uses the same tokens for every seed, so that runs are paired."""

    def __post_init__(self) -> None:
        if not (isinstance(self.schedule, list | tuple) and all(isinstance(step, dict) for step in self.schedule)):
            raise wrong("schedule", self.schedule, "a list with the fractions of every step, [{'mlp': 0.05}, {'mlp': 0.05, 'heads': 1}]")
        check_fields(self, learning_steps=FROM_1)
        if self.schedule:
            self._follow_schedule()
        else:
            check_fractions(self.fractions, self.steps, self.importance)
        if self.importance == "learned" and self.recollect:
            raise ValueError(
                "importance='learned' with recollect=True: one order of all neurons is learned on the unpruned model, and it is not "
                "learned again at every step. Give recollect=False (on the command line --no-recollect)"
            )
        attention = [site for site in self.fractions if site != "mlp"]
        if self.importance != "random":
            contrast = resolve_contrast(self.importance, self.contrast)
            for name, of, default in OF_A_CONTRAST:
                if (value := getattr(self, name)) != default and contrast != of:
                    raise ValueError(f"{name}={value} belongs to contrast={of!r}, and the contrast is {contrast!r}; leave it out")
        if self.baseline != "uniform" and self.importance != "random":
            raise ValueError(
                f"baseline={self.baseline!r} is a way of drawing random neurons, and importance={self.importance!r}; use 'random'"
            )
        if (self.baseline == "uniform") != (self.matched is None):
            raise ValueError(
                f"baseline={self.baseline!r} with matched={self.matched!r}: 'per_layer' and 'activity' need the folder of the run that "
                "they are matched with, and 'uniform' has none"
            )
        if self.rotation != "none" and not attention:
            raise ValueError(f"rotation={self.rotation!r} needs attention neurons, but fractions has none; give one of {FRACTION_KEYS[1:]}")

    def _follow_schedule(self) -> None:
        """Set `steps` and `fractions` to those of the schedule, unless others were given.

        Raises:
            ValueError: others were given, or a step cannot be pruned.
        """
        check_schedule(self.schedule, self.importance)
        own: dict[str, Any] = {"steps": len(self.schedule), "fractions": Schedule(len(self.schedule), {}, self.schedule).total}
        for f in fields(self):
            if f.name in own and (given := getattr(self, f.name)) != own[f.name]:
                if given != (f.default_factory() if f.default_factory is not MISSING else f.default):
                    raise ValueError(f"{f.name}={given!r} with a schedule, from which {f.name}={own[f.name]!r} follows; leave it out")
                object.__setattr__(self, f.name, own[f.name])

    @property
    def pace(self) -> Schedule:
        """How much every step prunes."""
        return Schedule(self.steps, self.fractions, self.schedule)

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites whose statistics are needed."""
        return tuple(dict.fromkeys("attn_pre_out" if s == "heads" else s for s in self.fractions))

    @checked()
    def histogram(self, role: str) -> bool:
        """Whether the statistics of a role need histograms."""
        return self.importance in DIVERGENCES or (self.offset == "peak" and role == "retain")

    @property
    def start(self) -> str:
        """The importance by which neurons are scored; that of the start if an order is learned."""
        return "abs" if self.importance == "learned" else self.importance

    @property
    def gradients(self) -> tuple[str, ...]:
        """Gradients that the statistics need."""
        return gradients_for(self.importance)

    @property
    def contrasted(self) -> dict[str, Any]:
        """The contrast and its number, where they are not the importance's own; only then are they part of a stored run."""
        if self.importance == "random" or (contrast := resolve_contrast(self.importance, self.contrast)) is None:
            return {}
        numbers = {name: getattr(self, name) for name, of, default in OF_A_CONTRAST if contrast == of and getattr(self, name) != default}
        return ({} if contrast == resolve_contrast(self.importance) else {"contrast": contrast}) | numbers

    @property
    def unpruned_roles(self) -> tuple[Literal["forget", "retain"], ...]:
        """Roles whose statistics of the unpruned model are stored."""
        return self.collected_roles if self.importance == "random" else ("forget", "retain")

    @property
    def collected_roles(self) -> tuple[Literal["forget", "retain"], ...]:
        """Roles whose statistics a step needs; random neurons need only those of their offset."""
        if self.importance != "random":
            return ("forget", "retain")
        return () if self.offset == "none" else ("retain",)
