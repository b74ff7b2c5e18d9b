"""Loading: one path for the embedded default, a folder, a hub name or a Hugging Face model."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sepcap.checks import checked
from sepcap.errors import CorruptFile, unknown
from sepcap.models.attention import rotate_in_own_precision
from sepcap.models.devices import DeviceMap, check_at_hand, check_device, checked_device_map
from sepcap.models.hooked_transformers import check_line, hooked_class, hooked_from
from sepcap.models.hub import WAYS_OUT, must_be_local
from sepcap.models.implied_size import check_size
from sepcap.models.kinds import AUTO_CLASSES, is_hooked_transformer, kind_of, kind_of_config
from sepcap.models.probe import check_hooked, probed, taking_apart, torch_defaults
from sepcap.models.wrappers import check_tokens, known_class, unwrapped

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SMALL = 200_000_000
"""Bytes of weights that are read in well under two seconds, so that a progress bar would only flash up."""


def default_folder() -> Path:
    """Folder of the embedded default model."""
    return Path(str(files("sepcap.models"))) / "assets" / "default"


@checked()
@torch_defaults()
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
            TransformerBridge or HookedTransformer (returned as it is).
        device: where to put it; default is the CUDA GPU when there is one, else the CPU. On "mps" (never tried), which has no float64,
            activations are taken to the CPU to be summed. A model object that accelerate has spread over devices stays where it is.
        device_map: instead of `device`, over several: "auto" (as evenly as they have memory), "balanced", "balanced_low_0", "sequential",
            or name of a module -> device, such as `{"model.decoder.layers.0": 0, …}`. Blocks are kept whole by the named ones.
        max_memory: with `device_map`, most of each device that may be used, such as `{0: "20GiB", 1: "40GiB"}`.
        dtype: "float32", "bfloat16", "float16", "float64" or a torch dtype.
        tokenizer: needed with a language model object, else loaded from the same place as the model.
        processor: image processor; needed with an image classifier object, else loaded from the same place as the model.
        trust_remote_code: run code that comes with the checkpoint. Off unless you ask for it.
        revision: branch, tag or commit of a hub model.
        random_weights: weights as they are before training, of the same configuration: the control of [MOD]. Only the
            configuration and the tokenizer of a folder or hub model are read.
        seed: of the random weights.
        backend: "bridge", or with transformer-lens 3.9 "hooked": a HookedTransformer with the weights as they are, nothing folded
            or centred; or a subclass of it, such as SAELens's HookedSAETransformer. A model of up to 2,048 positions where they
            are rotary. docs/families.md names the families.

    Returns:
        A `transformer_lens` TransformerBridge in evaluation mode: everything that works on a bridge works on it. That of an
        image classifier has its image processor as `.processor`.

    Raises:
        ConnectionError: a hub model that is not in the local cache, without network (at once).
        FileNotFoundError: a path that does not exist or holds no model.
        ValueError: a folder without tokenizer or with an empty one, or without some of the weights; a device that is not there.
        NotImplementedError: weights that are offloaded to CPU or disk, because the devices of a `device_map` are too small; a family
            or setting that a HookedTransformer does not have.
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
    if is_hooked_transformer(model):
        return model
    if isinstance(model, TransformerBridge):
        if backend != "bridge":
            raise ValueError("model is a TransformerBridge already, which backend='hooked' makes nothing else of; give its folder or name")
        return model
    placing = checked_device_map(device_map, max_memory, device)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_device(device)
    dtype = _dtype(dtype)
    if isinstance(model, str | Path):
        name = str(model)
        made_by = partial(_random, seed=seed, placing=placing) if random_weights else partial(_trained, placing=placing)
        hf_model, tokenizer, processor = _from_name(model, dtype, (tokenizer, processor), trust_remote_code, revision, made_by)
    else:
        hf_model, name = model, getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
        _check_model_object(hf_model, random_weights, device_map)
        needed = "processor" if kind_of(hf_model) == "images" else "tokenizer"
        if (processor if needed == "processor" else tokenizer) is None:
            raise ValueError(f"{needed} is missing: with a model object, pass its {needed} too, load_model(model, {needed}=...)")
        if tokenizer is not None:
            check_tokenizer(tokenizer, name)
        # a model made from a configuration lacks what a saved one says of itself, and what the bridge goes by
        hf_model.config.architectures = hf_model.config.architectures or [known_class(type(hf_model)).__name__]
        check_class(hf_model.config, name)
        if any(weight.is_floating_point() and weight.dtype != dtype for weight in hf_model.parameters()):
            hf_model = hf_model.to(dtype)
    _check_arithmetic(hf_model.config, name)
    check_line(hf_model.config, name)
    check_at_hand(hf_model, f"model={name!r}")
    spread = getattr(hf_model, "hf_device_map", None) is not None
    hf_model, at = (hf_model, None) if spread else (hf_model.to(device), str(device))
    if backend != "bridge":
        return hooked_from(backend, hf_model, tokenizer, name, _as_it_is)
    # the class of the checkpoint decides about the architecture, so that the display name is free; a folder's bare name could be
    # one of the library's short names of hub models, of which it then says that it loads them
    known_as = str(Path(name).resolve()) if Path(name).is_dir() else name
    if tokenizer is not None:
        check_tokens(tokenizer, hf_model, name)
    before = probed(hf_model, name)
    with _as_it_is(tokenizer) as own, _processor_at_hand(processor, known_as) as place, taking_apart(hf_model, name):
        bridge = TransformerBridge.boot_transformers(place, hf_model=hf_model, tokenizer=own, device=at, dtype=dtype)
    bridge.cfg.model_name = name
    if tokenizer is not None and len(bridge.tokenizer) != len(tokenizer):
        # where BOS or EOS is missing the bridge invents a token, which the model has never seen (its public setter does so again)
        bridge._tokenizer = tokenizer
    bridge.processor = processor
    if dtype.itemsize < 4:
        rotate_in_own_precision(bridge)
    bridge.eval()
    check_hooked(bridge, before, name)
    print(f"{name} on {', '.join(sorted({str(weight.device) for weight in hf_model.parameters()}))} in {str(dtype).removeprefix('torch.')}")
    return bridge


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Raise when a tokenizer knows nothing but special tokens (transformers makes such a one silently when files are missing)."""
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)) or not tokenizer("probe text", add_special_tokens=False)["input_ids"]:
        raise ValueError(f"the tokenizer of {name!r} is empty: {len(tokenizer)} tokens. {_SAVE}")


