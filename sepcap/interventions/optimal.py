"""Optimal ablation: constants fitted for low loss on a task ([OA], METHODS 8)."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from sepcap.checks import checked
from sepcap.errors import warn
from sepcap.interventions.constants import CONSTANTS, Constants, constant_hooks
from sepcap.models.forward import Hook, call, device_of, measuring, with_hooks
from sepcap.progress import progress
from sepcap.selection.neurons import NeuronSet
from sepcap.statistics.backward import weights_frozen
from sepcap.statistics.collect import collect_sample, halving_batches
from sepcap.statistics.moments import Statistics
from sepcap.tasks.batches import Batch, TokenSample
from sepcap.tasks.documents import PerDocument
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import sample_task

Forward = Callable[[Batch, list[Hook]], Tensor]


PATIENCE = 3
"""Number of steps without a lower loss on the held-out documents after which a fit ends."""

TOLERANCE = 0.05
"""Largest share of its gain that a converged fit may have made in the last part of its path."""

LAST = 0.2
"""Last part of a fit's path, as a share of its length, the sum of the step sizes."""

ROUNDING = 1e-6
"""Relative rounding error of a loss in float32."""

HELD_OUT = 3
"""One in this many documents of a sample is held out of the fit."""


@dataclass(frozen=True, eq=False)
class Optimal:
    """Constants fitted to a dataset.

    Attributes:
        constants: site -> float64 [layer, neuron] or [layer, head, d_head]; only those of the fitted neurons are meaningful.
        loss: mean cross-entropy in nats with these constants, on the held-out documents. Optimistic, because the step was chosen on
            these documents; `evaluate` under the ablation measures it on others.
        starts: the same loss with each of the constants that the fit could start from.
        history: the same loss before the first step, and after every step.
        converged: whether the last fifth of the path, at least three steps, made at most 5% of the gain on the held-out documents,
            and the loss on the fitting documents never exceeded its value at the start. The path length is the sum of the step sizes:
            short steps gain little anywhere. A loss above that of the start means that lr is too large.
    """

    constants: Constants
    loss: float
    starts: dict[str, float]
    history: tuple[float, ...]
    converged: bool

    def __repr__(self) -> str:
        starts = ", ".join(f"{name} {loss:.4f}" for name, loss in self.starts.items())
        ended = "" if self.converged else ", not converged"
        return f"Optimal(loss={self.loss:.4f} held out, after {len(self.history) - 1} steps{ended}; {starts})"


