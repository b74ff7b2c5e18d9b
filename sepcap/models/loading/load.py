"""Loading: one function for the embedded default, a folder, a hub name or a Hugging Face model."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sepcap.checks import checked
from sepcap.errors import unknown
from sepcap.models.attention import rotate_in_own_precision
from sepcap.models.devices import DeviceMap, check_at_hand, checked_device, checked_device_map
from sepcap.models.hooked_transformers import check_line, hooked_class, hooked_from
from sepcap.models.kinds import is_hooked_transformer, kind_of
from sepcap.models.loading.probe import check_hooked, check_object, probed, taking_apart
from sepcap.models.loading.reading import check_class, check_tokenizer, from_name, random_model, trained_model
from sepcap.models.loading.reading import default_folder as default_folder  # re-exported
from sepcap.models.wrappers import check_tokens, known_class, unwrapped

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@checked()
def load_model(
    model: Any = "default",
    *,
    device: str | torch.device | None = None,
    device_map: DeviceMap | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    dtype: str | torch.dtype = "float32",
    tokenizer: Any = None,
    processor: Any = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    random_weights: bool = False,
    seed: int = 0,
    backend: Any = "bridge",
) -> Any:
    """Load a language model, causal or masked, or an image classifier, with hooks.

    Args:
        model: "default" (embedded, needs no network), a folder in Hugging Face format, a hub name such as
            "facebook/opt-1.3b", a Hugging Face model object (which is changed: moved, cast and wrapped in place), or a
            TransformerBridge or HookedTransformer (returned as it is, after one short pass).
        device: device to put it on; default is the CUDA GPU if there is one, else the CPU. On "mps" (never tried), which has no float64,
            activations are moved to the CPU to be summed. A model object that accelerate has spread over devices stays where it is.
        device_map: instead of `device`, for several: "auto" (as evenly as their memory allows), "balanced", "balanced_low_0",
            "sequential", or name of a module -> device, such as `{"model.decoder.layers.0": 0, …}`. The named plans keep blocks whole.
        max_memory: with `device_map`, most memory to use on each device, such as `{0: "20GiB", 1: "40GiB"}`.
        dtype: "float32", "bfloat16", "float16", "float64" or a torch dtype.
        tokenizer: needed with a language model object, else loaded from the same place as the model.
        processor: image processor; needed with an image classifier object, else loaded from the same place as the model.
        trust_remote_code: run code that comes with the checkpoint. Off unless you ask for it.
        revision: branch, tag or commit of a hub model.
        random_weights: randomly initialised weights of the same configuration: the control of [MOD]. Only the
            configuration and the tokenizer of a folder or hub model are read.
        seed: seed of the random weights.
        backend: "bridge", or with transformer-lens 3.9 "hooked": a HookedTransformer with unchanged weights, nothing folded
            or centred; or a subclass of it, such as SAELens's HookedSAETransformer. With rotary embeddings it has at most 2,048
            positions. docs/families.md lists the families.

    Returns:
        A `transformer_lens` TransformerBridge in evaluation mode: everything that works on a bridge works on it. The bridge of an
        image classifier has its image processor as `.processor`.

    Raises:
        ConnectionError: a hub model that is not in the local cache, without network (raised at once).
        FileNotFoundError: a path that does not exist or contains no model.
        ValueError: a folder without tokenizer or with an empty one, or without some of the weights; an unavailable device.
        NotImplementedError: weights that are offloaded to CPU or disk, because the devices of a `device_map` are too small; a family
            or setting that a HookedTransformer does not support; a model whose attention is not that of its kind (causal or masked).
        ImportError: `backend="hooked"` with a transformer-lens that has no HookedTransformer.
        CorruptFile: weights that cannot be read.

    Example:
        >>> model = sepcap.load_model()  # doctest: +SKIP
        >>> model.cfg.n_layers  # doctest: +SKIP
        6
    """
    from transformer_lens.model_bridge import TransformerBridge

    if backend != "bridge":
        hooked_class(backend)
    model = unwrapped(model)
    if is_hooked_transformer(model) or isinstance(model, TransformerBridge):
        if backend != "bridge" and not is_hooked_transformer(model):
            raise ValueError("model is a TransformerBridge already, which backend='hooked' cannot convert; give its folder or name")
        check_object(model)
        return model
    placing = checked_device_map(device_map, max_memory, device)
    device = checked_device(device)
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        dtype = DTYPES[dtype]
    if isinstance(model, str | Path):
        name = str(model)
        made_by = partial(random_model, seed=seed, placing=placing) if random_weights else partial(trained_model, placing=placing)
        hf_model, tokenizer, processor = from_name(model, dtype, (tokenizer, processor), trust_remote_code, revision, made_by)
    else:
        hf_model, name = model, getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
        _check_model_object(hf_model, random_weights, device_map)
        needed = "processor" if kind_of(hf_model) == "images" else "tokenizer"
        if (processor if needed == "processor" else tokenizer) is None:
            raise ValueError(f"{needed} is missing: with a model object, pass its {needed} too, load_model(model, {needed}=...)")
        if tokenizer is not None:
            check_tokenizer(tokenizer, name)
        # a model made from a configuration lacks this field of a saved one, which the bridge needs
        hf_model.config.architectures = hf_model.config.architectures or [known_class(type(hf_model)).__name__]
        check_class(hf_model.config, name)
        if any(weight.is_floating_point() and weight.dtype != dtype for weight in hf_model.parameters()):
            hf_model = hf_model.to(dtype)
    _check_arithmetic(hf_model.config, name)
    check_line(hf_model.config, name)
    check_at_hand(hf_model, f"model={name!r}")
    spread = getattr(hf_model, "hf_device_map", None) is not None
    hf_model, at = (hf_model, None) if spread else (hf_model.to(device), str(device))
    if tokenizer is not None:
        check_tokens(tokenizer, hf_model, name)
    before = probed(hf_model, name)
    if backend == "bridge":
        hooked = _bridge_of(hf_model, tokenizer, processor, name, at, dtype)
    else:
        hooked = hooked_from(backend, hf_model, tokenizer, name, _as_it_is)
    check_hooked(hooked, before, name)
    shown = "default" if name == str(default_folder()) else name
    devices = ", ".join(sorted({str(weight.device) for weight in hf_model.parameters()}))
    print(f"{shown} on {devices} in {str(dtype).removeprefix('torch.')}")
    return hooked


def _bridge_of(hf_model: Any, tokenizer: Any, processor: Any, name: str, at: str | None, dtype: torch.dtype) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    # the class of the checkpoint determines the architecture, so that any display name works; a folder's bare name could be
    # one of the library's short names of hub models, which it would then report as loaded
    known_as = str(Path(name).resolve()) if Path(name).is_dir() else name
    with _as_it_is(tokenizer) as own, _processor_at_hand(processor, known_as) as place, taking_apart(hf_model, name):
        bridge = TransformerBridge.boot_transformers(place, hf_model=hf_model, tokenizer=own, device=at, dtype=dtype)
    bridge.cfg.model_name = name
    if tokenizer is not None and _special(bridge.tokenizer) != _special(tokenizer):
        # if BOS or EOS is missing, the bridge uses <unk> instead, or invents a token that the model has never seen (its public
        # setter would do so again)
        bridge._tokenizer = tokenizer
    bridge.processor = processor
    if dtype.itemsize < 4:
        rotate_in_own_precision(bridge)
    return bridge.eval()


def _check_model_object(hf_model: Any, random_weights: bool, device_map: Any) -> None:
    if device_map is not None:
        raise ValueError("device_map places weights while they are read; a model object stays where accelerate.dispatch_model has put it")
    if random_weights:
        raise ValueError("random_weights needs a folder or a hub name; a model object keeps its own weights")
    if not isinstance(hf_model, torch.nn.Module) or not hasattr(hf_model, "config"):
        raise TypeError(
            f"model is a {type(hf_model).__name__}; give 'default', a folder, a hub name, a Hugging Face model or a TransformerBridge"
        )
    if kind_of(hf_model) != "images" and getattr(hf_model, "get_output_embeddings", lambda: None)() is None:
        raise TypeError(f"model: a {type(hf_model).__name__} predicts no tokens; load it with AutoModelForCausalLM")
    if getattr(hf_model, "hf_device_map", None) is None and all(weight.is_meta for weight in hf_model.parameters()):
        raise ValueError(f"model: this {type(hf_model).__name__} is on the meta device, without weights; give its folder")
    if any("_original_component" in name for name, _ in hf_model.named_modules()):
        raise ValueError(f"model: a TransformerBridge wraps this {type(hf_model).__name__} already; give that bridge, or reload the model")


def _check_arithmetic(config: Any, name: str) -> None:
    if config.model_type == "gpt_neox" and not config.attention_bias:
        raise NotImplementedError(
            f"model={name!r} has no biases in its attention (attention_bias=False), which TransformerBridge expects in every GPT-NeoX"
        )
    if getattr(config, "scale_attn_weights", True) is False:
        raise NotImplementedError(
            f"model={name!r} does not scale its attention scores (scale_attn_weights=False); TransformerBridge does: the logits differ"
        )


@contextmanager
def _processor_at_hand(processor: Any, name: str) -> Iterator[str]:
    """The name to boot a model by: for an image classifier a folder with its processor, or the bridge would request one from the hub."""
    if processor is None:
        yield name
        return
    with TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        yield folder


@contextmanager
def _as_it_is(tokenizer: Any) -> Iterator[Any]:
    """A copy of a tokenizer that the bridge uses unchanged.

    The bridge reloads a tokenizer that does not prepend BOS from its original source: over the network, without later changes,
    and not at all if it was made in memory. A tokenizer whose settings state that it prepends BOS is not reloaded. The bridge
    itself tests whether the tokenizer prepends it.
    """
    if tokenizer is None:
        yield None
        return
    own = copy.deepcopy(tokenizer)
    had = {key: own.init_kwargs[key] for key in ("add_bos_token", "name_or_path") if key in own.init_kwargs}
    own.init_kwargs |= {"add_bos_token": True, "name_or_path": had.get("name_or_path", "")}
    yield own
    for key in ("add_bos_token", "name_or_path"):
        del own.init_kwargs[key]
    own.init_kwargs |= had


def _special(tokenizer: Any) -> tuple[int | None, ...]:
    """The size of the vocabulary and the special ids, which determine where rows begin and which tokens count."""
    return (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
