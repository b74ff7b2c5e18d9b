"""Round the weights of a model to few bits: symmetric, per group, to nearest (METHODS 22)."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sepcap.errors import missing_extra
from sepcap.models.kinds import check_wraps

Quantiser = Literal["auto", "reference", "torchao"]


def round_to_nearest(weight: Float[Tensor, "out in"], bits: int, group_size: int) -> Float[Tensor, "out in"]:
    """Every group of weights of an output as whole multiples of its scale max|w| / (2^(bits − 1) − 1); zeros stay zero.

    Args:
        weight: weights; a group is consecutive along the last dimension, and the last group can be smaller.
        bits: number of bits; the largest multiple is 2^(bits − 1) − 1, the smallest its negative.
        group_size: weights per group.

    >>> round_to_nearest(torch.tensor([[0.0, 0.9, 7.0, -2.6]]), bits=4, group_size=4)
    tensor([[ 0.,  1.,  7., -3.]])
    """
    most = 2 ** (bits - 1) - 1
    missing = -weight.shape[1] % group_size
    groups = torch.nn.functional.pad(weight.float(), (0, missing)).unflatten(1, (-1, group_size))
    scale = groups.abs().amax(-1, keepdim=True) / most
    rounded = (groups / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-most, most) * scale
    return rounded.flatten(1)[:, : weight.shape[1]].to(weight.dtype)


def _by_torchao(weight: Float[Tensor, "out in"], bits: int, group_size: int) -> Float[Tensor, "out in"]:
    """The same by torchao's primitives, whose scale is max|w| / ((2^bits − 1) / 2)."""
    ao = importlib.import_module("torchao.quantization.quant_primitives")

    missing = -weight.shape[1] % group_size
    padded = torch.nn.functional.pad(weight.float(), (0, missing))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    block = (1, group_size)
    how: dict[str, Any] = {"quant_min": low, "quant_max": high}
    scale, zero = ao.choose_qparams_affine(padded, ao.MappingType.SYMMETRIC, block, torch.int8, **how, zero_point_dtype=torch.int32)
    whole = ao.quantize_affine(padded, block, scale, zero, torch.int8, **how)
    back = ao.dequantize_affine(whole, block, scale, zero, torch.int8, **how, output_dtype=torch.float32)
    return back[:, : weight.shape[1]].to(weight.dtype)


def quantiser_of(name: Quantiser) -> tuple[str, Callable[[Tensor, int, int], Tensor]]:
    """The function that rounds, and its name.

    Raises:
        ImportError: torchao was asked for and is not installed.
    """
    installed = find_spec("torchao") is not None
    if name == "torchao" and not installed:
        raise missing_extra("torchao", "certificate", "quantiser='torchao'")
    return ("torchao", _by_torchao) if name == "torchao" or (name == "auto" and installed) else ("reference", round_to_nearest)


@contextmanager
def quantised(model: Any, bits: int, group_size: int, how: Callable[[Tensor, int, int], Tensor] = round_to_nearest) -> Iterator[int]:
    """The model with the weights of all linear layers of its blocks rounded; afterwards they have their bits back.

    Embeddings, unembedding, norms and biases are left as they are, as is usual for quantisation of weights only.

    Args:
        model: a bridge.
        bits: number of bits.
        group_size: weights of one output that share a scale.
        how: the function that rounds a matrix [out, in].

    Yields:
        Number of weights that are rounded.

    Raises:
        NotImplementedError: a HookedTransformer, which has no linear layers.
    """
    check_wraps(model, "rounding weights")
    weights: dict[int, tuple[Tensor, bool]] = {}
    for module in model.blocks.modules():
        of_conv = type(module).__name__ == "Conv1D"  # of transformers, whose weights are [in, out]
        if isinstance(module, torch.nn.Linear) or of_conv:
            weights[id(module.weight)] = module.weight, of_conv
    saved = [(weight, weight.detach().clone()) for weight, _ in weights.values()]
    try:
        with torch.no_grad():
            # all before any is written: q, k and v of GPT-2 are views of one fused weight, which would be rounded twice
            new = [how(w.T, bits, group_size).T if transposed else how(w, bits, group_size) for w, transposed in weights.values()]
            for (weight, _), rounded in zip(saved, new, strict=True):
                weight.copy_(rounded)
        yield sum(weight.numel() for weight, _ in saved)
    finally:
        with torch.no_grad():
            for weight, old in saved:
                weight.copy_(old)