@torch.inference_mode(False)
@checked()
def fit_constants(
    model: Any,
    neurons: NeuronSet,
    task: Any,
    *,
    held_out: Sequence[Batch] = (),
    reference: Statistics | None = None,
    tokens: int = 15_000,
    steps: int = 20,
    lr: float = 0.3,
    batch_size: int = 8,
    context: int | None = None,
    seed: int = 0,
    per_document: PerDocument = "row",
    forward: Forward | None = None,
    quiet: bool = False,
) -> Optimal:
    """Fit the constants with the lowest mean cross-entropy on a task by gradient descent (Adam on the whole sample).

    A third of the documents is held out of the fit. The fit starts from the best of zero, mean, median and peak. Its steps are in units
    of each neuron's standard deviation, shrink towards the end and stay within the range of the neuron's activations. It ends when the
    loss on the held-out documents has not fallen for three steps, and returns the constants with the lowest held-out loss. On these
    documents they are never worse than the four starts, and the loss is slightly lower than on documents that did not select the step.
    The weights are not changed.

    Args:
        model: a hooked model. Other ablations and hooks around the call count as part of it.
        neurons: the neurons to set to constants.
        task: the fitting data: a task (its collection part is used), a TokenSample, or a list of Batch.
        held_out: batches of other documents, if the fitting data are batches.
        reference: statistics with histograms, whose mean, median and peak are possible starts; default: those of the fitting data.
        tokens: size of the sample, if `task` is a task.
        steps: maximum number of updates; each costs a forward and a backward pass over the fitting documents, and a forward pass over
            the held-out ones.
        lr: size of the first step, in standard deviations of the neuron.
        batch_size: rows per pass; halved when memory runs out. It changes the result by rounding only.
        context: tokens per row; default is the model's context, at most 512.
        seed: sets the order of the documents and the positions of excerpts of long ones, if `task` is a task; 0 keeps the original order.
        per_document: maximum number of tokens of one document, if `task` is a task: "row" (as many as fit in one row), a number, or None
            for whole documents.
        forward: function (batch, fwd_hooks) -> logits [batch, pos, vocab] that replaces a full pass, if earlier layers are known.
        quiet: no progress bar.

    Returns:
        Optimal: `.constants`, which `ablate` takes as a kind, `.loss`, `.starts`, `.history`, `.converged`. A warning is given if the
        fit has not converged.

    Raises:
        ValueError: no neurons, no targets, fewer than two documents, or statistics without histograms.

    Source: [OA]; METHODS section 8.

    Example:
        >>> fitted = fit_constants(model, neurons, "local-prose")  # doctest: +SKIP
        >>> with sepcap.ablate(model, neurons, fitted.constants): ...  # doctest: +SKIP
    """
    neurons.check(model)
    if not neurons:
        raise ValueError("neurons is empty: there is no constant to fit")
    if isinstance(task, Sequence) and task and isinstance(task[0], Batch):
        if reference is None or not held_out:
            raise ValueError(
                "reference= and held_out= are needed if the fitting data are batches: statistics from sepcap.collect(..., "
                "histogram=True), and batches of other documents"
            )
        fit, held = ([batch.to(device_of(model)) for batch in part] for part in (task, held_out))
        return _warned(_Fit(model, neurons, fit, held, reference, forward, quiet).run(steps, lr), quiet)
    if not isinstance(task, TokenSample):
        task = sample_task(model, load_task(task), "collect", tokens, context, seed, per_document)
    samples = apart(task)
    reference = reference or collect_sample(model, task, tuple(neurons.masks), batch_size=batch_size, histogram=True, quiet=quiet)

    def one_fit(size: int) -> Optimal:
        fit, held = ([batch.to(device_of(model)) for batch in sample.batches(size)] for sample in samples)
        return _Fit(model, neurons, fit, held, reference, forward, quiet).run(steps, lr)

    return _warned(halving_batches(one_fit, batch_size), quiet)


def apart(sample: TokenSample, one_in: int = HELD_OUT) -> tuple[TokenSample, TokenSample]:
    """The rows to fit on, and those held out: every third document, or one in as many as given.

    Raises:
        ValueError: fewer than two documents.
    """
    held = sample.clusters % one_in == 1
    if not held.any():
        raise ValueError(
            f"task {sample.task!r}: all {sample.tokens:,} tokens to fit to are of one document, or of one row of short ones; "
            "some documents are held out of the fit, so give more tokens"
        )
    return sample.take(np.flatnonzero(~held).tolist()), sample.take(np.flatnonzero(held).tolist())


def _warned(fitted: Optimal, quiet: bool) -> Optimal:
    if not (fitted.converged or quiet):
        warn(f"the optimal constants have not converged in {len(fitted.history) - 1} steps: give more steps=, or another lr=")
    return fitted