_SAVE = "Save it beside the model with save_pretrained(folder), or pass one: load_model(..., tokenizer=...) (or processor=)"

BESIDE = {
    "tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.*", "*.model", "*tekken*", "tokenization_*.py", "*.tiktoken"),
    "image processor": ("preprocessor_config.json", "processor_config.json"),
}
"""Files of which a folder must have one."""


def _check_model_object(hf_model: Any, random_weights: bool, device_map: Any) -> None:
    if device_map is not None:
        raise ValueError("device_map places weights while they are read; a model object stays where accelerate.dispatch_model has put it")
    if random_weights:
        raise ValueError("random_weights needs a folder or a hub name; a model object has the weights that it has")
    if not isinstance(hf_model, torch.nn.Module) or not hasattr(hf_model, "config"):
        raise TypeError(
            f"model is a {type(hf_model).__name__}; give 'default', a folder, a hub name, a Hugging Face model or a TransformerBridge"
        )
    if kind_of(hf_model) != "images" and getattr(hf_model, "get_output_embeddings", lambda: None)() is None:
        raise TypeError(f"model: a {type(hf_model).__name__} predicts no tokens; load it with AutoModelForCausalLM")
    if any("_original_component" in name for name, _ in hf_model.named_modules()):
        raise ValueError(f"model: a TransformerBridge wraps this {type(hf_model).__name__} already; give that bridge, or load it anew")


