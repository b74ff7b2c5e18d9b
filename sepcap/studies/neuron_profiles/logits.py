"""What a neuron adds to the logits directly: W_write[n] · (final norm, its scale constant) · W_U (METHODS 23)."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sepcap.models.blocks.places import NORMS_BEHIND, hook_of, norm_behind
from sepcap.models.forward import call, evaluating, is_out_of_memory, with_hooks
from sepcap.models.kinds import architecture_of, inner, kind_of
from sepcap.models.sites import Population, n_layers

AT_ONCE = 256
"""Neurons whose effects on all logits are in memory at once."""

FAR = 1e3
"""Size of the vectors by which a norm is tried: ε has no part in the norm of such."""


def gain_of(norm: Any, like: Float[Tensor, "*batch d_model"]) -> tuple[Float[Tensor, " d_model"], bool]:
    """Gain of a norm, and whether it subtracts the mean.

    Found by its output on ±x, in whose difference the bias cancels; so that it does not depend on how an architecture stores the gain.
    """
    x = torch.ones(like.shape[-1], dtype=like.dtype, device=like.device)
    x[1::2] = -1
    ones = torch.ones_like(x)
    with torch.inference_mode():
        tried = [_odd_part(norm, FAR * each).float() for each in (ones, x)]
    centred = bool(tried[0].abs().max() <= 1e-3 * tried[1].abs().max())
    x = x.float()
    rest = x - x.mean() if centred else x
    return tried[1] * rest.square().mean().sqrt() / rest, centred


def _odd_part(norm: Any, x: Tensor) -> Tensor:
    both = norm(torch.stack([x, -x])[None])[0]
    return (both[0] - both[1]) / 2


class Head:
    """The final norm and the unembedding of a model, with the scale of the norm left out.

    Attributes:
        gain: of the final norm.
        centred: whether that norm subtracts the mean.
        unembedding: W_U.
    """

    def __init__(self, model: Any) -> None:
        unembedding = model.W_U.detach()
        self.gain, self.centred = gain_of(model.ln_final, unembedding.T)
        self.unembedding = unembedding

    def __call__(self, write: Float[Tensor, "unit d_model"]) -> Float[Tensor, "unit vocab"]:
        """Change of the logits, times the scale of the norm, by one unit of each write vector."""
        write = write.to(self.gain)
        if self.centred:
            write = write - write.mean(1, keepdim=True)
        return (write * self.gain) @ self.unembedding.to(self.gain)


def head_of(model: Any, ids: Int[Tensor, " pos"]) -> Head | str:
    """The head of a model, or why none of its neurons has a direct effect on the logits, in a sentence.

    Args:
        model: a hooked model.
        ids: some tokens, on which the head is compared with the model's own logits.
    """
    name = architecture_of(model)
    if kind_of(model) != "causal":
        return f"no direct logit effect in {name}: its head has a layer of its own between the residual stream and the logits"
    if any(norm_behind(model, place) == "sum" for place in NORMS_BEHIND):
        return f"no direct logit effect in {name}: every later block norms the sum of the stream and its output"
    found: dict[str, Tensor] = {}
    try:
        head = Head(model)
        last = hook_of(model, "resid_post", n_layers(model) - 1)
        with torch.inference_mode(), evaluating(model), with_hooks(model, [(last, lambda stream, hook: found.update(stream=stream))]):
            logits = call(model, ids[None].to(head.unembedding.device))[0].float()
        if _agrees(model, head, found["stream"][0].float().to(head.gain.device), logits.to(head.gain.device)):
            return head
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
    return f"no direct logit effect in {name}: its head is not one norm and one linear map of the residual stream"


def _agrees(model: Any, head: Head, stream: Float[Tensor, "pos d_model"], logits: Float[Tensor, "pos vocab"]) -> bool:
    """Whether differences of logits between positions are those of the linear head, up to a soft-cap."""
    cap = getattr(inner(model).config, "final_logit_softcapping", None)
    if cap:
        logits = cap * torch.atanh((logits / cap).clamp(-0.999999, 0.999999))
    rest = stream - stream.mean(1, keepdim=True) if head.centred else stream
    scale = rest.square().mean(1, keepdim=True).sqrt()
    found = head(stream) / scale
    wanted, found = logits - logits[:1], found - found[:1]  # without biases, which are those of all positions
    half = next(inner(model).parameters()).dtype.itemsize < 4
    return bool((wanted - found).abs().max() <= (0.1 if half else 0.01) * wanted.abs().max())


def direct_effects(
    head: Head, population: Population, layer: int, index: Int[Tensor, " unit"], listed: int
) -> dict[str, Tensor]:
    """The most promoted and most suppressed tokens of some neurons of a layer, strongest first, with their effects.

    Returns:
        "promoted/token", "promoted/effect" and the same of "suppressed", each [unit, listed]: logits per unit of activation, times the
        scale of the final norm.
    """
    rows = population.rows(layer).detach().flatten(0, -2)
    write = rows[index.to(rows.device)].to(head.gain)
    place = "mlp_out" if population.site.part == "mlp" else "attn_out"
    if norm_behind(population.model, place) == "output":
        norm = getattr(population.model.blocks[layer], NORMS_BEHIND[place])
        gain, centred = gain_of(norm, rows)
        write = ((write - write.mean(1, keepdim=True)) if centred else write) * gain.to(write)
    found: dict[str, list[Tensor]] = {}
    for part in write.split(AT_ONCE):
        effects = head(part)
        for name, sign in (("promoted", 1), ("suppressed", -1)):
            best = (sign * effects).topk(min(listed, effects.shape[1]), dim=1)
            found.setdefault(f"{name}/token", []).append(best.indices.cpu())
            found.setdefault(f"{name}/effect", []).append(sign * best.values.float().cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}
