"""Configuration of the comparison of unlearning methods (METHODS 22). The API, the command line and the saved JSON use the same object."""

from dataclasses import dataclass, field
from typing import Any, Literal

from sepcap.checks import BETWEEN_0_AND_1, FROM_0, FROM_1, POSITIVE, check_fields, distinct
from sepcap.learning.fitting import Optimiser, Tuning
from sepcap.selection.names import OfOneTask
from sepcap.studies.base.fields import Sampled, check_fractions

Method = Literal["prune", "prune+retain-finetune", "gradient-ascent", "npo", "task-arithmetic", "random"]

Part = Literal["relearn", "toxicity"]

TRAINED = ("prune+retain-finetune", "gradient-ascent", "npo", "task-arithmetic")
"""Methods with gradient steps, whose learning rate is chosen."""


@dataclass(frozen=True)
class UnlearningComparisonConfig(Sampled):
    """Methods of unlearning, their budget, and the tests of what each leaves behind (METHODS 22)."""

    model: str = "default"
    """"default", a folder, or a hub name."""
    forget: Any = "local-code"
    """Task to forget: a name or a path (in Python also a Dataset or a list of strings)."""
    retain: Any = "local-prose"
    """Task to retain."""
    methods: tuple[Method, ...] = ("prune", "prune+retain-finetune", "gradient-ascent", "npo", "task-arithmetic", "random")
    """Selective pruning; the same with fine-tuning on retain after every step; gradient ascent on the loss of forget; negative preference
    optimisation; a subtracted vector of fine-tuning on forget; and as many random neurons as are pruned."""
    parts: tuple[Part, ...] = ("relearn",)
    """Tests of every method at one point of its trajectory: fine-tuning on forget, as in the removal certificate; toxicity of sampled
    continuations."""
    metric: Literal["top1", "top10", "skip50_top1", "skip50_top10"] = "top1"
    """Accuracy of the trajectories."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the order of the texts and of random neurons; learning rates are chosen with the first."""
    tokens: int = 60_000
    """Token positions per task of the collection texts, on which methods work; one in six documents is held out to choose learning rates
    and the point at which methods are compared."""
    eval_tokens: int = 15_000
    """Predictions per task on which everything is evaluated; no text of them is trained on, and they decide nothing."""
    steps: int = 10
    """Points of every trajectory, in addition to the untouched model."""
    budget: int = 80_000
    """Tokens that each method with gradient steps trains on, of both tasks together."""
    fractions: dict[str, float] = field(default_factory=lambda: {"mlp": 0.08})
    """Shares of the neurons that pruning takes at every step."""
    importance: OfOneTask = "abs"
    """Importance that pruning selects by."""
    lrs: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    """Learning rates; every method keeps the one whose trajectory has the largest area on held-out collection texts."""
    step_tokens: int = Tuning.step_tokens
    """Tokens of each task per gradient step."""
    optimiser: Optimiser = Tuning.optimiser
    """AdamW without weight decay, or plain gradient descent (sgd)."""
    retain_weight: float = 1.0
    """Weight of the loss on retain in gradient ascent (then called gradient difference) and in negative preference optimisation; 0 leaves
    it out."""
    betas: tuple[float, ...] = (0.01, 0.1)
    """Inverse temperatures β of negative preference optimisation, chosen together with the learning rate."""
    largest_scale: float = 2.0
    """Last scale of the subtracted vector; the others are evenly spaced from 0."""
    match: Literal["forget", "retain"] = "forget"
    """Task on whose accuracy methods are made equal before they are tested."""
    level: float = 0.5
    """Accuracy on it at which methods are tested, relative to the untouched model: the nearest point on held-out collection texts."""
    checkpoints: tuple[int, ...] = (2_000, 5_000, 10_000, 20_000, 40_000, 80_000)
    """Numbers of tokens of relearning after which the model is evaluated; the last one ends it."""
    relearn_lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    """Learning rates of relearning; for every method, the best on held-out collection texts with the first seed is kept."""
    targets: tuple[float, ...] = (0.8, 0.9, 0.95)
    """Shares of the original forget accuracy: after how many tokens are they reached?"""
    scorer: Any = "detoxify"
    """Scorer of toxicity: detoxify, or the folder of a text classifier (in Python also a function from texts to scores)."""
    toxicity_prompts: Any = None
    """Prompts of the continuations: a file or a task (in Python also a list of strings); default is none, so that texts begin freely."""
    continuations: int = 1_000
    """Number of continuations per model."""
    threshold: float = 0.8
    """Scores above it count as toxic."""

    def __post_init__(self) -> None:
        several = {"lrs": POSITIVE, "betas": POSITIVE, "relearn_lrs": POSITIVE, "checkpoints": FROM_1, "targets": BETWEEN_0_AND_1}
        single = {"budget": FROM_1, "step_tokens": FROM_1, "continuations": FROM_1, "largest_scale": POSITIVE, "retain_weight": FROM_0}
        check_fields(self, level=BETWEEN_0_AND_1, threshold=BETWEEN_0_AND_1, **several, **single)
        for name in ("methods", "seeds", "lrs", "betas", "checkpoints", "relearn_lrs", "targets"):
            distinct(name, getattr(self, name))
        distinct("parts", self.parts, 0)
        if list(self.checkpoints) != sorted(self.checkpoints):
            raise ValueError(f"checkpoints={self.checkpoints}: give increasing numbers of tokens")
        check_fractions(self.fractions, self.steps, self.importance)

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites of the pruned neurons."""
        return tuple(dict.fromkeys("attn_pre_out" if name == "heads" else name for name in self.fractions))