def check_class(config: Any, name: str) -> None:
    """Raise where nobody knows where the parts of a model are, before its weights are read.

    Raises:
        NotImplementedError: a class that transformer-lens has no bridge for, or one with an encoder and a decoder.
    """
    from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

    known, why = (config.architectures or [config.model_type])[0], "TransformerBridge does not know it"
    if getattr(config, "is_encoder_decoder", False):
        why = "it has an encoder and a decoder"
    elif any(getattr(config, f"{other}_config", None) is not None for other in ("vision", "audio")):
        why = (
            "it takes images or sound beside text. Load its language model by a class of transformers that has nothing else, where there "
            "is one (Gemma3ForCausalLM for Gemma 3), and give the object: load_model(model, tokenizer=...)"
        )
    else:
        try:
            determine_architecture_from_hf_config(config)
            return
        except ValueError:
            pass
    raise NotImplementedError(
        f"model={name!r} is a {known}, which sepcap does not work with: {why}. What it works with, family by family, is in "
        "docs/families.md: causal language models such as OPT, GPT-2, GPT-NeoX, Llama, Mistral, Gemma, Qwen, Phi and OLMo, masked "
        "ones (BERT, RoBERTa), and ViT"
    )


def _check_arithmetic(config: Any, name: str) -> None:
    if config.model_type == "gpt_neox" and not config.attention_bias:
        raise NotImplementedError(
            f"model={name!r} has no biases in its attention (attention_bias=False), which TransformerBridge takes apart in every GPT-NeoX"
        )
    if getattr(config, "scale_attn_weights", True) is False:
        raise NotImplementedError(
            f"model={name!r} does not scale its attention scores (scale_attn_weights=False); TransformerBridge does: the logits differ"
        )


@contextmanager
def _processor_at_hand(processor: Any, name: str) -> Iterator[str]:
    """The name to boot an image classifier by: a folder with its processor, or the bridge would ask the hub for one."""
    if processor is None:
        yield name
        return
    with TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        yield folder


@contextmanager
def _as_it_is(tokenizer: Any) -> Iterator[Any]:
    """A copy of a tokenizer that the bridge takes as it is.

    The bridge rebuilds a tokenizer that does not prepend BOS from the place it once came from: over the network, without what
    was changed since, and not at all when it was made in memory. One that says it prepends BOS is left alone. What it really
    does is found out by the bridge itself, by trying.
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


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    return DTYPES[dtype]


def _from_name(
    model: str | Path,
    dtype: torch.dtype,
    given: tuple[Any, Any],
    trust_remote_code: bool,
    revision: str | None,
    made_by: Callable[..., Any],
) -> tuple[Any, Any, Any]:
    """The model, its tokenizer and its image processor; `given` are the latter two where the user has them."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    path = default_folder() if model == "default" else Path(model).expanduser()
    if path.is_dir():
        _check_folder(path)
        check_size(path, _bytes_of_weights(path))
        quiet = _bytes_of_weights(path) < SMALL
        return _load(str(path), given, partial(made_by, dtype=dtype, quiet=quiet), local_files_only=True, **options)
    name = str(model)
    if path.exists():
        raise FileNotFoundError(f"model={name!r} is a file; give the folder that holds config.json, weights and tokenizer")
    if isinstance(model, Path) or name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        raise FileNotFoundError(f"model={name!r}: there is no such folder")
    local = must_be_local(name, revision)
    try:
        return _load(name, given, partial(made_by, dtype=dtype), local_files_only=local, revision=revision, **options)
    except OSError as error:
        if not local:
            raise
        raise ConnectionError(
            f"model={name!r} is not whole in the local Hugging Face cache, and the hub cannot be reached. {WAYS_OUT}"
        ) from error


