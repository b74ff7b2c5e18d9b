"""Configuration of the comparison of methods: the same object is the API and the command line."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from sepcap.checks import check_fields, checked, distinct
from sepcap.errors import unknown
from sepcap.selection.names import GRADIENTS
from sepcap.studies.base.fields import Sampled
from sepcap.studies.pruning.config import Direction, PruningConfig, check_baseline_steps

Sites = Literal["mlp", "attention", "heads", "both"]
"""What a method prunes."""


class Method(NamedTuple):
    """One row of the comparison.

    Attributes:
        label: name in figures, within its site.
        site: what it prunes, a field of `MethodComparisonConfig`.
        changes: fields of the `PruningConfig` that define it.
    """

    label: str
    site: Sites
    changes: dict[str, Any]


PUBLISHED: dict[str, Method] = {
    "mlp": Method("abs", "mlp", {}),
    "mlp-offset-mean": Method("abs, mean offset", "mlp", {"offset": "mean"}),
    "mlp-offset-peak": Method("abs, peak offset", "mlp", {"offset": "peak"}),
    "attention-abs": Method("abs", "attention", {}),
    "attention-sqrt": Method("sqrt", "attention", {"importance": "sqrt"}),
    "attention-std": Method("std", "attention", {"importance": "std"}),
    "attention-svd": Method("abs, SVD basis", "attention", {"rotation": "fold"}),
    "attention-offset-mean": Method("abs, mean offset", "attention", {"offset": "mean"}),
    "attention-offset-peak": Method("abs, peak offset", "attention", {"offset": "peak"}),
    "heads-mean": Method("abs, mean of the head", "heads", {}),
    "heads-median": Method("abs, median of the head", "heads", {"aggregate": "median"}),
    "both": Method("abs", "both", {}),
}
"""The methods of [SEP] section 3.1 by name, which are compared by default."""

BY_GRADIENTS: dict[str, Method] = {
    f"{site}-{name}": Method(name, site, {"importance": name}) for site in get_args(Sites) for name in (*GRADIENTS, "wanda")
}
"""Methods that select by importances from gradients or output weights, each with its own contrast (METHODS 18)."""

METHODS = PUBLISHED | BY_GRADIENTS
"""All methods by name. Each is compared with random neurons with the same offset and in the same basis."""

PLAIN = {"mlp": "mlp", "attention": "attention-abs", "heads": "heads-mean", "both": "both"}
"""The method of each site that the site's other methods are compared with."""


def shared_with_random(method: str) -> str:
    """What a method shares with its random neurons, in words: its offset, its basis, or nothing."""
    return {"offset": " with the same offset", "rotation": " in the same basis"}.get(next(iter(METHODS[method].changes), ""), "")


@dataclass(frozen=True)
class MethodComparisonConfig(Sampled):
    """Methods to compare, the model and tasks, and the budget ([SEP] section 3.1)."""

    model: str = "default"
    """"default", a folder, or a hub name."""
    forget: Any = "local-code"
    """One task of the pair; both directions are pruned."""
    retain: Any = "local-prose"
    """The other task."""
    methods: tuple[str, ...] = ()
    """Names of methods, for example mlp attention-svd; default the 12 of [SEP] as far as the model allows. By gradients: mlp, attention,
    heads or both, and an importance, such as mlp-taylor or heads-atp."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the documents from which statistics are collected."""
    baseline: Literal["uniform", "per_layer", "activity"] = "per_layer"
    """Random neurons to compare every method and direction with: as many per layer as each run pruned, as many per layer and
    tenth of it by activity on the retain task, or uniform over the model."""
    baseline_seeds: int = 3
    """Number of draws; they are matched with the runs of the seeds in turn."""
    baseline_steps: int | None = None
    """Number of steps at which they are evaluated, a divisor of `steps`; default is from 3 to 5, or all steps if there is none."""
    steps: int = 10
    """Pruning steps of every run."""
    mlp: dict[str, float] = field(default_factory=lambda: {"mlp": 0.05})
    """Shares pruned at every step by the methods that prune the mlp."""
    attention: dict[str, float] = field(default_factory=lambda: {"attn_pre_out": 0.1})
    """The same for attention neurons."""
    heads: dict[str, float] = field(default_factory=lambda: {"heads": 0.1})
    """The same for whole heads."""
    both: dict[str, float] = field(default_factory=lambda: {"mlp": 0.05, "attn_pre_out": 0.02})
    """The same for mlp and attention at once."""
    tokens: int = 13_000
    """Token positions per task and step from which statistics are collected."""
    eval_tokens: int = 15_000
    """Predictions per task and step on which the model is evaluated."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in self.methods:
            if name not in METHODS:
                raise unknown("methods", name, METHODS)
        distinct("seeds", self.seeds)
        check_baseline_steps(self.steps, self.baseline_steps)
        for name in METHODS:
            self.pruning(name, "forward", self.seeds[0])  # raises an error for wrong shares

    @checked()
    def pruning(self, method: str, direction: Direction, seed: int) -> PruningConfig:
        """The configuration of one run."""
        forward = direction == "forward"
        shared = ("model", "steps", "tokens", "eval_tokens", "batch_size", "context", "per_document")
        common = {name: getattr(self, name) for name in shared}
        return PruningConfig(
            forget=self.forget if forward else self.retain,
            retain=self.retain if forward else self.forget,
            fractions=getattr(self, METHODS[method].site),
            seed=seed,
            **common,
            **METHODS[method].changes,
        )
