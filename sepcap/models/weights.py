"""Weights: fingerprints, snapshots, and saving an edited model as a plain Hugging Face checkpoint."""

import copy
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sepcap.checks import checked
from sepcap.models.devices import check_at_hand
from sepcap.models.hooked_transformers import storage_of, written_back
from sepcap.models.kinds import inner, is_hooked_transformer
from sepcap.models.sites import get_site, live_weight, live_weights, n_layers
from sepcap.models.wrappers import check_plain_weights, known_class

log = logging.getLogger(__name__)


def fingerprint(model: Any) -> str:
    """Hash of all weights: a change of even a single weight changes the hash. Takes about a second per GB."""
    check_at_hand(inner(model), "a fingerprint")
    return hash_of((_plain(name), parameter) for name, parameter in sorted(inner(model).named_parameters()))


def check_fingerprint(model: Any, expected: str, made: str) -> None:
    """Raise if a model has other weights than the one that something was made with; `made` says what, as in "this run was made with"."""
    if (found := fingerprint(model)) != expected:
        raise ValueError(f"model has other weights (fingerprint {found}) than the one {made} ({expected}): give that one, as it was then")


def hash_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of tensors with their names, shapes and dtypes, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        # numpy has no bfloat16, but bytes
        digest.update(tensor.detach().flatten().contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()[:16]


def _plain(name: str) -> str:
    return name.replace("._original_component", "")


class WeightSnapshot:
    """Copies of the weights that deletion, offsets and rotation edit, to restore a model afterwards.

    Takes as much memory as the mlp and value/output weights of the sites named.
    """

    def __init__(self, model: Any, sites: tuple[str, ...]) -> None:
        check_at_hand(model, "a copy to restore")
        self._saved = [
            (getattr(block, part), name, weight.detach().clone())
            for block in model.blocks
            for part in {get_site(site).part for site in sites}
            for name, weight in live_weights(block, part).items()
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copies back, bit for bit."""
        for part, name, weight in self._saved:
            live_weight(part, name).copy_(weight)


class EveryWeight:
    """Copies of all weights of a model, with what they required and their gradients, to restore it after fine-tuning.

    Takes as much memory as the model.
    """

    def __init__(self, model: Any) -> None:
        check_at_hand(model, "a copy to restore")
        self._saved = [(weight, weight.detach().clone(), weight.requires_grad, weight.grad) for weight in dict.fromkeys(model.parameters())]

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copies back, bit for bit."""
        for weight, saved, wanted, gradient in self._saved:
            weight.requires_grad_(wanted)
            weight.grad = gradient
            weight.copy_(saved)


def plain_state_dict(model: Any) -> dict[str, Tensor]:
    """The state dict under the names of the plain Hugging Face model, with fused tensors written back.

    A bridge wraps the modules of the model it was made from, so that the same tensor has several names. If a model
    fuses projections (q, k and v of GPT-2 and GPT-NeoX), the bridge computes with parts of its own: views of the fused
    tensor at first (GPT-2) or copies from the start (GPT-NeoX), and copies on either after `.to(dtype)`.

    Raises:
        NotImplementedError: a weight that the checkpoint needs is missing, or one that the model computes with has no place in it; or
            a HookedTransformer that was not made by `load_model`.
    """
    if is_hooked_transformer(model):
        return {key: weight.contiguous() for key, weight in written_back(model).state_dict().items()}
    check_plain_weights(model, ("attn", "mlp"), "saving a checkpoint")
    check_at_hand(model, "saving a checkpoint")
    hf_model = inner(model)
    wanted = _shell(hf_model).state_dict()
    named = [*hf_model.named_parameters(remove_duplicate=False), *hf_model.named_buffers(remove_duplicate=False)]
    have = {_plain(name): tensor.detach() for name, tensor in named if _plain(name) in wanted}
    known = {storage_of(tensor) for tensor in have.values()}
    for block in model.blocks:
        for split, whole, parts in _fused(block):
            known |= {storage_of(p) for part in parts for p in part.parameters()}
            _write_back(split, whole, parts, have)
    wrong = [key for key in wanted if key not in have or have[key].shape != wanted[key].shape]
    if wrong:
        raise NotImplementedError(f"cannot save this architecture: no weight found for {', '.join(wrong[:3])} ({len(wrong)} in all)")
    # an unembedding without bias has one of zeros in a bridge; in transformer-lens 3 that is a parameter
    zero = {storage_of(p) for p in model.unembed.parameters() if p.dim() == 1 and not p.any()} if hasattr(model, "unembed") else set()
    adrift = [name for name, parameter in model.named_parameters() if storage_of(parameter) not in known | zero]
    if adrift:
        raise NotImplementedError(
            f"cannot save this architecture: it computes with a copy of {', '.join(adrift[:3])} ({len(adrift)} in all), whose place "
            "in the checkpoint is not known"
        )
    return {key: have[key].contiguous() for key in wanted}


def _fused(block: Any) -> Iterator[tuple[Callable[[], Sequence[Any]], Any, list[Any]]]:
    """(the bridge's function that splits a fused projection, the fused module, the modules computed with) of one block."""
    attn: Any = getattr(block, "attn", None)
    mlp: Any = getattr(block, "mlp", None)
    if hasattr(attn, "split_qkv_matrix"):
        parts = [part.original_component for part in (attn.q, attn.k, attn.v)]
        yield partial(attn.split_qkv_matrix, attn.original_component), attn.qkv.original_component, parts
    if hasattr(mlp, "split_gate_up_matrix"):
        whole = mlp.original_component.gate_up_proj
        parts = [part.original_component for part in (mlp.gate, getattr(mlp, "in"))]
        yield partial(mlp.split_gate_up_matrix, mlp.original_component), whole, parts


@torch.no_grad()
def _write_back(split: Callable[[], Sequence[Any]], whole: Any, parts: Sequence[Any], state: dict[str, Tensor]) -> None:
    """Replace a fused tensor in the state dict by one assembled from its parts.

    Every architecture has its own layout of the parts. Splitting a tensor of its own indices shows the position of each
    entry of a part in the fused tensor, whatever the layout.
    """
    tensors = dict(whole.named_parameters())
    before = {kind: tensor.data for kind, tensor in tensors.items()}
    try:
        for tensor in tensors.values():
            tensor.data = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device).view(tensor.shape)
        pieces = [{kind: p.detach().clone() for kind, p in piece.named_parameters()} for piece in split()]
    finally:
        for kind, tensor in tensors.items():
            tensor.data = before[kind]
    for kind, data in before.items():
        index = torch.cat([piece[kind].flatten() for piece in pieces]).long()
        if not torch.equal(index.sort().values, torch.arange(data.numel(), device=index.device)):
            raise NotImplementedError("cannot save this architecture: the parts of a fused projection do not cover it")
        values = torch.cat([getattr(part, kind).detach().flatten() for part in parts]).to(data.dtype)
        put_together = torch.empty_like(data).view(-1).index_copy_(0, index, values).view(data.shape)
        for key in [key for key, tensor in state.items() if storage_of(tensor) == storage_of(data) and tensor.shape == data.shape]:
            state[key] = put_together


def _shell(hf_model: Any) -> Any:
    """The plain model without weights, in the configuration and dtype in which it is to be saved."""
    config = copy.deepcopy(hf_model.config)
    # as it was before hooks asked for eager attention and attention maps
    config.output_attentions = False
    config._attn_implementation = None
    with torch.device("meta"):
        return known_class(type(hf_model))(config).to(next(hf_model.parameters()).dtype)


@checked()
def save_pretrained(model: Any, folder: str | Path) -> None:
    """Write the model as a plain Hugging Face checkpoint (safetensors, configuration, tokenizer or image processor).

    `AutoModelForCausalLM.from_pretrained(folder)`, or the auto class of its kind, gives the same logits, deletions included, and so
    does `load_model(folder)`.

    Args:
        model: a hooked model, pruned or not.
        folder: where to write; made if it does not exist.

    Raises:
        FileExistsError: a file of that name exists.
        NotImplementedError: an architecture whose weights cannot be put back under their own names.
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        raise FileExistsError(f"folder={str(folder)!r} is a file or a device, not a folder; give the name of a folder")
    state = plain_state_dict(model)
    hf_model = model.sepcap_origin.hf_model if is_hooked_transformer(model) else inner(model)
    shell = _shell(hf_model)
    shell.generation_config = copy.deepcopy(getattr(hf_model, "generation_config", None))
    shell.save_pretrained(str(folder), state_dict=state)
    for beside in (model.tokenizer, getattr(model, "processor", None)):
        if beside is not None:
            beside.save_pretrained(str(folder))
    log.info("saved %d layers to %s", n_layers(model), folder)
