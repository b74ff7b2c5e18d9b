"""Configuration of neuron profiles (METHODS 23). The API, the command line and the saved JSON use the same object."""

from dataclasses import dataclass
from typing import Any, Literal

from sepcap.checks import Bounds, check_fields
from sepcap.selection.names import OfOneTask
from sepcap.studies.base.fields import Sampled, check_fractions, check_tasks


@dataclass(frozen=True)
class NeuronProfilesConfig(Sampled):
    """Contexts, tokens, logits and histograms of some neurons, or heads, on two tasks (METHODS 23)."""

    model: str = "default"
    """"default", a folder, or a hub name."""
    tasks: tuple[Any, ...] = ("local-code", "local-prose")
    """Two tasks, the one to forget first: names or paths (in Python anything that `load_task` takes)."""
    site: Literal["mlp", "attn_pre_out", "attn_value"] = "mlp"
    """Site of the neurons, if they are given as places or chosen by importance."""
    whole_heads: bool = False
    """Profile whole heads, each as one unit, instead of neurons."""
    n: int = 50
    """Number of neurons, or heads, if they are chosen by a score or an effect."""
    importance: OfOneTask = "abs"
    """The score by which neurons are chosen if none are given, from the same tokens."""
    k: int = 10
    """Number of strongest contexts per task, at most one per row of tokens."""
    samples: int = 2
    """Number of samples per group of quantiles of the activation."""
    window: int = 40
    """Tokens of a context that are shown."""
    listed: int = 10
    """Number of preferred tokens per task, and of promoted and of suppressed tokens."""
    min_count: int = 5
    """A token is preferred only if it occurs at least so often in the sample of the task."""
    tokens: int = 50_000
    """Token positions per task that are read."""
    seed: int = 0
    """Seed of the samples."""

    def __post_init__(self) -> None:
        check_fields(self, window=Bounds(4, 400), listed=Bounds(1, 100), min_count=Bounds(1), k=Bounds(1, 1_000), seed=Bounds(0))
        check_tasks(self.tasks, "neurons are examined on both")
        if len(self.tasks) != 2:
            raise ValueError(f"tasks={self.tasks!r}: give two tasks, the one to forget first")
        check_fractions({self.site: 1.0}, 1, self.importance)
        if self.whole_heads and self.site == "mlp":
            raise ValueError("whole_heads=True: site='mlp' has no heads; use site='attn_pre_out'")
