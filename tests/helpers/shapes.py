"""Stand-ins for models in tests that only ask for shapes."""

from types import SimpleNamespace

import torch


def model(layers: int = 4, mlp: int = 25, heads: int = 3, d_head: int = 4) -> SimpleNamespace:
    """As much of a model as has a shape."""
    part = SimpleNamespace
    block = part(mlp=part(W_out=torch.zeros(mlp, 8)), attn=part(W_O=torch.zeros(heads, d_head, 8), W_V=torch.zeros(heads, 8, d_head)))
    return part(blocks=[block] * layers)
