"""Weights: fingerprints, snapshots, and saving an edited model as a plain Hugging Face checkpoint."""

import copy
import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sepcap.models.sites import n_layers

log = logging.getLogger(__name__)


def fingerprint(model: Any) -> str:
    """Hash of the model's weights: a strided sample of every parameter, so that any other model differs."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.original_model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 1024)].float().cpu()
        digest.update(f"{name.replace('._original_component', '')}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


class WeightSnapshot:
    """Copies of the weights that deletion edits, to give a model back as it was.

    Takes as much memory as the mlp and value/output weights of the sites named.
    """

    def __init__(self, model: Any, sites: tuple[str, ...]) -> None:
        self._saved: list[tuple[Any, str, Tensor]] = []
        for block in model.blocks:
            if "mlp" in sites:
                self._keep(block.mlp, "W_in", "b_in", "W_gate", "b_gate", "W_out")
            if any(site.startswith("attn") for site in sites):
                self._keep(block.attn, "W_V", "b_V", "W_O")

    def _keep(self, part: Any, *names: str) -> None:
        for name in names:
            weight = getattr(part, name, None)
            if weight is not None:
                self._saved.append((part, name, weight.detach().clone()))

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copies back, bit for bit."""
        for part, name, weight in self._saved:
            getattr(part, name).copy_(weight)


def plain_state_dict(model: Any) -> dict[str, Tensor]:
    """The state dict under the names of the plain Hugging Face model, with fused tensors written back.

    A bridge wraps the modules of the model it was made from and, for fused attention (GPT-NeoX, GPT-2),
    computes with copies of the fused tensor's parts. Here the names are unwrapped, the parts put back
    together, and the set of names is checked against a fresh model.
    """
    from transformers import AutoModelForCausalLM

    hf_model = model.original_model
    with torch.device("meta"):
        wanted = AutoModelForCausalLM.from_config(_plain_config(hf_model)).state_dict()
    have: dict[str, Tensor] = {}
    for key, value in hf_model.state_dict(keep_vars=False).items():
        plain = key.replace("._original_component", "")
        if plain in wanted:
            have[plain] = value
    for name, module in hf_model.named_modules():
        # the fused tensor is left out of the state dict once it has been split
        if name.endswith(("query_key_value._original_component", "c_attn._original_component")):
            for part, value in module.named_parameters():
                have.setdefault(f"{name}.{part}".replace("._original_component", ""), value.detach())
    _write_back_fused(model, have)
    wrong = {k for k in wanted if k not in have or have[k].shape != wanted[k].shape}
    if wrong:
        raise NotImplementedError(f"cannot save this architecture: no weight found for {sorted(wrong)[:5]} ({len(wrong)} in all)")
    return {key: have[key].detach().contiguous() for key in wanted}


def _write_back_fused(model: Any, state: dict[str, Tensor]) -> None:
    for key in [k for k in state if "query_key_value." in k or ".c_attn." in k]:
        layer = int(next(part for part in key.split(".") if part.isdigit()))
        attn = model.blocks[layer].attn
        if key.endswith("weight"):
            parts = [attn.W_Q, attn.W_K, attn.W_V]  # [head, d_model, d_head]
            if "query_key_value" in key:  # GPT-NeoX: (head, q|k|v, d_head) rows
                fused = torch.stack([p.transpose(1, 2) for p in parts], dim=1).flatten(0, 2)
            else:  # GPT-2: q|k|v side by side as columns
                fused = torch.cat([p.transpose(0, 1).flatten(1) for p in parts], dim=1)
        else:
            parts = [attn.b_Q, attn.b_K, attn.b_V]  # [head, d_head]
            fused = torch.stack(parts, dim=1).flatten() if "query_key_value" in key else torch.cat([p.flatten() for p in parts])
        state[key] = fused.detach().reshape(state[key].shape)


def _plain_config(hf_model: Any) -> Any:
    """The configuration as it was before hooks asked for eager attention and attention maps."""
    config = copy.deepcopy(hf_model.config)
    config.output_attentions = False
    config._attn_implementation = None
    return config


def save_pretrained(model: Any, folder: str | Path) -> None:
    """Write the model as a plain Hugging Face checkpoint (safetensors, configuration, tokenizer).

    `AutoModelForCausalLM.from_pretrained(folder)` gives the same logits, deletions included.

    Args:
        model: a hooked model, pruned or not.
        folder: where to write; made if it does not exist.
    """
    from transformers import AutoModelForCausalLM

    state = plain_state_dict(model)
    config = _plain_config(model.original_model)
    config.dtype = next(iter(state.values())).dtype
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config)
    shell.generation_config = copy.deepcopy(getattr(model.original_model, "generation_config", shell.generation_config))
    if shell.generation_config is not None:
        shell.generation_config.output_attentions = False
    shell.save_pretrained(str(folder), state_dict=state)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(str(folder))
    log.info("saved %d layers to %s", n_layers(model), folder)
