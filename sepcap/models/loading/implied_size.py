"""Whether a model can be as large as its configuration states, checked before anything of that size is made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sepcap.errors import CorruptFile
from sepcap.storage import open_regular

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
WIDTH = ("hidden_size", "n_embd", "d_model", "dim", "n_hidden")
VOCABULARY = ("vocab_size",)
HEADS = ("num_attention_heads", "n_head", "n_heads")
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx")
"""Names that architectures use for these numbers in their config.json."""

MOST_CONFIG = 16 * 2**20
"""Size of the longest config.json of a model, in bytes."""

SLACK = 100
"""Most parameters per byte of weights: far more than quantised and shared weights reach."""

MOST = 10**14
"""Most parameters if there are no weights to compare with."""


def check_size(folder: Path, bytes_of_weights: int) -> None:
    """Reject a folder whose config.json implies far more parameters than its weights contain, or none at all.

    Width² parameters are counted per layer, and width per token: fewer than any architecture has, so that only a damaged or crafted
    file is rejected.

    Args:
        folder: in Hugging Face format.
        bytes_of_weights: size of its weights; 0 if there are none.

    Raises:
        CorruptFile: config.json is not a regular file, too large, not JSON, or implies an impossible size.
    """
    path = folder / "config.json"
    with open_regular(path, "config.json of a model") as file:
        data = file.read(MOST_CONFIG + 1)
    if len(data) > MOST_CONFIG:
        raise CorruptFile(f"{path} is too large for the configuration of a model")
    try:
        config = json.loads(data)
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__} instead of the fields of a configuration")
        layers, width, tokens = (_largest(config, names) for names in (LAYERS, WIDTH, VOCABULARY))
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{path} is corrupt ({'it is nested too deeply' if isinstance(error, RecursionError) else error})") from error
    for name in (*LAYERS, *WIDTH, *VOCABULARY, *HEADS, *POSITIONS):
        if isinstance(value := config.get(name), int) and value < 1:
            raise CorruptFile(f"{path} has {name}={value}: give a whole number, 1 or more")
    implied = layers * width**2 + tokens * width
    if implied > (SLACK * bytes_of_weights or MOST):
        there = f"the weights next to it have {bytes_of_weights:,} bytes" if bytes_of_weights else "there are no weights next to it"
        raise CorruptFile(
            f"{path} implies at least {implied:.2g} parameters ({layers:,} layers of width {width:,}, {tokens:,} tokens), but {there}: "
            "it is damaged, or belongs to another model"
        )


def _largest(config: Any, names: tuple[str, ...]) -> int:
    """The largest of the numbers with these names, at any depth of a configuration; 0 if there is none."""
    if not isinstance(config, Mapping):
        return 0
    own = [value for name in names if isinstance(value := config.get(name), int)]
    return max([0, *own, *(_largest(value, names) for value in config.values() if isinstance(value, Mapping))])
