"""Quantities computed from the weights of a model without running it (METHODS 12, 13)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sepcap.models.sites import live_weight


@torch.no_grad()
def value_row_norms(model: Any) -> Float[Tensor, "layer value_head d_head"]:
    """‖W_V[h, :, d]‖₂ over d_model of every value neuron: the weights by which it reads the residual stream.

    In the checkpoint's own layout this is a row of `v_proj.weight`.
    """
    return torch.stack([live_weight(block.attn, "W_V").detach().double().norm(dim=1).cpu() for block in model.blocks])


@torch.no_grad()
def mlp_input_biases(model: Any) -> Float[Tensor, "layer neuron"]:
    """b_in of every mlp neuron: the input of its activation function when the residual stream contributes nothing.

    Raises:
        ValueError: the model has none.
    """
    biases = [b for b in (getattr(block.mlp, "b_in", None) for block in model.blocks) if b is not None]
    if len(biases) < len(model.blocks):
        raise ValueError(
            f"model: {model.cfg.model_name} has no mlp biases (Llama, Mistral and Galactica have none); OPT, GPT-2 and GPT-NeoX have them"
        )
    return torch.stack([bias.detach().double().cpu() for bias in biases])


@torch.no_grad()
def mlp_input_weights(model: Any, layer: int) -> Float[Tensor, "neuron d_model"]:
    """W_in[:, n] of every mlp neuron of a layer: the direction it reads; for a gated mlp it is from the up-projection, not the gate."""
    return live_weight(model.blocks[layer].mlp, "W_in").detach().T.double().cpu()
