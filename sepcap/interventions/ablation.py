"""Ablation: hooks replace activations during the forward pass; the weights are not changed (METHODS 8)."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from sepcap.checks import checked
from sepcap.errors import unknown
from sepcap.interventions.constants import CONSTANTS, Constants, constant_hooks, given_constants
from sepcap.interventions.optimal import fit_constants
from sepcap.interventions.resample import Donors, get_draw
from sepcap.models.forward import Hook, point_at, with_hooks
from sepcap.selection.neurons import NeuronSet
from sepcap.statistics.moments import Statistics

Begin = Callable[[], tuple[list[Hook], AbstractContextManager[None]]]
"""Returns the hooks for one use of an ablation, and a context manager to enter with them."""


def _constant(neurons: NeuronSet, reference: Statistics | None, source: Any, kind: str, **_: Any) -> Begin:
    if source is not None:
        raise ValueError(f"source= is for 'resample' and 'optimal' only; kind={kind!r} takes reference=")
    return _set_to(neurons, CONSTANTS[kind](neurons, reference))


def _set_to(neurons: NeuronSet, values: Any) -> Begin:
    hooks = constant_hooks(neurons, given_constants(neurons, values))
    return lambda: (list(hooks), nullcontext())


def _resample(model: Any, neurons: NeuronSet, source: Any, seed: int, **_: Any) -> Begin:
    draw = get_draw(model, "batch" if source is None else source, seed)

    def begin() -> tuple[list[Hook], AbstractContextManager[None]]:
        donors = Donors(model, neurons, draw)
        return donors.hooks, donors.watching()

    return begin


def _optimal(model: Any, neurons: NeuronSet, source: Any, **options: Any) -> Begin:
    if source is None:
        raise ValueError("kind='optimal' needs source=: the task that the constants are fitted to")
    return _set_to(neurons, fit_constants(model, neurons, source, **options).constants)


KINDS: dict[str, Callable[..., Begin]] = {
    **{kind: partial(_constant, kind=kind) for kind in CONSTANTS},
    "resample": _resample,
    "optimal": _optimal,
}
"""Kinds of ablation by name; each is called with the arguments of `ablate`."""

WITHOUT_REFERENCE = ("zero", "resample")
"""Kinds that need no statistics."""


class Ablation:
    """Neurons of a model and the replacements of their activations; made by `ablate`.

    A context manager that returns the model and ablates it until the block exits, also on an exception. It can be entered
    repeatedly. Each entry starts from the same state: the same passes give the same results.
    """

    def __init__(self, model: Any, neurons: NeuronSet, name: str, begin: Begin) -> None:
        self.model, self.neurons, self.name = model, neurons, name
        self._begin = begin
        self._entered: list[ExitStack] = []

    @property
    def fwd_hooks(self) -> list[Hook]:
        """Plain TransformerLens hooks for `model.run_with_hooks(ids, fwd_hooks=...)`; each access starts from the same state.

        Those of "resample" receive token ids only: pad tokens at either end of a row count as padding, and a pass of one token
        as the continuation of the previous pass. The context manager uses the attention mask and the key-value cache instead.
        """
        return [(point_at(self.model, name), function) for name, function in self._begin()[0]]

    def __enter__(self) -> Any:
        hooks, watching = self._begin()
        with ExitStack() as stack:
            stack.enter_context(watching)
            stack.enter_context(with_hooks(self.model, hooks))
            self._entered.append(stack.pop_all())
        return self.model

    def __exit__(self, *raised: Any) -> None:
        self._entered.pop().__exit__(*raised)

    def __repr__(self) -> str:
        return f"Ablation({self.name}, {self.neurons!r})"


@checked()
def ablate(
    model: Any,
    neurons: NeuronSet | Iterable[Any] | None = None,
    kind: str | Constants | Tensor | float = "zero",
    *,
    layer: int | None = None,
    head: int | Iterable[int] | None = None,
    site: str | None = None,
    reference: Statistics | None = None,
    source: Any = None,
    seed: int = 0,
    **options: Any,
) -> Ablation:
    """Replace activations during forward passes; the weights are not changed.

    Args:
        model: a hooked model.
        neurons: what to ablate: a NeuronSet; or, with `layer`, numbers of mlp neurons; with `layer` and `head`, numbers within the head.
        kind: what replaces the activations. "zero"; "mean", "median" or "peak" of the `reference`; "resample": the same neuron's
            activation at the same position of another text; "optimal": a constant fitted for low loss on the task `source`; or
            constants: site -> [layer, neuron] or [layer, head, d_head], or a tensor or number that broadcasts to the one site's shape.
        layer: with `head`, `neurons` or `site`: the layer.
        head: one or several heads of that layer; all their d_head neurons, unless `neurons` selects some.
        site: with `layer`: "attn_pre_out" (default with `head`), "attn_value" (`head` is a value head), "mlp" (default with `neurons`).
            With neither `head` nor `neurons`, the whole site in that layer.
        reference: statistics from `sepcap.collect`, usually of the retain task; for "median" and "peak" with `histogram=True`.
        source: for "resample": "batch" (default: every row takes activations of another row of its batch; a batch of one row, of a row
            of the previous batch), "tokens" (random token ids), "characters" (random characters, tokenised), or a task or list of
            strings, whose collection part is used. BOS stays in place. For an image classifier: "batch", "pixels" (random pixels), or
            a task of images. For "optimal": the task to fit to.
        seed: seed of "resample", and of the sample that "optimal" is fitted to; the same seed gives bitwise equal results.
        options: for "optimal": tokens, steps, lr, batch_size, context, per_document, forward; see `fit_constants`.

    Returns:
        Ablation: use it as `with ablate(...):`, or its `.fwd_hooks` in `model.run_with_hooks`. Ablations nest, in any order. "resample"
        runs the unhooked model once more for each pass, up to the last ablated layer; see `sepcap.interventions.resample`.

    Raises:
        ValueError: an unknown kind, site or source, a missing argument of a kind, or neurons not given in one of the ways above.
        IndexError: a layer, head or neuron that the model does not have.

    Source: METHODS section 8; [PEAK]; [OA].

    Example:
        >>> with sepcap.ablate(model, neurons, "mean", reference=retain):  # doctest: +SKIP
        ...     sepcap.evaluate(model, "local-code", tokens=20_000)
        >>> hooks = sepcap.ablate(model, layer=3, head=1, kind="resample").fwd_hooks  # doctest: +SKIP
        >>> model.run_with_hooks(ids, fwd_hooks=hooks)  # doctest: +SKIP
    """
    chosen = choose(model, neurons, layer=layer, head=head, site=site)
    chosen.check(model)
    if options and not (isinstance(kind, str) and kind == "optimal"):
        raise TypeError(f"ablate() got {', '.join(map(repr, options))}, which only kind='optimal' takes")
    if not isinstance(kind, str):
        return Ablation(model, chosen, "constants", _set_to(chosen, kind))
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS, "Or a mapping from site to a tensor of constants.")
    begin = KINDS[kind](model=model, neurons=chosen, reference=reference, source=source, seed=seed, **options)
    return Ablation(model, chosen, kind, begin)


def choose(
    model: Any,
    neurons: NeuronSet | Iterable[Any] | None = None,
    *,
    layer: int | None = None,
    head: int | Iterable[int] | None = None,
    site: str | None = None,
) -> NeuronSet:
    """The neurons that the arguments of `ablate` select; see there."""
    if isinstance(neurons, NeuronSet):
        if (layer, head, site) != (None, None, None):
            raise ValueError("neurons is a NeuronSet, which is already complete: leave layer, head and site out")
        return neurons
    if layer is None or (head is None and neurons is None and site is None):
        raise ValueError(
            f"neurons={neurons!r}, layer={layer!r}: give a NeuronSet as neurons, or layer= with head=, with neurons=[...], or with site="
        )
    site = site or ("mlp" if head is None else "attn_pre_out")
    chosen = NeuronSet.empty(model, site)
    mask = chosen.masks[site]
    (place,) = _within([layer], len(mask), "layer")
    inside = slice(None) if neurons is None else _within(neurons, mask.shape[-1], "neurons")
    if mask.dim() == 2:
        if head is not None:
            raise ValueError(f"head={head!r}: site={site!r} has no heads; use 'attn_pre_out' or 'attn_value'")
        mask[place, inside] = True
        return chosen
    if head is None and neurons is not None:
        raise ValueError(f"neurons={neurons!r} of site={site!r} are numbers within a head: give head= too")
    for h in range(mask.shape[1]) if head is None else _within(head, mask.shape[1], "head"):
        mask[place, h, inside] = True
    return chosen


def _within(numbers: Any, n: int, argument: str) -> list[int]:
    given = np.asarray(list(numbers) if isinstance(numbers, Iterable) else [numbers])
    if given.ndim != 1 or not given.size or given.dtype.kind not in "iu":
        raise ValueError(f"{argument}={numbers!r}: give numbers from 0 to {n - 1}")
    if given.min() < 0 or given.max() >= n:
        raise IndexError(f"{argument}={numbers!r}: this model has {n}, numbered 0 to {n - 1}")
    return given.tolist()
