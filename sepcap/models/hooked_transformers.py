"""HookedTransformer of transformer-lens 3, made from a Hugging Face model whose weights it shares (backend="hooked")."""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from sepcap.models.hooked_families import HOOKED_FAMILIES
from sepcap.models.kinds import architecture_of

WRONG_IN_3 = ("deepseek_v3", "qwen3_5_text")
"""Model types whose bridge in transformer-lens 3.9 gives different logits from the model's, or none."""


@dataclass(frozen=True)
class Origin:
    """What a HookedTransformer was made from.

    Attributes:
        hf_model: the Hugging Face model; it shares the weights in memory, as long as neither of the two is moved or cast.
        views: returns the weights of `hf_model` as the HookedTransformer names and shapes them, most of them without copying.
    """

    hf_model: Any
    views: Callable[[Any], Mapping[str, Tensor]]


def line() -> int:
    """Major version of the installed transformer-lens: 3 has HookedTransformer, 4 does not."""
    return int(version("transformer-lens").split(".")[0])


def check_line(config: Any, name: str) -> None:
    """Raise if the bridge of the installed version does not compute the same as the model.

    Raises:
        NotImplementedError: see `WRONG_IN_3`.
    """
    if config.model_type in WRONG_IN_3 and line() < 4:
        raise NotImplementedError(
            f"model={name!r}: the bridge of transformer-lens {version('transformer-lens')} computes a {config.model_type} differently from "
            "transformers, or not at all; install transformer-lens 4 (SAELens then needs an environment of its own)"
        )


def hooked_class(backend: Any) -> type:
    """The class that a backend names.

    Raises:
        ValueError: neither "hooked" nor a subclass of HookedTransformer.
        ImportError: the installed transformer-lens has no such class.
    """
    if isinstance(backend, type) and any(base.__name__ == "HookedTransformer" for base in backend.__mro__):
        return backend
    if backend != "hooked":
        raise ValueError(f"backend={backend!r}: give 'bridge', 'hooked', or a subclass of HookedTransformer such as HookedSAETransformer")
    if line() >= 4:
        raise ImportError(
            f"backend='hooked': the installed transformer-lens {version('transformer-lens')} has no HookedTransformer, which was "
            "removed in 4.0. Leave out backend, or install a version that has it: pip install 'transformer-lens>=3.9,<4'"
        )
    return import_module("transformer_lens").HookedTransformer


@torch.no_grad()
def hooked_from(
    backend: Any,
    hf_model: Any,
    tokenizer: Any,
    name: str,
    as_it_is: Callable[[Any], AbstractContextManager[Any]],
) -> Any:
    """A HookedTransformer of a Hugging Face model, nothing folded or centred. The caller must check that it computes the same.

    Args:
        backend: "hooked", or a subclass of HookedTransformer.
        hf_model: the model, on its device and in its precision. Its weights are shared: an edit of one is an edit of both.
        tokenizer: its tokenizer.
        name: name of the model.
        as_it_is: context manager that yields a copy of a tokenizer that the library does not rebuild.

    Raises:
        NotImplementedError: a family, or a setting of one, that a HookedTransformer does not support.
    """
    made, architecture = hooked_class(backend), hf_model.config.architectures[0]
    if architecture not in HOOKED_FAMILIES:
        raise NotImplementedError(
            f"model={name!r} is a {architecture}, which sepcap cannot convert to a HookedTransformer; leave out backend, or set 'bridge'. "
            f"backend='hooked' supports {', '.join(sorted(HOOKED_FAMILIES))}"
        )
    if getattr(hf_model, "hf_device_map", None) is not None:
        raise NotImplementedError(f"model={name!r}: backend='hooked' works on one device; give device=, or set backend='bridge'")
    options_of, family = HOOKED_FAMILIES[architecture]
    try:
        options = options_of(hf_model.config)
    except NotImplementedError as error:
        raise NotImplementedError(f"model={name!r} has {error}; leave out backend, or set 'bridge'") from error
    weight = next(hf_model.parameters())
    options |= {"d_vocab": hf_model.config.vocab_size, "init_weights": False, "device": str(weight.device), "dtype": weight.dtype}
    options |= {"model_name": name, "original_architecture": architecture}
    config = import_module("transformer_lens").HookedTransformerConfig.from_dict(options)
    with as_it_is(tokenizer) as own:
        model = made(config, own, move_to_device=False)
    if len(model.tokenizer) != len(tokenizer):
        model.tokenizer = tokenizer  # if BOS or EOS is missing, the library invents a token
    conversion = getattr(import_module(f"transformer_lens.pretrained.weight_conversions.{family}"), f"convert_{family}_weights")
    origin = Origin(hf_model, partial(conversion, cfg=copy.copy(model.cfg)))
    state = {key: value.detach().to(weight) for key, value in origin.views(hf_model).items()}
    # assigned, not copied: the weights are in memory once, and a deletion here is also one in the model that is saved
    found = model.load_state_dict(state, strict=False, assign=True)
    lost = [*found.unexpected_keys, *({key for key, _ in model.named_parameters()} & set(found.missing_keys) - {"unembed.b_U"})]
    if lost:
        raise NotImplementedError(f"model={name!r}: {', '.join(lost[:3])} of {architecture} and HookedTransformer do not match")
    model.to(weight.device, print_details=False)  # for masks and rotations, which are not parameters
    model.sepcap_origin = origin
    return model.eval()


@torch.no_grad()
def written_back(model: Any) -> Any:
    """The Hugging Face model that a HookedTransformer was made from, with the weights as they are now.

    Raises:
        NotImplementedError: it was not made by sepcap, or a changed weight has no place in the checkpoint.
    """
    origin: Origin | None = getattr(model, "sepcap_origin", None)
    if origin is None:
        raise NotImplementedError(
            f"saving a checkpoint needs the Hugging Face model, which a {type(model).__name__} does not keep; make it with "
            "sepcap.load_model(folder or name, backend='hooked'), and make the same edits there"
        )
    now, views = dict(model.named_parameters()), origin.views(origin.hf_model)
    there = {storage_of(weight) for weight in origin.hf_model.parameters()}
    moved = [key for key, view in views.items() if storage_of(view) in there and storage_of(now[key]) != storage_of(view)]
    written = {storage_of(views[key]) for key in moved}
    before = {key: view.detach().clone() for key, view in views.items() if storage_of(view) in written}
    # a weight that the model still shares with the checkpoint changes when a weight that the checkpoint ties to it is written
    now = {key: weight.detach().clone() if storage_of(weight) in written else weight for key, weight in now.items()}
    for key in moved:
        views[key].detach().copy_(now[key])
    # after all are written: a tied weight cannot have two values, and a bias that the family lacks has no place
    lost = [key for key, view in views.items() if not torch.equal(view.to(now[key]), now[key])]
    if model.unembed.b_U.any() and "unembed.b_U" not in views:
        lost.append("unembed.b_U")
    if lost:
        for key, value in before.items():
            views[key].detach().copy_(value)
        raise NotImplementedError(
            f"cannot save this model: {', '.join(lost[:3])} ({len(lost)} in all) has been changed, which a checkpoint of "
            f"{architecture_of(model)} has no place for: it has no such bias, or ties it to another weight"
        )
    return origin.hf_model


def storage_of(tensor: Shaped[Tensor, "..."]) -> int:
    """Address of the memory of a tensor: the same for views of one tensor."""
    return tensor.untyped_storage().data_ptr()