def _check_folder(path: Path) -> None:
    if (path / "adapter_config.json").exists():
        raise ValueError(
            f"model={str(path)!r} holds adapters (adapter_config.json): merge them into the model that they belong to, "
            "peft's merge_and_unload(), and save that with save_pretrained(folder)"
        )
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"model={str(path)!r} is a folder without config.json: not a model saved by save_pretrained")


def _check_beside(path: Path, what: str) -> None:
    """Say what a folder lacks before transformers says it in its own way, or makes up an empty tokenizer."""
    if path.is_dir() and not any(any(path.glob(pattern)) for pattern in BESIDE[what]):
        raise ValueError(f"the folder {str(path)!r} has no {what}. {_SAVE.format(what=what)}")


def _bytes_of_weights(path: Path) -> int:
    return sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in path.glob(pattern))


def _load(source: str, given: tuple[Any, Any], made_by: Callable[..., Any], **options: Any) -> tuple[Any, Any, Any]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(source, **options)
    kind = kind_of_config(config, source)
    check_class(config, source)
    tokenizer, processor = given
    if kind == "images" and processor is None:
        _check_beside(Path(source), "image processor")
        processor = load_processor(source, **options)
    if kind != "images" and tokenizer is None:
        _check_beside(Path(source), "tokenizer")
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    if tokenizer is not None:
        check_tokenizer(tokenizer, source)
    return made_by(source, config, getattr(transformers, AUTO_CLASSES[kind]), **options), tokenizer, processor


def load_processor(source: str, **options: Any) -> Any:
    """The image processor of a folder or hub model, by pillow: torchvision is not needed."""
    try:
        import_module("PIL")
    except ImportError as error:
        raise ImportError("image classifiers need pillow; install the extra: pip install 'sepcap[vision]'") from error
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(source, **options)


def _random(
    source: str,
    config: Any,
    auto_class: Any,
    *,
    seed: int,
    dtype: torch.dtype,
    placing: Mapping[str, Any],
    quiet: bool = True,
    **options: Any,
) -> Any:
    """A model of the configuration as it is before training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # in float32 whatever the checkpoint is stored in, so that one seed gives one model
        options_of_config = {"dtype": torch.float32, "trust_remote_code": options["trust_remote_code"]}
        hf_model = auto_class.from_config(copy.deepcopy(config), **options_of_config).to(dtype)
    if not placing:
        return hf_model
    # placed by the same code as trained weights, which reads them from a folder
    with TemporaryDirectory() as folder:
        hf_model.save_pretrained(folder)
        return _trained(folder, config, auto_class, dtype=dtype, placing=placing, quiet=quiet, **options | {"local_files_only": True})


def _trained(
    source: str, config: Any, auto_class: Any, *, dtype: torch.dtype, placing: Mapping[str, Any], quiet: bool = False, **options: Any
) -> Any:
    from safetensors import SafetensorError

    try:
        with _no_bars() if quiet else nullcontext():
            # safetensors where there are any; older checkpoints are unpickled as tensors only, never as code
            # where peft is installed, transformers looks for adapters too, over the network unless it is told not to
            options["adapter_kwargs"] = {"local_files_only": options["local_files_only"]}
            hf_model, loading = auto_class.from_pretrained(
                source, dtype=dtype, weights_only=True, output_loading_info=True, **placing, **options
            )
    except SafetensorError as error:
        raise CorruptFile(f"model={source!r}: the weights are corrupt or truncated ({error}); save or download them again") from error
    except UnpicklingError as error:
        raise CorruptFile(
            f"model={source!r}: the weights are pickled and hold more than tensors, or are corrupt; nothing of it was run. "
            "Have them converted to safetensors by somebody who trusts them"
        ) from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ValueError(
            f"model={source!r} lacks weights of its architecture, which would be random numbers: {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}. Is it a {auto_class.__name__.removeprefix('AutoModel')} model?"
        )
    return hf_model


@contextmanager
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.set_tqdm_hook(lambda make, args, kwargs: make(*args, **{**kwargs, "disable": True}))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