@dataclass
class _Fit:
    """One fit: the loss of constants on fixed batches, and its minimisation."""

    model: Any
    neurons: NeuronSet
    batches: list[Batch]
    held_out: list[Batch]
    reference: Statistics
    forward: Forward | None
    quiet: bool

    def _whole_pass(self, batch: Batch, hooks: list[Hook]) -> Float[Tensor, "batch ... out"]:
        with with_hooks(self.model, hooks):
            return call(self.model, batch.inputs, batch.mask)

    def _losses(self, batches: list[Batch], constants: Callable[[], Constants]) -> Iterator[Float[Tensor, ""]]:
        """Each batch's share of the mean cross-entropy."""
        targets = sum(int(batch.asked.sum()) for batch in batches)
        if targets == 0:
            raise ValueError("the fitting data have no targets: no row has two tokens that count")
        for batch in batches:
            logits = (self.forward or self._whole_pass)(batch, constant_hooks(self.neurons, constants()))
            logits = logits if logits.dim() == 3 else logits[:, None]
            yield cross_entropy(logits[batch.asked].float(), batch.answers[batch.asked], reduction="sum") / targets

    @torch.no_grad()
    def loss_of(self, constants: Constants) -> float:
        """Mean cross-entropy on the held-out documents."""
        total = sum(float(loss) for loss in self._losses(self.held_out, lambda: constants))
        return math.inf if math.isnan(total) else total  # NaN compares false with everything and would win

    def run(self, steps: int, lr: float) -> Optimal:
        with weights_frozen(self.model), measuring(self.model):
            candidates = {kind: constants_of(self.neurons, self.reference) for kind, constants_of in CONSTANTS.items()}
            starts = {kind: self.loss_of(constants) for kind, constants in candidates.items()}
            return self._descend(candidates[min(starts, key=lambda name: starts[name])], starts, steps, lr)

    def _descend(self, start: Constants, starts: dict[str, float], steps: int, lr: float) -> Optimal:
        best, history = start, [min(starts.values())]
        # a neuron that is constant on the reference has no scale
        scale = {site: torch.where(self.reference[site].std > 0, self.reference[site].std, 1.0).double().cpu() for site in start}
        origin = {site: value.double().cpu().clone() for site, value in start.items()}
        moved = {site: torch.zeros_like(value, requires_grad=True) for site, value in origin.items()}
        ends = {
            site: [(end.double().cpu() - origin[site]) / scale[site] for end in (self.reference[site].min, self.reference[site].max)]
            for site in origin
        }

        def constants() -> Constants:
            return {site: origin[site] + scale[site] * moved[site] for site in origin}

        optimizer = torch.optim.Adam(moved.values(), lr=lr)
        lowest, fit_losses = 0, []
        for step in progress(range(steps), desc="optimal constants", unit="step", quiet=self.quiet):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            optimizer.zero_grad()
            fit_losses.append(0.0)
            for share in self._losses(self.batches, constants):
                share.backward()
                fit_losses[-1] += float(share.detach())
            optimizer.step()
            with torch.no_grad():  # a start outside its neuron's range, such as 0, may remain there
                for site, (low, high) in ends.items():
                    moved[site].clamp_(low.clamp(max=0), high.clamp(min=0))
            now = {site: value.detach().clone() for site, value in constants().items()}
            history.append(self.loss_of(now))
            if history[-1] < history[lowest]:
                lowest, best = step + 1, now
            elif step + 1 - lowest >= PATIENCE:
                break
        return Optimal(best, history[lowest], starts, tuple(history), _has_converged(history, fit_losses, steps))


def _has_converged(history: Sequence[float], fit_losses: Sequence[float], steps: int) -> bool:
    """Whether a fit has converged, see `Optimal.converged`.

    Args:
        history: loss on the held-out documents before the first step, and after every step.
        fit_losses: loss on the fitting documents before every step.
        steps: maximum number of steps; the size of step i, from 0, is proportional to 1 - i / steps.
    """
    done = len(history) - 1
    if done < PATIENCE or not np.max(fit_losses) <= fit_losses[0] * (1 + ROUNDING):
        return False
    way = np.cumsum(1 - np.arange(done) / steps)
    before = min(int(np.searchsorted(way, (1 - LAST) * way[-1], side="right")), done - PATIENCE)
    return min(history[: before + 1]) - min(history) <= TOLERANCE * (history[0] - min(history))
