"""Optimal ablation: the constants that cost a task the least ([OA], METHODS 8)."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from sepcap.checks import checked
from sepcap.interventions.constants import CONSTANTS, Constants, constant_hooks
from sepcap.models.forward import Hook, call, device_of, measuring, with_hooks
from sepcap.progress import progress
from sepcap.selection.neurons import NeuronSet
from sepcap.statistics.collect import collect_sample, halving_batches
from sepcap.statistics.moments import Statistics
from sepcap.tasks.batches import Batch, TokenSample
from sepcap.tasks.samples import sample_task
from sepcap.tasks.task import load_task

Forward = Callable[[Batch, list[Hook]], Tensor]


@dataclass(frozen=True, eq=False)
class Optimal:
    """Constants fitted to a dataset.

    Attributes:
        constants: site -> float64 [layer, neuron] or [layer, head, d_head]; only those of the fitted neurons mean anything.
        loss: mean cross-entropy in nats over the fitting data with these constants.
        starts: the same with each of the constants that the fit could start from.
        history: the same before every step, and after the last.
    """

    constants: Constants
    loss: float
    starts: dict[str, float]
    history: tuple[float, ...]

    def __repr__(self) -> str:
        starts = ", ".join(f"{name} {loss:.4f}" for name, loss in self.starts.items())
        return f"Optimal(loss={self.loss:.4f} after {len(self.history) - 1} steps; {starts})"


@torch.inference_mode(False)
@checked()
def optimal_constants(
    model: Any,
    neurons: NeuronSet,
    task: Any,
    *,
    reference: Statistics | None = None,
    tokens: int = 5_000,
    steps: int = 20,
    lr: float = 0.3,
    batch_size: int = 8,
    context: int | None = None,
    forward: Forward | None = None,
    quiet: bool = False,
) -> Optimal:
    """The constants for which the mean cross-entropy on a task is lowest, by gradient descent (Adam on the whole sample).

    The fit starts from the best of zero, mean, median and peak, takes steps in units of each neuron's standard deviation,
    smaller ones towards the end, and gives back the best constants that it met: never worse, on the fitting data, than
    those four. The weights are not touched. Many constants fitted to few tokens fit these tokens only: judge them on others.

    Args:
        model: a hooked model. Other ablations and hooks around the call count as part of it.
        neurons: what is set to constants.
        task: the fitting data: a task (its part for collecting is used), a TokenSample, or a list of Batch.
        reference: statistics with histograms, of the task whose mean, median and peak the fit may start from; default: of the fitting data.
        tokens: size of the sample, where `task` is a task.
        steps: number of updates; each costs a forward and a backward pass over the sample.
        lr: size of the first step, in standard deviations of the neuron.
        batch_size: rows per pass; halved when memory runs out. It changes the result by rounding only.
        context: tokens per row; default is the model's context, at most 512.
        forward: function (batch, fwd_hooks) -> logits [batch, pos, vocab] in place of a whole pass, where earlier layers are known.
        quiet: no progress bar.

    Returns:
        Optimal: `.constants`, which `ablate` takes as a kind, `.loss`, `.starts`, `.history`.

    Raises:
        ValueError: no neurons, no targets, or statistics without histograms.

    Source: [OA]; METHODS section 8.

    Example:
        >>> fitted = optimal_constants(model, neurons, "local-prose")  # doctest: +SKIP
        >>> with sepcap.ablate(model, neurons, fitted.constants): ...  # doctest: +SKIP
    """
    neurons.check(model)
    if not neurons:
        raise ValueError("neurons is empty: there is no constant to fit")
    if steps < 0:
        raise ValueError(f"steps={steps}: give 0 or more")
    if isinstance(task, Sequence) and task and isinstance(task[0], Batch):
        fixed = [batch.to(device_of(model)) for batch in task]
        if reference is None:
            raise ValueError("reference= is needed where the fitting data are batches: statistics from sepcap.collect(..., histogram=True)")
        return _Fit(model, neurons, fixed, reference, forward, quiet).run(steps, lr)
    if not isinstance(task, TokenSample):
        task = sample_task(model, load_task(task), "collect", tokens, context)
    sample: TokenSample = task
    reference = reference or collect_sample(model, sample, tuple(neurons.masks), batch_size=batch_size, histogram=True, quiet=quiet)

    def one_fit(size: int) -> Optimal:
        batches = [batch.to(device_of(model)) for batch in sample.batches(size)]
        return _Fit(model, neurons, batches, reference, forward, quiet).run(steps, lr)

    return halving_batches(one_fit, batch_size)


class _Fit:
    """One fit: loss of constants on fixed batches, and its descent."""

    def __init__(
        self, model: Any, neurons: NeuronSet, batches: list[Batch], reference: Statistics, forward: Forward | None, quiet: bool
    ) -> None:
        self.model, self.neurons, self.batches, self.reference, self.quiet = model, neurons, batches, reference, quiet
        self.forward = forward or self._whole_pass
        self.targets = sum(int(batch.asked.sum()) for batch in batches)
        if self.targets == 0:
            raise ValueError("the fitting data have no targets: no row has two tokens that count")

    def _whole_pass(self, batch: Batch, hooks: list[Hook]) -> Float[Tensor, "batch ... out"]:
        with with_hooks(self.model, hooks):
            return call(self.model, batch.inputs, batch.mask)

    def _losses(self, constants: Callable[[], Constants]) -> Iterator[Float[Tensor, ""]]:
        """Each batch's share of the mean cross-entropy."""
        for batch in self.batches:
            logits = self.forward(batch, constant_hooks(self.neurons, constants()))
            logits = logits if logits.dim() == 3 else logits[:, None]
            yield cross_entropy(logits[batch.asked].float(), batch.answers[batch.asked], reduction="sum") / self.targets

    @torch.no_grad()
    def loss_of(self, constants: Constants) -> float:
        return _sum(float(loss) for loss in self._losses(lambda: constants))

    def run(self, steps: int, lr: float) -> Optimal:
        with _weights_frozen(self.model), measuring(self.model):
            candidates = {kind: constants_of(self.neurons, self.reference) for kind, constants_of in CONSTANTS.items()}
            starts = {kind: self.loss_of(constants) for kind, constants in candidates.items()}
            kind = min(starts, key=lambda name: starts[name])
            return self._descend(candidates[kind], starts, starts[kind], steps, lr)

    def _descend(self, start: Constants, starts: dict[str, float], loss: float, steps: int, lr: float) -> Optimal:
        best, history = start, []
        # a neuron that never varied on the reference has no scale of its own
        scale = {site: torch.where(self.reference[site].std > 0, self.reference[site].std, 1.0).double().cpu() for site in start}
        origin = {site: value.double().cpu().clone() for site, value in start.items()}
        moved = {site: torch.zeros_like(value, requires_grad=True) for site, value in origin.items()}

        def constants() -> Constants:
            return {site: origin[site] + scale[site] * moved[site] for site in origin}

        optimizer = torch.optim.Adam(moved.values(), lr=lr)
        bar = progress(range(steps + 1), desc="optimal constants", unit="step", quiet=self.quiet)
        for step in bar:
            optimizer.param_groups[0]["lr"] = lr * (1 - step / max(steps, 1))
            optimizer.zero_grad()
            history.append(_sum(_with_gradient(share, step < steps) for share in self._losses(constants)))
            if history[-1] < loss:
                loss, best = history[-1], {site: value.detach() for site, value in constants().items()}
            if step < steps:
                optimizer.step()
        return Optimal(best, loss, starts, tuple(history))


def _with_gradient(share: Float[Tensor, ""], wanted: bool) -> float:
    if wanted:
        share.backward()
    return float(share.detach())


def _sum(shares: Iterator[float]) -> float:
    total = sum(shares)
    return math.inf if math.isnan(total) else total  # NaN compares false with everything and would win


@contextmanager
def _weights_frozen(model: Any) -> Iterator[None]:
    """Gradients on, but none for the weights."""
    wanted = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in wanted:
            weight.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for weight in wanted:
            weight.requires_grad_(True)
