"""One-sentence errors for models that a library cannot read, with the file, the field and the cause."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sepcap.checks import shown
from sepcap.errors import CorruptFile, warn
from sepcap.models.forward import is_out_of_memory

SAVE = "save it next to the model with save_pretrained(folder), or pass one: load_model(..., tokenizer=...) (or processor=)"

RIGHT = {
    "tokenizer": SAVE,
    "image processor": SAVE,
    "weights": "save or download them again",
    "configuration": "save it again with save_pretrained(folder)",
}
"""Part of a model -> what to do if it cannot be read."""

OTHER_KINDS = ("architectures", "model_type", "transformers_version", "auto_map")
"""Fields without which a config.json would describe another model."""

LONGEST = 300
"""Most characters quoted from a library's error."""


@contextmanager
def reading(source: str, part: str, attempt: Callable[[dict[str, Any]], Any] | None = None) -> Iterator[None]:
    """Turn a library's error into one sentence; errors of a missing package, an unreachable hub or full memory pass unchanged.

    Args:
        source: folder or name of the model.
        part: part of the model that is read, see `RIGHT`.
        attempt: function that builds from config.json what could not be built, and returns the configuration: to find the faulty field.

    Raises:
        CorruptFile: any other error.
    """
    try:
        yield
    except (CorruptFile, ImportError):
        raise
    except Exception as error:
        folder = Path(source)
        foreign_code = "trust_remote_code" in str(error)  # it is run only on request: transformers' error states how
        if foreign_code or is_out_of_memory(error) or (isinstance(error, OSError) and not folder.is_dir()):
            raise
        cause = _damaged_file(folder, part) or cause_of(error)
        found = _field_to_blame(folder, attempt, cause) if attempt and folder.is_dir() else None
        if found is None:
            said = f"its {part} cannot be read ({cause}); {RIGHT[part]}"
        elif not found:
            said = f"no model can be built from its config.json ({cause})"
        else:
            said = f"config.json has {found[0]}, with which no model can be built ({cause}); {found[1]}"
        raise CorruptFile(f"model={source!r}: {said}") from error


def cause_of(error: BaseException) -> str:
    """The first sentences of an error, in one line; with its class if the text is a single word."""
    first, *others = " ".join(str(error).split()).rstrip(".").split(". ")
    for other in others:
        if len(first) + len(other) > LONGEST:
            break
        first = f"{first}. {other}"
    return first if " " in first else f"{type(error).__name__}: {first}".rstrip(": ")


def _damaged_file(folder: Path, part: str) -> str:
    """The unreadable file of a tokenizer, and why it cannot be read."""
    if part != "tokenizer":
        return ""
    for path in sorted(folder.glob("*token*.json")):
        try:
            json.loads(path.read_bytes())
            if path.name == "tokenizer.json":
                from tokenizers import Tokenizer

                Tokenizer.from_file(str(path))
        except Exception as error:  # the library has no exception class of its own for it
            return f"{path.name}: {' '.join(str(error).split())[:LONGEST]}"
    return ""


def _field_to_blame(folder: Path, attempt: Callable[[dict[str, Any]], Any], cause: str) -> tuple[str, ...] | None:
    """The one field of config.json without which a model can be built, with its value, and a valid value.

    Returns:
        Both in words; empty if no single field is at fault; None if a model can be built from config.json unchanged.
    """
    config = json.loads((folder / "config.json").read_bytes())
    # most errors mention the field or its value
    for name in (None, *sorted(config, key=lambda field: field not in cause and str(config[field]) not in cause)):
        if name in OTHER_KINDS:
            continue
        try:
            made = attempt({other: config[other] for other in config if other != name})
        except Exception:  # not this field, or not this field alone
            continue
        if name is None:
            return None
        default = getattr(made, name, None)
        right = "leave it out" if default is None else f"a valid value is {default!r}, the default of {type(made).__name__}"
        return f"{name}={shown(config[name])}", right
    return ()


def check_weights(source: str, config: Any, loading: dict[str, Any]) -> None:
    """Raise if the weights do not match the model in config.json; warn of weights that the model does not use.

    Args:
        source: folder or name of the model.
        config: its configuration.
        loading: loading info of `from_pretrained(..., output_loading_info=True)`.

    Raises:
        ValueError: weights that are missing or of another shape, or surplus layers.
    """
    missing, unused = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    architecture = (config.architectures or [config.model_type])[0]
    if loading["mismatched_keys"]:
        name, have, wanted = min(loading["mismatched_keys"])
        fits, says = next(((a, b) for a, b in zip(have, wanted, strict=False) if a != b), (0, 0))
        fields = [field for field, value in config.to_dict().items() if type(value) is int and value == says > 1]
        raise ValueError(
            f"model={source!r}: {name} is {list(have)} in the weights but {list(wanted)} by config.json"
            + (f", which has {fields[0]}={says} where {fits} would fit" if len(fields) == 1 else "")
        )
    if missing:
        others = f"; it has others, such as {unused[0]}" if unused else ""
        raise ValueError(
            f"model={source!r} lacks weights of its architecture, {architecture}, which would be random numbers: {_some(missing)}{others}"
        )
    layers = getattr(config, "num_hidden_layers", None)
    further = [name for name in unused if any(part.isdigit() and int(part) == layers for part in name.split("."))]
    if further:
        field = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        raise ValueError(f"model={source!r}: config.json has {field}={layers}, but the weights have further layers: {_some(further)}")
    if unused:
        warn(f"model={source!r} has weights that its architecture, {architecture}, does not use; they are ignored: {_some(unused)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def on_meta(auto_class: Any, config: dict[str, Any]) -> Any:
    """The configuration of a config.json, after a model without weights has been built from it."""
    from transformers import AutoConfig

    made = AutoConfig.for_model(**config)
    if auto_class is not None:
        with torch.device("meta"):
            auto_class.from_config(made)
    return made
