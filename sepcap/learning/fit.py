"""Learning an order of neurons by gradient descent through masks of random shares of it (METHODS 21)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sepcap.interventions.optimal import apart
from sepcap.learning.finetune import drawn
from sepcap.learning.fitting import Fitting
from sepcap.learning.held_out import ROLES, Rows, area_of, masked_rows
from sepcap.learning.lasting import Relearned
from sepcap.learning.order import Ranked, Theta, masking_hooks, straight_through
from sepcap.models.forward import call, device_of, measuring, with_hooks
from sepcap.models.kinds import architecture_of
from sepcap.progress import progress
from sepcap.statistics.backward import check_differentiable, summed_loss, weights_frozen
from sepcap.statistics.collect import halving_batches
from sepcap.tasks.batches import TokenSample

PIECE = "learning"
"""Name of the checkpoint."""

HELD_OUT = 6
"""One in this many documents of the collection texts is held out, to choose between the orders."""

CHECKPOINT = 10
"""Steps between checkpoints."""

LAST_SHARES = 10
"""Number of equal steps in which an order is evaluated on the held-out texts."""

UNIGRAM_ROWS = 64
"""Rows, or images, read at once to count targets."""

HISTORY = ("share", "retain", "forget")


@runtime_checkable
class Store(Protocol):
    """A store of checkpoints, such as `sepcap.studies.base.folder.Pieces`."""

    def get(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """Tensors and note of a checkpoint, or None."""
        ...

    def put(self, name: str, tensors: Mapping[str, Tensor], note: Any = None) -> None:
        """Write a checkpoint in place of the one before, completely or not at all."""


@dataclass(frozen=True, eq=False)
class Learned:
    """A learned order, with the history of its fit.

    Attributes:
        theta: key -> a number for every neuron, or head; the highest are masked first.
        step: number of gradient steps after which this order was reached; 0 for the start.
        held_out: step -> area on the held-out collection texts, of the start and of the orders that were compared with it.
        history: per step the share that was masked, of all neurons or heads, and both mean losses in nats, as in `HISTORY`.
        cap: loss on forget above which it is not raised further, in nats.
        forward_tokens, backward_tokens: tokens that passes over the model processed for learning, padding included.
        check_tokens: the same for evaluations on the held-out texts.
    """

    theta: dict[str, Tensor]
    step: int
    held_out: dict[int, float]
    history: Float[Tensor, "step 3"]
    cap: float
    forward_tokens: int
    backward_tokens: int
    check_tokens: int


def unigram_loss(sample: TokenSample) -> float:
    """Cross-entropy in nats of a model that predicts every target of a sample by its relative frequency.

    Raises:
        ValueError: fewer than two distinct targets.
    """
    # not `sample.targets()`, which has no labels of images
    _, counts = torch.cat([batch.answers[batch.asked] for batch in sample.batches(UNIGRAM_ROWS)]).unique(return_counts=True)
    if len(counts) < 2:
        raise ValueError(
            f"task {sample.task!r} has {len(counts)} distinct target{'s' * (len(counts) != 1)} in the collection texts: a guess is always "
            "right, and there is nothing to forget"
        )
    shares = counts.double() / counts.sum()
    return float(-(shares * shares.log()).sum())


def planned_tokens(collected: int, how: Fitting) -> int:
    """Maximum number of tokens that learning from so many runs through the model, forward and backward, to within a row per step."""
    held = collected / HELD_OUT
    checks = 1 + math.ceil(how.steps / how.check_every)
    simulated = 2 * how.simulated * how.step_tokens * (how.steps + checks * LAST_SHARES)
    return int(4 * how.steps * how.step_tokens + held * (checks * LAST_SHARES + 1)) + simulated


@dataclass
class _State:
    """State of a fit; a checkpoint stores all of it."""

    theta: dict[str, Tensor]
    best: dict[str, Tensor]
    step: int = 0
    best_step: int = 0
    held_out: dict[int, float] = field(default_factory=dict)
    history: list[list[float]] = field(default_factory=list)
    forward_tokens: int = 0
    backward_tokens: int = 0
    check_tokens: int = 0
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    COUNTED = ("step", "best_step", "forward_tokens", "backward_tokens", "check_tokens")


def learn_order(
    model: Any,
    ranked: Sequence[Ranked],
    samples: Mapping[str, TokenSample],
    start: Theta,
    *,
    how: Fitting,
    largest: Mapping[str, float],
    constants: Mapping[str, Tensor] | None = None,
    store: Store | None = None,
) -> Learned:
    """Learn one order of the neurons of each site that separates two tasks; on held-out texts it is never worse than its start.

    In every step a share of the order is masked, and θ is updated to reduce L_retain − min(L_forget, cap). With the objective "lasting",
    L_forget is that of the masked model after simulated fine-tuning on forget, here and on the held-out texts. The order with the largest
    area on the held-out collection texts is kept, which can be the start.

    Args:
        model: a hooked model.
        ranked: the neurons or heads to rank.
        samples: role -> collection texts; one document in `HELD_OUT` is held out.
        start: key -> θ before the first step.
        how: steps and their size.
        largest: key -> share of it at the end of a trajectory; the shares of several keys grow together.
        constants: site -> what masked neurons are set to; None for 0.
        store: keeps checkpoints, from which the same call resumes with equal bits.

    Raises:
        ValueError: a model without gradients, an empty sample, or texts of too few documents to hold some out.
        NotImplementedError: a site that no gradient reaches.
        FloatingPointError: a loss that is NaN or infinite.
    """
    check_differentiable(model)
    parts = {role: apart(samples[role], HELD_OUT) for role in ROLES}
    fit, held = ({role: pair[which] for role, pair in parts.items()} for which in (0, 1))

    def one_fit(size: int) -> Learned:
        return _Fit(model, ranked, fit, held, how, largest, constants, store, size).run(start)

    with torch.inference_mode(False):
        return halving_batches(one_fit, how.batch_size)


@dataclass
class _Fit:
    model: Any
    ranked: Sequence[Ranked]
    fit: Mapping[str, TokenSample]
    held: Mapping[str, TokenSample]
    how: Fitting
    largest: Mapping[str, float]
    constants: Mapping[str, Tensor] | None
    store: Store | None
    batch_size: int

    def run(self, start: Theta) -> Learned:
        self.cap = self.how.cap * unigram_loss(self.fit["forget"])
        self.relearned = Relearned(self.model, self.ranked, self.fit["forget"], self.how, self.constants, self.batch_size)
        self.whole: Rows | None = None
        state = self._resumed() or _State({key: value.clone() for key, value in start.items()}, dict(start))
        if not state.held_out:
            self._compare(state)
            self._keep(state)
        parameters = {key: value.requires_grad_(True) for key, value in state.theta.items()}
        adam = torch.optim.Adam(parameters.values(), lr=self.how.lr, foreach=False)
        for key, moments in state.moments.items():
            adam.state[parameters[key]] = moments
        steps = self.how.steps
        with progress(total=steps, initial=state.step, desc="learn the order", unit="step") as bar:
            while state.step < steps:
                with weights_frozen(self.model), measuring(self.model):
                    self._descend(state, adam)
                state.step += 1
                bar.update()
                last = state.step == steps
                if last or state.step % self.how.check_every == 0:
                    self._compare(state)
                if last or state.step % CHECKPOINT == 0:
                    state.moments = {key: dict(adam.state[value]) for key, value in parameters.items()}
                    self._keep(state)
        found = {key: value.detach() for key, value in state.best.items()}
        counts = (state.forward_tokens, state.backward_tokens, state.check_tokens)
        return Learned(found, state.best_step, state.held_out, torch.tensor(state.history, dtype=torch.float64), self.cap, *counts)

    def _descend(self, state: _State, adam: torch.optim.Optimizer) -> None:
        """One step: both losses with the top of a random share masked, and their gradient."""
        depth = float(np.random.default_rng([self.how.seed, state.step]).random())
        masks, masked = {}, 0
        for one in self.ranked:
            k = min(max(1, one.count(depth * min(self.how.deepest, self.largest[one.key]))), max(1, one.size - 1))
            masks[one.key] = straight_through(state.theta[one.key], k, self.how.tau)
            masked += k
        share = masked / sum(one.size for one in self.ranked)
        leaves = {key: mask.detach().requires_grad_(True) for key, mask in masks.items()}
        retain, slopes = self._loss("retain", state, leaves, math.inf)
        # first order: the weights after fine-tuning count as constants, whatever the masks
        with self.relearned.at(masks, state.step) as tokens:
            forget, others = self._loss("forget", state, leaves, self.cap)
        state.forward_tokens += tokens
        state.backward_tokens += tokens
        state.history.append([share, retain, forget])
        if not np.isfinite([retain, forget]).all():
            raise FloatingPointError(
                f"learning: the loss of step {state.step + 1} is NaN or infinite. Usual cause: overflow in float16; load the model with "
                "dtype='float32' or 'bfloat16'."
            )
        adam.zero_grad()
        for key, mask in masks.items():
            # the loss on forget counts up to the cap only: above it, its gradient is 0
            mask.backward(slopes[key] - others[key] if forget < self.cap else slopes[key])
        adam.step()

    def _loss(self, role: str, state: _State, masks: Mapping[str, Tensor], cap: float) -> tuple[float, dict[str, Tensor]]:
        """Mean loss of a step's rows in nats, and its derivatives by the masks; those of a loss above the cap are not needed."""
        batches = list(self._drawn(role, state.step))
        targets = sum(int(batch.asked.sum()) for batch in batches)
        slopes = {key: torch.zeros_like(mask) for key, mask in masks.items()}
        total = 0.0
        for batch in batches:
            with with_hooks(self.model, masking_hooks(self.ranked, masks, self.constants)):
                loss = summed_loss(call(self.model, batch.inputs, batch.mask), batch) / targets
            state.forward_tokens += batch.real.numel()
            total += float(loss.detach())
            if total < cap:
                found = torch.autograd.grad(loss, list(masks.values()), allow_unused=True)
                state.backward_tokens += batch.real.numel()
                for key, slope in zip(masks, found, strict=True):
                    if slope is None:
                        raise NotImplementedError(
                            f"learning: no gradient of the loss reaches the neurons of {key!r} in {architecture_of(self.model)}: the loss "
                            "does not depend on them by a differentiable path"
                        )
                    slopes[key] += slope
        return total, slopes

    def _drawn(self, role: str, step: int) -> Iterator[Any]:
        """The rows of a step: all rows in random order, and again in another order, so that every row is used equally often."""
        sample = self.fit[role]
        n = len(sample.rows)
        each = min(n, max(1, round(self.how.step_tokens * n / sample.tokens)))
        rows = drawn(n, each, step, (self.how.seed, ROLES.index(role)))
        return (batch.to(device_of(self.model)) for batch in sample.take(rows).batches(self.batch_size))

    def _compare(self, state: _State) -> None:
        """Measure the order on the held-out texts, and keep it if it is the best so far."""
        shares = [{key: most * i / LAST_SHARES for key, most in self.largest.items()} for i in range(1, LAST_SHARES + 1)]
        how: dict[str, Any] = {"constants": self.constants, "batch_size": self.batch_size, "unpruned": self.whole}
        theta = {key: value.detach().clone() for key, value in state.theta.items()}
        relearned = partial(self._relearned, state) if self.how.simulated else None
        rows = masked_rows(self.model, self.ranked, theta, self.held, shares, relearned=relearned, **how)
        # the whole model is evaluated once, and again only after an interruption
        state.check_tokens += sum(sample.tokens for sample in self.held.values()) * (len(shares) + (not state.held_out))
        self.whole = rows
        found = area_of(rows)
        if not state.held_out or found > state.held_out[state.best_step]:
            state.best, state.best_step = theta, state.step
        state.held_out[state.step] = found

    @contextmanager
    def _relearned(self, state: _State, masks: Theta) -> Iterator[None]:
        # the same texts for every order that is compared
        with self.relearned.at(masks, self.how.steps) as tokens:
            state.check_tokens += 2 * tokens
            yield

    def _keep(self, state: _State) -> None:
        if self.store is None:
            return
        tensors = {f"theta/{key}": value.detach() for key, value in state.theta.items()}
        tensors |= {f"best/{key}": value.detach() for key, value in state.best.items()}
        tensors |= {f"adam/{key}/{name}": value for key, values in state.moments.items() for name, value in values.items()}
        tensors["history"] = torch.tensor(state.history, dtype=torch.float64).view(-1, len(HISTORY))
        note = {name: getattr(state, name) for name in _State.COUNTED}
        # as a list: the keys of JSON are strings
        self.store.put(PIECE, tensors, {**note, "held_out": [*state.held_out.items()]})

    def _resumed(self) -> _State | None:
        stored = None if self.store is None else self.store.get(PIECE)
        if stored is None:
            return None
        tensors, note = stored
        parts: dict[str, dict[str, Tensor]] = {"theta": {}, "best": {}}
        moments: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            kind, _, key = name.partition("/")
            if kind == "adam":
                key, _, moment = key.partition("/")
                moments.setdefault(key, {})[moment] = value
            elif kind in parts:
                parts[kind][key] = value
        theta = {one.key: parts["theta"][one.key] for one in self.ranked}
        counts = {name: note[name] for name in _State.COUNTED}
        held_out = {int(step): float(found) for step, found in note["held_out"]}
        return _State(theta, parts["best"], held_out=held_out, history=tensors["history"].tolist(), moments=moments, **counts)
