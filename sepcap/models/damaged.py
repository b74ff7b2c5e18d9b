"""One sentence for a model that a library cannot read, with the file, the field and the cause, whatever the library says of it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sepcap.checks import shown, warn
from sepcap.errors import CorruptFile
from sepcap.models.forward import is_out_of_memory

SAVE = "save it beside the model with save_pretrained(folder), or pass one: load_model(..., tokenizer=...) (or processor=)"

RIGHT = {
    "tokenizer": SAVE,
    "image processor": SAVE,
    "weights": "save or download them again",
    "configuration": "save it again with save_pretrained(folder)",
}
"""Part of a model -> what to do where it cannot be read."""

OTHER_KINDS = ("architectures", "model_type", "transformers_version", "auto_map")
"""Fields without which a config.json would be that of another model."""

LONGEST = 300
"""Characters of a library's own words that are quoted."""


@contextmanager
def reading(source: str, part: str, attempt: Callable[[dict[str, Any]], Any] | None = None) -> Iterator[None]:
    """Turn what a library raises inside into one sentence; a missing package, a hub out of reach and full memory stay what they are.

    Args:
        source: folder or name of the model.
        part: of the model that is read, see `RIGHT`.
        attempt: function that makes of config.json what could not be made, and returns the configuration: to find the field to blame.

    Raises:
        CorruptFile: anything else.
    """
    try:
        yield
    except (CorruptFile, ImportError):
        raise
    except Exception as error:
        folder = Path(source)
        foreign_code = "trust_remote_code" in str(error)  # which is not run unless it is asked for: transformers says how
        if foreign_code or is_out_of_memory(error) or (isinstance(error, OSError) and not folder.is_dir()):
            raise
        cause = _damaged_file(folder, part) or cause_of(error)
        found = _field_to_blame(folder, attempt, cause) if attempt and folder.is_dir() else None
        if found is None:
            said = f"its {part} cannot be read ({cause}); {RIGHT[part]}"
        elif not found:
            said = f"no model can be made of what its config.json says ({cause})"
        else:
            said = f"config.json says {found[0]}, with which no model can be made ({cause}); {found[1]}"
        raise CorruptFile(f"model={source!r}: {said}") from error


def cause_of(error: BaseException) -> str:
    """The first sentences of an error, in one line; with its class where the text alone would say little."""
    first, *others = " ".join(str(error).split()).rstrip(".").split(". ")
    for other in others:
        if len(first) + len(other) > LONGEST:
            break
        first = f"{first}. {other}"
    return first if " " in first else f"{type(error).__name__}: {first}".rstrip(": ")


def _damaged_file(folder: Path, part: str) -> str:
    """The file of a tokenizer that cannot be read by itself, and why."""
    if part != "tokenizer":
        return ""
    for path in sorted(folder.glob("*token*.json")):
        try:
            json.loads(path.read_bytes())
            if path.name == "tokenizer.json":
                from tokenizers import Tokenizer

                Tokenizer.from_file(str(path))
        except Exception as error:  # the library has no class of its own for it
            return f"{path.name}: {' '.join(str(error).split())[:LONGEST]}"
    return ""


def _field_to_blame(folder: Path, attempt: Callable[[dict[str, Any]], Any], cause: str) -> tuple[str, ...] | None:
    """What config.json says in the one field without which a model can be made, and what would be right there.

    Returns:
        Both in words; nothing where no field alone is to blame; None where a model can be made of it as it is.
    """
    config = json.loads((folder / "config.json").read_bytes())
    # most errors have the field or its value in them
    for name in (None, *sorted(config, key=lambda field: field not in cause and str(config[field]) not in cause)):
        if name in OTHER_KINDS:
            continue
        try:
            made = attempt({other: config[other] for other in config if other != name})
        except Exception:  # not this one, or not this one alone
            continue
        if name is None:
            return None
        default = getattr(made, name, None)
        right = "leave it out" if default is None else f"right would be {default!r}, the default of {type(made).__name__}, or its like"
        return f"{name}={shown(config[name])}", right
    return ()


def check_weights(source: str, config: Any, loading: dict[str, Any]) -> None:
    """Raise where the weights that were read are not those of the model that config.json says; warn of those without a place.

    Args:
        source: folder or name of the model.
        config: its configuration.
        loading: what `from_pretrained(..., output_loading_info=True)` says.

    Raises:
        ValueError: weights that are missing or of another shape, or further layers.
    """
    missing, unused = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    architecture = (config.architectures or [config.model_type])[0]
    if loading["mismatched_keys"]:
        name, have, wanted = min(loading["mismatched_keys"])
        fits, says = next(((a, b) for a, b in zip(have, wanted, strict=False) if a != b), (0, 0))
        fields = [field for field, value in config.to_dict().items() if type(value) is int and value == says > 1]
        raise ValueError(
            f"model={source!r}: {name} is {list(have)} in the weights and {list(wanted)} by config.json"
            + (f", which says {fields[0]}={says} where {fits} would fit" if len(fields) == 1 else "")
        )
    if missing:
        others = f", and holds others, such as {unused[0]}" if unused else ""
        raise ValueError(
            f"model={source!r} lacks weights of its architecture, {architecture}, which would be random numbers: {_some(missing)}{others}"
        )
    layers = getattr(config, "num_hidden_layers", None)
    further = [name for name in unused if any(part.isdigit() and int(part) == layers for part in name.split("."))]
    if further:
        field = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        raise ValueError(f"model={source!r}: config.json says {field}={layers}, but the weights have further layers: {_some(further)}")
    if unused:
        warn(f"model={source!r} holds weights that its architecture, {architecture}, has no place for; they are left out: {_some(unused)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def on_meta(auto_class: Any, config: dict[str, Any]) -> Any:
    """The configuration of a config.json, once a model without weights has been made of it."""
    from transformers import AutoConfig

    made = AutoConfig.for_model(**config)
    if auto_class is not None:
        with torch.device("meta"):
            auto_class.from_config(made)
    return made
