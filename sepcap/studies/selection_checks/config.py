"""Configuration of the checks of a selection (METHODS 5, 11). The API, the command line and the saved JSON use the same object."""

from dataclasses import dataclass
from typing import Any, Literal

from sepcap.checks import check_fields, distinct
from sepcap.selection.names import OfOneTask
from sepcap.studies.base.fields import Sampled, check_shares


@dataclass(frozen=True)
class SelectionChecksConfig(Sampled):
    """Complementary checks of a selection, for a pair of tasks ([SP], [SEP]; METHODS 5, 11)."""

    forget: Any = "local-code"
    """One task of the pair: a name or a path (in Python anything that `load_task` takes)."""
    retain: Any = "local-prose"
    """The other task; every check is run in both directions."""
    checks: tuple[Literal["keep-only", "step-size", "layers", "meeting"], ...] = (
        "keep-only", "step-size", "layers", "meeting",
    )  # fmt: skip
    """Checks to run."""
    model: str = "default"
    """"default", a folder, or a hub name."""
    site: Literal["mlp", "attn_pre_out", "attn_value"] = "mlp"
    """Site whose neurons are selected."""
    fractions: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Shares of the site: kept in "keep-only", deleted in "meeting"."""
    pruned: float = 0.2
    """Share of the site that is pruned at the end of every run of "step-size"."""
    steps: tuple[int, ...] = (1, 2, 5, 10)
    """Numbers of equal steps in which that share is pruned, in increasing order."""
    layer_fraction: float = 0.2
    """Share of every layer that is deleted in "layers"."""
    metric: Literal["top1", "top10", "skip50_top1", "skip50_top10"] = "top1"
    """Accuracy that is reported."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the random neurons, the control of every check."""
    importance: OfOneTask = "abs"
    """Importance function."""
    tokens: int = 20_000
    """Token positions per task from which statistics are collected."""
    eval_tokens: int = 15_000
    """Predictions per task on which every edited model is evaluated."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("checks", "fractions", "steps", "seeds"):
            distinct(name, getattr(self, name))
        if list(self.fractions) != sorted(self.fractions):
            raise ValueError(f"fractions={self.fractions}: give them in increasing order")
        if list(self.steps) != sorted(self.steps):
            raise ValueError(f"steps={self.steps}: give them in increasing order")
        check_shares(self, (self.site,), (*self.fractions, self.pruned, self.layer_fraction))
