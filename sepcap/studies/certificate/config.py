"""Configuration of the removal certificate (METHODS 22). The API, the command line and the saved JSON use the same object."""

from dataclasses import dataclass
from typing import Any, Literal

from sepcap.checks import BETWEEN_0_AND_1, FROM_0, FROM_1, FROM_2, POSITIVE, Bounds, check_fields, distinct
from sepcap.learning.fitting import Tuning
from sepcap.selection.names import OfOneTask
from sepcap.studies.base.fields import Sampled

Part = Literal["relearn", "quantise", "elicit", "inside"]

Variant = Literal["all", "held", "lora", "retain"]


@dataclass(frozen=True)
class CertificateConfig(Sampled):
    """Whether a capability is gone from a pruned model, compared with controls (METHODS 22)."""

    model: str = "default"
    """"default", a folder, or a hub name; with `run_folder`, "default" is the model of the run."""
    run_folder: Any = None
    """Folder of a pruning run (in Python also a Run) whose pruned model is tested, in place of `neurons`."""
    step: int | None = None
    """Step of the run; default is its last one."""
    forget: Any = None
    """Task that was to be forgotten: a name or a path (in Python also a Dataset or a list of strings); default is that of the run, or
    local-code."""
    retain: Any = None
    """Task that was to be retained; default is that of the run, or local-prose."""
    parts: tuple[Part, ...] = ("relearn", "quantise", "elicit", "inside")
    """Tests to carry out: fine-tuning on the forget task, rounding the weights, examples in the context and re-formatted texts, and what
    the residual stream still contains."""
    metric: Literal["top1", "top10", "skip50_top1", "skip50_top10"] = "top1"
    """Accuracy that is reported."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of random neurons and of the order of the texts in fine-tuning."""
    tokens: int = 60_000
    """Token positions per task of the collection texts, on which models are fine-tuned; one in six documents is held out and decides on
    the learning rate and on the number of random neurons that do equal damage."""
    eval_tokens: int = 15_000
    """Predictions per task on which everything is evaluated; no text of them is trained on."""
    variants: tuple[Variant, ...] = ("all", "held", "lora", "retain")
    """How the pruned model is fine-tuned: all weights on forget; the same with pruned neurons held at 0; LoRA adapters on forget; all
    weights on retain only. Controls are fine-tuned with all weights on forget."""
    checkpoints: tuple[int, ...] = (2_000, 5_000, 10_000, 20_000, 40_000, 80_000)
    """Numbers of tokens of fine-tuning after which the model is evaluated; the last one ends it."""
    lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    """Learning rates; for every model and variant, the best on held-out collection texts with the first seed is kept."""
    step_tokens: int = Tuning.step_tokens
    """Tokens per step of fine-tuning."""
    lora_rank: int = 8
    """Rank of LoRA adapters."""
    targets: tuple[float, ...] = (0.8, 0.9, 0.95)
    """Shares of the original forget accuracy: after how many tokens are they reached?"""
    importance: OfOneTask = "abs"
    """Importance by which neurons that relearned the task are counted in every layer."""
    bits: tuple[int, ...] = (8, 4)
    """Numbers of bits that weights of linear layers are rounded to."""
    group_size: int = 64
    """Number of weights of one output that share a scale when rounded."""
    quantiser: Literal["auto", "reference", "torchao"] = "auto"
    """What rounds: the reference of this package, torchao, or torchao if it is installed."""
    shots: tuple[int, ...] = (1, 4, 16)
    """Numbers of examples in front of a text; those that do not fit the context, or that are more than there are collection texts, are
    left out."""
    example_tokens: int = 15
    """Tokens of an example."""
    probe_tokens: int = 3_000
    """Positions per task for the probes: as many to fit as to test."""
    probe_classes: int = 20
    """Number of the most frequent forget targets that the next-token probe tells apart."""

    def __post_init__(self) -> None:
        several = {"checkpoints": FROM_1, "lrs": POSITIVE, "targets": BETWEEN_0_AND_1, "bits": Bounds(2, 8), "shots": FROM_1}
        single = {"step_tokens": FROM_1, "lora_rank": FROM_1, "group_size": FROM_1, "example_tokens": FROM_1, "probe_classes": FROM_2}
        check_fields(self, step=FROM_0, probe_tokens=Bounds(100), **several, **single)
        for name in ("parts", "seeds", "variants", "checkpoints", "lrs", "targets", "bits", "shots"):
            distinct(name, getattr(self, name))
        if "relearn" in self.parts and "all" not in self.variants:
            raise ValueError(f"variants={self.variants}: 'all' must be among them, which controls are compared with")
        if list(self.checkpoints) != sorted(self.checkpoints):
            raise ValueError(f"checkpoints={self.checkpoints}: give increasing numbers of tokens")
        if self.step is not None and self.run_folder is None:
            raise ValueError(f"step={self.step}: a step is one of a run; give run_folder= too")
