"""Loading: one path for the embedded default, a folder, a hub name or a Hugging Face model."""

import os
import socket
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def default_folder() -> Path:
    """Folder of the embedded default model."""
    return Path(str(files("sepcap.models"))) / "assets" / "default"


def load_model(
    model: Any = "default",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Any:
    """Load a causal language model with hooks.

    Args:
        model: "default" (embedded, needs no network), a folder in Hugging Face format, a hub name such as
            "facebook/opt-1.3b", a Hugging Face model object, or a TransformerBridge (returned as it is).
        device: where to put it; default is the GPU when there is one, else the CPU.
        dtype: "float32", "bfloat16", "float16", "float64" or a torch dtype.
        tokenizer: needed with a model object, else loaded from the same place as the model.
        trust_remote_code: run code that comes with the checkpoint. Off unless you ask for it.
        revision: branch, tag or commit of a hub model.

    Returns:
        A `transformer_lens` TransformerBridge in evaluation mode: everything that works on a bridge works on it.

    Raises:
        ConnectionError: a hub model that is not in the local cache, without network (at once).
        FileNotFoundError: a folder that holds no model.
        ValueError: a folder without tokenizer or with an empty one.

    Example:
        >>> model = sepcap.load_model()  # doctest: +SKIP
        >>> model.cfg.n_layers  # doctest: +SKIP
        6
    """
    from transformer_lens.model_bridge import TransformerBridge

    if isinstance(model, TransformerBridge):
        return model
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = _dtype(dtype)
    if isinstance(model, str | Path):
        name = str(model)
        hf_model, tokenizer = _from_name(name, dtype, tokenizer, trust_remote_code, revision)
    else:
        hf_model, name = model, getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
        if not hasattr(hf_model, "config"):
            raise TypeError(
                f"model is a {type(model).__name__}; give 'default', a folder, a hub name, a Hugging Face model or a TransformerBridge"
            )
        hf_model = hf_model.to(dtype)
    if tokenizer is None:
        raise ValueError("tokenizer is missing: with a model object, pass its tokenizer too, load_model(model, tokenizer=...)")
    check_tokenizer(tokenizer, name)
    # the class of the checkpoint decides about the architecture, so that the display name is free
    bridge = TransformerBridge.boot_transformers(
        name, hf_model=hf_model.to(device), tokenizer=tokenizer, device=str(device), dtype=dtype
    )
    return bridge.eval()


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Raise when a tokenizer knows no tokens (transformers makes one silently when files are missing)."""
    if len(tokenizer) == 0 or not tokenizer("probe text", add_special_tokens=False)["input_ids"]:
        raise ValueError(
            f"the tokenizer of {name!r} is empty. Save it beside the model with tokenizer.save_pretrained(folder), "
            "or pass one: load_model(..., tokenizer=...)"
        )


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        from sepcap.errors import unknown

        raise unknown("dtype", dtype, DTYPES)
    return DTYPES[dtype]


def _from_name(name: str, dtype: torch.dtype, tokenizer: Any, trust_remote_code: bool, revision: str | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = default_folder() if name == "default" else Path(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"model={name!r} is a folder without config.json: not a model saved by save_pretrained")
        source = str(path)
        if tokenizer is None and not any(path.glob("*token*")) and not any(path.glob("vocab*")) and not any(path.glob("*.model")):
            raise ValueError(
                f"the folder {name!r} has no tokenizer. Save it there with tokenizer.save_pretrained(folder), "
                "or pass one: load_model(..., tokenizer=...)"
            )
        options["local_files_only"] = True
    else:
        source = name
        options |= {"local_files_only": _must_be_local(name, revision), "revision": revision}
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    hf_model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    return hf_model, tokenizer


def _must_be_local(name: str, revision: str | None) -> bool:
    """Whether a hub model is to be read from the cache alone; raises when it is not there and no network is.

    Asking the hub takes about 23 seconds of retries before it fails, so the connection is tried first.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str) if name.count("/") <= 1 else False
    offline = constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE") == "1"
    if not offline:
        host = urlparse(os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or constants.ENDPOINT)
        try:
            socket.create_connection((host.hostname or "", host.port or 443), timeout=3).close()
            return False
        except OSError:
            offline = True
    if cached:
        return True
    raise ConnectionError(
        f"model={name!r} is neither a folder nor in the local Hugging Face cache, and the hub cannot be reached. "
        "Ways out: load_model() for the embedded model; the path of a folder saved by save_pretrained; "
        "HF_HOME pointing at a cache that has it; or a connection (HF_ENDPOINT for a mirror)."
    )
