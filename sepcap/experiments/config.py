"""Configuration of a pruning run: the same object is the API, the command line and the saved JSON."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from sepcap.checks import check_fields
from sepcap.errors import unknown

FRACTION_KEYS = ("mlp", "attn_pre_out", "attn_value", "heads")
DIVERGENCES = ("kl", "js", "wasserstein")


@dataclass(frozen=True)
class PruningConfig:
    """What is pruned from which model, how far, and on what it is measured ([SP] section 4; METHODS 10)."""

    model: str = "default"
    """"default", a folder, or a hub name."""
    forget: Any = "local-code"
    """Task whose capability is to go: a name or a path (in Python also a Dataset or a list of strings)."""
    retain: Any = "local-prose"
    """Task whose capability is to stay."""
    fractions: dict[str, float] = field(default_factory=lambda: {"mlp": 0.02})
    """Share of each site's original neurons that is pruned at every step, or a whole number of them: 0.02 is two percent, 20 are twenty
    neurons. "heads" takes whole heads."""
    steps: int = 50
    """Number of pruning steps."""
    importance: Literal["abs", "sqrt", "rms", "std", "freq", "mean_shift", "kl", "js", "wasserstein", "random"] = "abs"
    """Importance function, or "random" for a baseline."""
    baseline: Literal["uniform", "per_layer", "activity"] = "uniform"
    """Of "random": neurons drawn uniformly over the model; as many of every layer as another run took at the same step; or as many of every
    layer and of every tenth of it by activity on the retain task as that run took."""
    matched: str | None = None
    """Folder of the run that "per_layer" and "activity" are matched with; it must be finished."""
    rotation: Literal["none", "fold", "rotate"] = "none"
    """Prune attention in the singular basis of its value/output circuits; the value bias is folded into b_O or rotated along."""
    offset: Literal["none", "mean", "peak"] = "none"
    """What the removed neurons add at their mean or peak activation on the retain task goes into the output bias."""
    eps: float | None = None
    """ε of the score; default 1e-3 for mlp and 1e-4 for attention."""
    tokens: int = 100_000
    """Token positions per task and step from which statistics are collected."""
    eval_tokens: int = 100_000
    """Predictions per task and step on which the model is evaluated."""
    recollect: bool = True
    """Collect again at every step with the model as it is then; else reuse the statistics of step 0."""
    per_layer: bool = False
    """The same share in every layer, instead of the highest scores over all layers."""
    aggregate: Literal["mean", "median"] = "mean"
    """How the score of a head is made of the scores of its neurons."""
    seed: int = 0
    """Seed of random selections and of the order in which the documents of the collect split are read; 0 reads them as they
    come. Evaluation takes the same tokens whatever the seed, so that runs are paired."""
    batch_size: int = 16
    """Rows per forward pass."""
    context: int | None = None
    """Tokens per row; default is the model's context, at most 512."""
    per_document: int | Literal["row"] | None = "row"
    """Most tokens of one document: "row" for what fits one row, a number, or None for whole documents as they come."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.fractions:
            raise ValueError(f"fractions={self.fractions!r}: give at least one site, {{'mlp': 0.02}}")
        for site, fraction in self.fractions.items():
            if site not in FRACTION_KEYS:
                raise unknown("site", site, FRACTION_KEYS)
            if isinstance(fraction, int):  # a count: whether there are so many depends on the model
                if fraction < 1:
                    raise ValueError(f"fractions[{site!r}]={fraction}: a whole number is a count; give at least 1")
                continue
            if not 0 < fraction <= 1:
                raise ValueError(
                    f"fractions[{site!r}]={fraction!r}: a fraction lies in (0, 1], 0.02 for two percent; a whole number is a count"
                )
            if self.steps * fraction > 1 + 1e-9:
                most = math.floor(1 / fraction + 1e-9)
                raise ValueError(
                    f"fractions[{site!r}]={fraction} in {self.steps} steps takes {self.steps * fraction:.0%} of the neurons, "
                    f"more than there are. At most {most} step{'s' * (most != 1)} of {fraction}, "
                    f"or a fraction of {math.floor(1e9 / self.steps) / 1e9:.9g}."
                )
        if "heads" in self.fractions and "attn_pre_out" in self.fractions:
            raise ValueError("fractions: 'heads' are made of 'attn_pre_out' neurons; prune one or the other")
        attention = [site for site in self.fractions if site != "mlp"]
        if self.importance == "freq" and attention:
            raise ValueError(
                f"importance='freq' is undefined for {attention[0]!r}: attention has no activation function, so a positive activation "
                "means nothing ([SP] appendix B). Use 'abs', 'sqrt', 'rms' or 'std'."
            )
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
            raise ValueError(f"rotation={self.rotation!r} turns attention neurons, and fractions has none; give one of {FRACTION_KEYS[1:]}")

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites whose statistics are needed."""
        return tuple(dict.fromkeys("attn_pre_out" if s == "heads" else s for s in self.fractions))

    def histogram(self, role: str) -> bool:
        """Whether the statistics of a role need histograms."""
        return self.importance in DIVERGENCES or (self.offset == "peak" and role == "retain")

    @property
    def unpruned_roles(self) -> tuple[Literal["forget", "retain"], ...]:
        """Whose statistics of the unpruned model are kept."""
        return self.collected_roles if self.importance == "random" else ("forget", "retain")

    @property
    def collected_roles(self) -> tuple[Literal["forget", "retain"], ...]:
        """Whose statistics a step needs: random neurons need those of their offset alone."""
        if self.importance != "random":
            return ("forget", "retain")
        return () if self.offset == "none" else ("retain",)
