"""The linearised backward pass of RelP (METHODS 18): what a model computes is unchanged, and gradients follow simpler rules.

- A norm's scale counts as a constant; its mean subtraction does not.
- An activation function is propagated as act(x)/x instead of act′(x), and as act′(0) at x = 0. So is the tanh of a soft-cap.
- Attention patterns count as constants: queries and keys receive no gradient. So do the weights of a router over experts.
- Of a product of an activated gate and an up-projection, each factor receives half of the gradient.

Everything else, the loss computed from the logits included, has its ordinary gradient. Source: RelP (arXiv 2508.21258).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sepcap.models.kinds import architecture_of, check_wraps, inner
from sepcap.models.sites import n_layers

ACTIVATIONS = frozenset({"relu", "relu_", "relu6", "gelu", "silu", "silu_", "mish", "leaky_relu", "elu", "hardtanh", "tanh"})
"""Functions of one number that are propagated as act(x)/x."""

OF_A_NORM = frozenset({"pow", "square", "sqrt", "rsqrt", "var", "std", "norm", "vector_norm", "reciprocal"})
"""Functions inside a norm from which its scale is computed: their results are constants."""

GATES = frozenset({"sigmoid", "sigmoid_", "hardsigmoid", "softplus"})
"""Functions with values other than 0 at 0: RelP has no rule for them."""

GATED = "_sepcap_activated"
"""Attribute of a tensor that an activation function has returned."""


class Linearised(TorchFunctionMode):
    """Applies the rules to what is computed inside `with linearised(model) as rules, rules:`.

    Attributes:
        activations, patterns: number of activation functions and attention patterns that the rules were applied to.
    """

    def __init__(self, architecture: str) -> None:
        super().__init__()
        self.architecture = architecture
        self.activations = self.patterns = 0
        self._entered = self._norms = self._opaque = 0

    def __enter__(self) -> "Linearised":
        self._entered += 1
        return super().__enter__()

    def __exit__(self, *why: Any) -> None:
        self._entered -= 1
        super().__exit__(*why)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        rule = None if self._opaque else self._rule(name)
        return func(*args, **kwargs) if rule is None else rule(func, *args, **kwargs)

    def _rule(self, name: str) -> Callable[..., Any] | None:
        if self._norms:
            return {"layer_norm": _layer_norm, "rms_norm": _rms_norm}.get(name, _constant if name in OF_A_NORM else None)
        if name in ACTIVATIONS:
            return self._activation
        if name in GATES:
            raise self._no_rule(name)
        if name in ("softmax", "scaled_dot_product_attention"):
            self.patterns += 1
            return _constant if name == "softmax" else _attention
        return _product if name in ("mul", "multiply") else None

    def _activation(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.activations += 1
        kwargs.pop("inplace", None)
        with torch.no_grad():
            y = func(x.clone() if func.__name__.endswith("_") else x, *args, **kwargs)
        return self._quotient(func.__name__, partial(_called, func, args, kwargs), x, y)

    def norm(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A norm's forward pass, its scale a constant."""
        self._norms += 1
        try:
            return forward(*args, **kwargs)
        finally:
            self._norms -= 1

    def module(self, forward: Callable[..., Any], x: Tensor) -> Tensor:
        """An activation function that is a module, whatever it is made of."""
        if not self._entered or self._opaque or self._norms:
            return forward(x)
        self.activations += 1
        self._opaque += 1
        try:
            with torch.no_grad():
                y = forward(x)
            return self._quotient("an activation function", forward, x, y)
        finally:
            self._opaque -= 1

    def _quotient(self, name: str, act: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """y = act(x), propagated as y/x."""
        # separate hooks on saved tensors, so that those of a recomputed block are not called here
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
            at = torch.zeros(1, dtype=torch.float32, device=x.device, requires_grad=True)
            there = act(at)
            (slope,) = torch.autograd.grad(there.sum(), at)
        if bool(there != 0):
            raise self._no_rule(name)
        zero = x == 0
        ratio = (y / x.masked_fill(zero, 1)).masked_fill(zero, float(slope))
        result = _Scaled.apply(x, y, ratio)
        setattr(result, GATED, True)
        return result

    def _no_rule(self, name: str) -> NotImplementedError:
        return NotImplementedError(
            f"relp of {self.architecture}: it computes with {name}, which is not 0 at 0, and RelP has no rule for that; use 'atp' or 'ig'"
        )

    def check(self, layers: int) -> None:
        """Raise if some layer had no activation function or no attention pattern that the rules could apply to."""
        for what, found in (("activation function", self.activations), ("attention pattern", self.patterns)):
            if found < layers:
                raise NotImplementedError(
                    f"relp of {self.architecture}: {found} {what}s were met in {layers} layers, so that its rules do not apply; use 'atp' "
                    "or 'ig'"
                )


def _same(x: Tensor) -> Tensor:
    return x


def _called(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> Tensor:
    return func(x, *args, **kwargs)


class _Scaled(torch.autograd.Function):
    """A given value, with a given derivative per entry."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, ratio: Tensor) -> Tensor:
        ctx.save_for_backward(ratio)
        return y.clone() if y is x else y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (ratio,) = ctx.saved_tensors
        return grads[0] * ratio, None, None


class _Normed(torch.autograd.Function):
    """A given output of a norm, with the derivative for a constant scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, weight: Tensor | None, centred: int) -> Tensor:
        ctx.save_for_backward(scale, weight)
        ctx.centred = centred
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        scale, weight = ctx.saved_tensors
        g = grads[0] if weight is None else grads[0] * weight
        if ctx.centred:
            g = g - g.mean(dim=tuple(range(-ctx.centred, 0)), keepdim=True)
        return (g * scale).to(grads[0].dtype), None, None, None, None


def _layer_norm(
    func: Any, x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, **_: Any
) -> Tensor:
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    with torch.no_grad():
        y, _mean, scale = torch.native_layer_norm(x, shape, weight, bias, eps)
    return _Normed.apply(x, y, scale, weight, len(shape))


def _rms_norm(func: Any, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    with torch.no_grad():
        y = func(x, shape, weight, eps)
        wide = x if x.dtype == torch.float64 else x.float()
        squares = wide.square().mean(dim=tuple(range(-len(shape), 0)), keepdim=True)
        scale = (squares + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    return _Normed.apply(x, y, scale, weight, 0)


def _constant(func: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return func(*args, **kwargs)


def _attention(func: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return func(query.detach(), key.detach(), *args, **kwargs)


def _product(func: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
    product = func(a, b, *args, **kwargs)
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape):
        return product
    if not (a.requires_grad and b.requires_grad and (hasattr(a, GATED) or hasattr(b, GATED))):
        return product
    return _Halved.apply(product)


class _Halved(torch.autograd.Function):
    """The value itself; half of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] / 2


@contextmanager
def linearised(model: Any) -> Iterator[Linearised]:
    """A context in which norms and activation functions of the model can be propagated by the rules of RelP.

    The rules apply to a forward pass under the mode that is yielded, and to its backward pass. The pass must be the model's own
    (`models.forward.call`). The loss and the backward pass belong outside of the mode, but inside of this context.

    Args:
        model: a hooked model, in evaluation mode; its modules are restored afterwards, also after an exception.

    Raises:
        NotImplementedError: a HookedTransformer.

    Example:
        >>> with linearised(model) as rules:  # doctest: +SKIP
        ...     with rules:
        ...         logits = model(ids)
        ...     logits.sum().backward()
    """
    check_wraps(model, "relp")
    rules = Linearised(architecture_of(model))
    patched: list[nn.Module] = []
    try:
        for module in [*model.modules(), *inner(model).modules()]:
            wrapped = rules.norm if "Norm" in type(module).__name__ else rules.module if _is_activation(module) else None
            if wrapped is not None and "forward" not in module.__dict__:
                # bypasses the bridge's own setattr, which would set it on the wrapped module
                module.__dict__["forward"] = partial(wrapped, module.forward)
                patched.append(module)
        yield rules
    finally:
        for module in patched:
            del module.__dict__["forward"]


def checked_rules(model: Any, rules: Linearised) -> None:
    """Raise if a forward pass applied the rules to too few activation functions or attention patterns."""
    rules.check(n_layers(model))


def under(rules: Linearised | None) -> AbstractContextManager[Any]:
    """The context of the rules; one without effect for None."""
    return nullcontext() if rules is None else rules


def _is_activation(module: nn.Module) -> bool:
    home = type(module).__module__
    if home == "transformers.activations":
        return True
    return home == "torch.nn.modules.activation" and not isinstance(module, nn.MultiheadAttention | nn.Softmax)
