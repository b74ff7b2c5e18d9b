"""Reading a model, its tokenizer or its image processor from a folder or the hub."""

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

from sepcap.errors import CorruptFile
from sepcap.models.kinds import AUTO_CLASSES, kind_of_config
from sepcap.models.loading.damaged import SAVE, check_weights, on_meta, reading
from sepcap.models.loading.hub import WAYS_OUT, must_be_local
from sepcap.models.loading.implied_size import check_size

SMALL = 200_000_000
"""Bytes of weights that are read in well under two seconds, so that a progress bar would only flash up."""


def default_folder() -> Path:
    """Folder of the embedded default model."""
    return Path(str(files("sepcap.models"))) / "assets" / "default"


def from_name(
    model: str | Path,
    dtype: torch.dtype,
    given: tuple[Any, Any],
    trust_remote_code: bool,
    revision: str | None,
    made_by: Callable[..., Any],
) -> tuple[Any, Any, Any]:
    """The model, its tokenizer and its image processor; `given` are the latter two if the user passes them."""
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
            f"model={name!r} is incomplete in the local Hugging Face cache, and the hub cannot be reached. {WAYS_OUT}"
        ) from error


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Raise if a tokenizer has only special tokens (transformers silently makes such a tokenizer if files are missing)."""
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)) or not tokenizer("probe text", add_special_tokens=False)["input_ids"]:
        raise ValueError(f"the tokenizer of {name!r} is empty: {len(tokenizer)} tokens; {SAVE}")


BESIDE = {
    "tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.*", "*.model", "*tekken*", "tokenization_*.py", "*.tiktoken"),
    "image processor": ("preprocessor_config.json", "processor_config.json"),
}
"""Part of a model -> patterns of files, of which a folder must have at least one."""


def check_class(config: Any, name: str) -> None:
    """Raise if the architecture of a model is not supported, before its weights are read.

    Raises:
        NotImplementedError: a class that transformer-lens has no bridge for, or one with an encoder and a decoder.
    """
    from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

    known, why = (config.architectures or [config.model_type])[0], "TransformerBridge does not support it"
    if getattr(config, "is_encoder_decoder", False):
        why = "it has an encoder and a decoder"
    elif any(getattr(config, f"{other}_config", None) is not None for other in ("vision", "audio")):
        why = (
            "it takes images or sound besides text. Load its language model alone by a class of transformers, if there is one for it "
            "(Gemma3ForCausalLM for Gemma 3), and give the object: load_model(model, tokenizer=...)"
        )
    else:
        try:
            determine_architecture_from_hf_config(config)
            return
        except ValueError:
            pass
    raise NotImplementedError(
        f"model={name!r} is a {known}, which sepcap does not support: {why}. The supported families are listed in "
        "docs/families.md: causal language models such as OPT, GPT-2, GPT-NeoX, Llama, Mistral, Gemma, Qwen, Phi and OLMo, masked "
        "ones (BERT, RoBERTa), and ViT"
    )


def _check_folder(path: Path) -> None:
    if (path / "adapter_config.json").exists():
        raise ValueError(
            f"model={str(path)!r} holds adapters (adapter_config.json): merge them into their base model with "
            "peft's merge_and_unload(), and save that with save_pretrained(folder)"
        )
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"model={str(path)!r} is a folder without config.json: not a model saved by save_pretrained")


def _check_beside(path: Path, what: str) -> None:
    """Raise if a folder lacks these files, before transformers raises a less helpful error, or makes an empty tokenizer."""
    if path.is_dir() and not any(any(path.glob(pattern)) for pattern in BESIDE[what]):
        raise ValueError(f"the folder {str(path)!r} has no {what}; {SAVE}")


def _bytes_of_weights(path: Path) -> int:
    return sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in path.glob(pattern))


def _load(source: str, given: tuple[Any, Any], made_by: Callable[..., Any], **options: Any) -> tuple[Any, Any, Any]:
    import transformers

    with reading(source, "configuration", partial(on_meta, None)):
        config = transformers.AutoConfig.from_pretrained(source, **options)
    kind = kind_of_config(config, source)
    check_class(config, source)
    tokenizer, processor = given
    if kind == "images" and processor is None:
        _check_beside(Path(source), "image processor")
        processor = load_processor(source, **options)
    if kind != "images" and tokenizer is None:
        _check_beside(Path(source), "tokenizer")
        with reading(source, "tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    if tokenizer is not None:
        check_tokenizer(tokenizer, source)
    return made_by(source, config, getattr(transformers, AUTO_CLASSES[kind]), **options), tokenizer, processor


def load_processor(source: str, **options: Any) -> Any:
    """The image processor of a folder or hub model, with pillow: torchvision is not needed."""
    try:
        import_module("PIL")
    except ImportError as error:
        raise ImportError("image classifiers need pillow; install the extra: pip install 'sepcap[vision]'") from error
    from transformers import AutoImageProcessor

    with reading(source, "image processor"):
        return AutoImageProcessor.from_pretrained(source, **options)


def random_model(
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
    """A randomly initialised model of the configuration."""
    with torch.random.fork_rng(), reading(source, "configuration", partial(on_meta, auto_class)):
        torch.manual_seed(seed)
        # in float32 whatever the checkpoint is stored in, so that one seed gives one model
        options_of_config = {"dtype": torch.float32, "trust_remote_code": options["trust_remote_code"]}
        hf_model = auto_class.from_config(copy.deepcopy(config), **options_of_config).to(dtype)
    if not placing:
        return hf_model
    # placed by the same code as trained weights, which reads them from a folder
    with TemporaryDirectory() as folder:
        hf_model.save_pretrained(folder)
        return trained_model(folder, config, auto_class, dtype=dtype, placing=placing, quiet=quiet, **options | {"local_files_only": True})


def trained_model(
    source: str, config: Any, auto_class: Any, *, dtype: torch.dtype, placing: Mapping[str, Any], quiet: bool = False, **options: Any
) -> Any:
    """A model with the weights of a folder or hub model, all of them and no others."""
    from safetensors import SafetensorError

    # if peft is installed, transformers looks for adapters too, over the network unless this forbids it
    options["adapter_kwargs"] = {"local_files_only": options["local_files_only"]}
    # mismatches are reported in a sentence, below
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with reading(source, "weights", partial(on_meta, auto_class)), _no_bars() if quiet else nullcontext(), _no_report():
        try:
            # safetensors if there are any; older checkpoints are unpickled as tensors only, never as code
            hf_model, loading = auto_class.from_pretrained(source, dtype=dtype, weights_only=True, **placing, **options)
        except SafetensorError as error:
            raise CorruptFile(f"model={source!r}: the weights are corrupt or truncated ({error}); save or download them again") from error
        except UnpicklingError as error:
            raise CorruptFile(
                f"model={source!r}: the weights are pickled and hold more than tensors, or are corrupt; no code in them was run. "
                "Have them converted to safetensors by someone who trusts them"
            ) from error
    check_weights(source, config, loading)
    return hf_model


@contextmanager
def _no_report() -> Iterator[None]:
    """Suppress the table of weights that do not fit; `check_weights` reports them in a sentence."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.set_tqdm_hook(lambda make, args, kwargs: make(*args, **{**kwargs, "disable": True}))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
