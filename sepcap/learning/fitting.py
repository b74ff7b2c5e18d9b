"""Hyperparameters of a learned order and of fine-tuning, without torch, so that configurations can use their defaults (METHODS 21, 22)."""

from dataclasses import dataclass
from typing import Literal

Optimiser = Literal["adamw", "sgd"]
"""AdamW without weight decay, or plain gradient descent."""

Objective = Literal["plain", "lasting"]
"""The loss on forget of the masked model, or of the masked model after simulated fine-tuning on forget."""


@dataclass(frozen=True)
class Fitting:
    """Hyperparameters of a learned order; the defaults are those of METHODS 21."""

    steps: int = 60
    step_tokens: int = 2_048
    lr: float = 0.03
    tau: float = 0.3
    cap: float = 1.4
    deepest: float = 0.8
    check_every: int = 30
    batch_size: int = 16
    seed: int = 0
    objective: Objective = "plain"
    lasting_steps: int = 4
    lasting_lr: float = 3e-4

    @property
    def simulated(self) -> int:
        """Number of simulated steps of fine-tuning before the loss on forget is taken."""
        return self.lasting_steps if self.objective == "lasting" else 0


@dataclass(frozen=True)
class Tuning:
    """How a model is fine-tuned; the defaults are those of METHODS 22."""

    lr: float = 3e-4
    step_tokens: int = 2_048
    batch_size: int = 16
    seed: int = 0
    optimiser: Optimiser = "adamw"
