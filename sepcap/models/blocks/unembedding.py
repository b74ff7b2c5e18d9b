"""The unembedding as one matrix, so that logits can be computed for a part of the vocabulary at a time (METHODS 9)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from sepcap.models.attention import hooked
from sepcap.models.forward import Stop, logits_of
from sepcap.models.kinds import inner, kind_of

ROUNDING = 4
"""Units of rounding, times the lengths of both vectors, by which a logit may differ from their product."""

COMPARED = 8
"""Positions at which logits are compared with the product."""

CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names under which configurations have a cap of the logits."""

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Names under which configurations have a factor of the logits."""

_SEEN: WeakKeyDictionary[nn.Linear, tuple[torch.dtype, list[ref[nn.Module]]]] = WeakKeyDictionary()
"""Unembeddings whose products were seen to be the logits of their models: in which precision, and the modules around them."""


@dataclass(frozen=True, eq=False)
class Unembedding:
    """The last linear map of a model: logits = h·Wᵀ + b, with nothing after it.

    Attributes:
        linear: the module, in which W is [vocab, d_model].
        model: the hooked model.
    """

    linear: nn.Linear
    model: Any = None

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return len(self.linear.weight)

    def logits(
        self, hidden: Float[Tensor, "place d_model"], tokens: slice, out: Float[Tensor, "place part"] | None = None
    ) -> Float[Tensor, "place part"]:
        """Logits of some consecutive tokens, in the precision of the model."""
        weight, bias = self.linear.weight[tokens], self.linear.bias
        if bias is None:
            return torch.mm(hidden, weight.T, out=out)
        return torch.addmm(bias[tokens], hidden, weight.T, out=out)

    @property
    def seen(self) -> bool:
        """Whether the products were compared with the logits of the model, and are the same."""
        return self.linear in _SEEN and _SEEN[self.linear][0] == self.linear.weight.dtype

    def compare(self, read: Sequence[Float[Tensor, "*batch d_model"]], logits: Float[Tensor, "..."]) -> None:
        """Compare logits of a whole pass with the products of what was read in it, at a few positions spread over the batch."""
        if len(read) != 1:
            return
        weight, hidden = self.linear.weight, read[0]
        if (hidden.shape[:-1], self.vocabulary, weight.dtype) != (logits.shape[:-1], logits.shape[-1], logits.dtype):
            return
        hidden, logits = hidden.flatten(0, -2).to(weight.device), logits.flatten(0, -2)
        some = torch.linspace(0, len(hidden) - 1, min(COMPARED, len(hidden)), device=hidden.device).long()
        hidden, logits = hidden[some], logits[some.to(logits.device)].to(hidden.device)
        lengths = [torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (hidden, weight)]
        product = self.logits(hidden, slice(None))
        rounding = ROUNDING * torch.finfo(lengths[0].dtype).eps * torch.outer(*lengths)
        if logits.dtype.itemsize == 2:  # sums are in float32, and rounded once: the lengths are much larger than the logits
            rounding += 2 * torch.finfo(logits.dtype).eps * product.abs()
        # a comparison with NaN is false: logits that are no numbers are evaluated as they come
        if bool(((product - logits).abs() <= rounding).all()):
            _SEEN[self.linear] = (logits.dtype, [ref(module) for module in self._around()])

    def _around(self) -> list[nn.Module]:
        """The modules that the unembedding is inside."""
        within = inner(self.model)
        names = [name for name, module in within.named_modules() if module is self.linear or module is self.model.unembed]
        paths = [name.split(".")[:i] for name in names for i in range(1, len(name.split(".")))]
        return [within.get_submodule(".".join(path)) for path in paths]


def unembedding_of(model: Any) -> Unembedding | None:
    """The unembedding of a language model, if its logits may be the product with one matrix.

    They are not if something changes the logits afterwards (a cap, a scale, hooks), or if another module, such as an adapter, is in
    place of the linear map. What cannot be read off the modules is found by `Unembedding.compare`.
    """
    bridge = getattr(model, "unembed", None)
    linear = getattr(bridge, "original_component", None)
    if bridge is None or type(linear) is not nn.Linear or linear.weight.is_meta or kind_of(model) == "images" or _capped(model):
        return None
    modules = (bridge, linear, inner(model), model)
    if hooked(bridge.hook_out) or any(module._forward_hooks or module._forward_pre_hooks for module in modules[:2]):
        return None
    around = [found for known in _SEEN.get(linear, (None, []))[1] if (found := known()) is not None]
    around = [module for module in (*modules[2:], *around) if module not in modules[:2]]
    return None if any(module._forward_hooks for module in around) else Unembedding(linear, model)


def _capped(model: Any) -> bool:
    """Whether the configuration names a cap or a factor of the logits: the effect of either can be within the rounding."""
    config = inner(model).config
    parts = (config, config.get_text_config())
    capped = any(getattr(part, name, None) for part in parts for name in CAPS)
    return capped or any(getattr(part, name, None) not in (None, 1) for part in parts for name in SCALES)


@contextmanager
def watching(unembedding: Unembedding | None, stop: bool = False) -> Iterator[list[Tensor]]:
    """Keep what the unembedding reads in the passes inside; `stop` raises `Stop` instead of computing logits."""
    found: list[Tensor] = []
    if unembedding is None:
        yield found
        return

    def keep(linear: Any, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])
        if stop:
            raise Stop

    handle = unembedding.linear.register_forward_pre_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


@torch.inference_mode()
def read_or_logits(
    model: Any, inputs: Shaped[Tensor, "batch ..."], mask: Bool[Tensor, "batch pos"] | None = None
) -> tuple[Unembedding | None, Float[Tensor, "batch pos _"]]:
    """The unembedding and what it reads in one pass, which ends there; or None and the logits, if they are not its product.

    A pass of a model whose logits have not been compared with the product is whole.
    """
    unembedding = unembedding_of(model)
    if unembedding is None:
        return None, logits_of(model, inputs, mask)
    logits = torch.empty(0, 0, 0)
    with watching(unembedding, stop=unembedding.seen) as read, suppress(Stop):
        logits = logits_of(model, inputs, mask)
        unembedding.compare(read, logits)
    return (unembedding, read[0].to(unembedding.linear.weight.device)) if unembedding.seen and read else (None, logits)
