"""The control of every study of a trained model: the same configuration before training (METHODS 12)."""

import copy
from collections.abc import Callable
from typing import Any

import torch

from sepcap.models.forward import device_of
from sepcap.models.kinds import check_wraps, inner
from sepcap.models.loading.load import load_model


def untrained(model: Any) -> Callable[[int], Any]:
    """Function from a seed to a randomly initialised model of the same configuration, precision, device and tokenizer.

    The weights are those of `load_model(name, random_weights=True, seed=seed)`. The function keeps no reference to the model, so that
    its memory can be freed before the control is made.

    Args:
        model: a hooked model; it is not changed.

    Raises:
        NotImplementedError: a HookedTransformer, which keeps no configuration of a Hugging Face model.

    Source: [MOD].

    Example:
        >>> control = untrained(sepcap.load_model())(0)  # doctest: +SKIP
    """
    check_wraps(model, "a control with random weights")
    hf_model = inner(model)
    config = copy.deepcopy(hf_model.config)
    config.output_attentions = False
    beside = {"tokenizer": model.tokenizer, "processor": getattr(model, "processor", None)}
    where = {"device": device_of(model), "dtype": next(hf_model.parameters()).dtype}
    kind, name = type(hf_model), str(model.cfg.model_name)

    def initialised(seed: int) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            fresh = kind(copy.deepcopy(config))
        made = load_model(fresh, **beside, **where)
        made.cfg.model_name = f"{name}, random weights (seed {seed})"
        return made

    return initialised
