"""Gradients of the loss by the weights that neurons read and write with, summed over a dataset (METHODS 18, snip)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sepcap.models.devices import layer_device
from sepcap.models.kinds import architecture_of
from sepcap.models.sites import live_weight, n_layers

READ_AND_WRITE = {"mlp": ("mlp", ("W_in", "b_in", "W_gate", "b_gate", "W_out")), "attention": ("attn", ("W_V", "b_V", "W_O"))}
"""The weights of a neuron: (part of the block, names)."""


def sums_device(model: Any, layer: int) -> torch.device:
    """Device of the sums of a layer: that of the layer, but Apple's GPUs cannot add in float64."""
    device = layer_device(model, layer)
    return torch.device("cpu") if device.type == "mps" else device


class WeightGradients:
    """Gradients of the weights that the neurons of the sites read and write with, summed over a dataset."""

    def __init__(self, model: Any, sites: tuple[str, ...]) -> None:
        self.model, self.layers = model, range(n_layers(model))
        names = [READ_AND_WRITE["mlp" if site == "mlp" else "attention"] for site in sites]
        views = {
            (part, name, layer): weight.data_ptr()
            for part, own in names
            for name in own
            for layer in self.layers
            if (weight := live_weight(getattr(model.blocks[layer], part), name, None)) is not None
        }
        self.parameters = [weight for weight in dict.fromkeys(model.parameters()) if weight.data_ptr() in set(views.values())]
        lost = [at for at, pointer in views.items() if pointer not in {weight.data_ptr() for weight in self.parameters}]
        if lost:
            part, name, layer = lost[0]
            raise NotImplementedError(
                f"snip of {architecture_of(model)}: blocks.{layer}.{part}.{name} is a copy of the weight that the model computes with, so "
                "that its gradient is not known; use 'taylor' or 'atp'"
            )
        self.sums = {site: [torch.zeros_like(self._of(site, layer)) for layer in self.layers] for site in sites}

    @torch.no_grad()
    def _of(self, site: str, layer: int) -> Float[Tensor, "*neuron weight"]:
        """The weights of every neuron of a layer, side by side, in float64."""
        block = self.model.blocks[layer]
        part, names = READ_AND_WRITE["mlp" if site == "mlp" else "attention"]
        found = {name: w for name in names if (w := live_weight(getattr(block, part), name, None)) is not None}
        if site == "mlp":
            parts = [w if name == "W_out" else w[:, None] if w.dim() == 1 else w.T for name, w in found.items()]
        else:
            reads, out = [found["W_V"].transpose(1, 2)], found["W_O"]
            if "b_V" in found:
                reads.append(found["b_V"][..., None])
            sharing = len(out) // len(found["W_V"])
            if site == "attn_pre_out":  # query heads that share a value head share what it reads
                parts = [*(read.repeat_interleave(sharing, dim=0) for read in reads), out]
            else:
                parts = [*reads, out.unflatten(0, (-1, sharing)).transpose(1, 2).flatten(2)]
        return torch.cat([p.detach().to(sums_device(self.model, layer), torch.float64) for p in parts], dim=-1)

    @contextmanager
    def added(self) -> Iterator[None]:
        """Add the gradients of the backward pass inside; other passes give the weights none."""
        for weight in self.parameters:
            weight.requires_grad_(True)
            weight.grad = None
        yield
        self._add()
        for weight in self.parameters:
            weight.requires_grad_(False)

    def _add(self) -> None:
        found = [weight for weight in self.parameters if weight.grad is not None]
        before = [weight.data for weight in found]
        if not found:
            raise NotImplementedError(f"snip of {architecture_of(self.model)}: no gradient of the loss reaches its weights")
        try:
            # through the views of the weights their gradients are seen in the same layout
            for weight in found:
                assert weight.grad is not None
                weight.data = weight.grad
            for site, of_layer in self.sums.items():
                for layer, into in enumerate(of_layer):
                    into += self._of(site, layer)
        finally:
            for weight, data in zip(found, before, strict=True):
                weight.data, weight.grad = data, None

    def gathered(self, site: str, device: torch.device) -> Float[Tensor, "layer *neuron weight"]:
        """w·∂ℓ/∂w of every weight of every neuron."""
        return torch.stack([(into * self._of(site, layer)).to(device) for layer, into in enumerate(self.sums[site])])
