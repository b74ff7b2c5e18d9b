"""Hyperparameters of a learned order, without torch, so that configurations can use their defaults (METHODS 21)."""

from dataclasses import dataclass


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
