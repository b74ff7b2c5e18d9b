"""Kinds of models: what they predict (next tokens, masked tokens or the label of an image), and the model inside a bridge."""

from typing import Any, Literal

Kind = Literal["causal", "masked", "images"]

AUTO_CLASSES: dict[Kind, str] = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "images": "AutoModelForImageClassification",
}
"""The class of transformers that loads a kind of model."""

ENDINGS: dict[str, Kind] = {"ForMaskedLM": "masked", "ForImageClassification": "images"}
"""Ending of a class name -> kind; every other class that predicts tokens is causal."""

BARE = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForPreTraining")
"""Endings of classes without a head, or with one that sepcap has no evaluation for."""


def kind_of_class(name: str) -> Kind:
    """The kind of a class of transformers, by its name."""
    found: list[Kind] = [kind for ending, kind in ENDINGS.items() if name.endswith(ending)]
    return found[0] if found else "causal"


def inner(model: Any) -> Any:
    """The Hugging Face model that a bridge wraps; a HookedTransformer of transformer-lens 3 wraps none and is returned itself."""
    return getattr(model, "original_model", model)


def is_hooked_transformer(model: Any) -> bool:
    """Whether a model is of the class that transformer-lens had until 3.9; by name, because later versions raise on access to it."""
    return any(base.__name__ == "HookedTransformer" for base in type(model).__mro__)


def check_wraps(model: Any, what: str) -> None:
    """Raise if something needs the Hugging Face model inside and there is none.

    Raises:
        NotImplementedError: a HookedTransformer.
    """
    if is_hooked_transformer(model):
        raise NotImplementedError(
            f"{what} needs the Hugging Face model, which a HookedTransformer does not keep; load its checkpoint through "
            "sepcap.load_model(folder or name) instead, and make the same edits there"
        )


def architecture_of(model: Any) -> str:
    """Name of a hooked model's architecture, for messages."""
    return getattr(model.cfg, "architecture", None) or getattr(model.cfg, "original_architecture", None) or type(model).__name__


def kind_of(model: Any) -> Kind:
    """What a hooked model predicts.

    Example:
        >>> kind_of(sepcap.load_model())  # doctest: +SKIP
        'causal'
    """
    # a user's subclass predicts what its base class does, whatever its name
    found: list[Kind] = [kind_of_class(base.__name__) for base in type(inner(model)).__mro__]
    special: list[Kind] = [kind for kind in found if kind != "causal"]
    return special[0] if special else "causal"


def kind_of_config(config: Any, name: str) -> Kind:
    """What a model in a folder or on the hub predicts, by the class that its configuration names.

    Raises:
        ValueError: a class without a head, or with one for another purpose.
    """
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if architecture.endswith(BARE) and not architecture.endswith("LMHeadModel"):
        raise ValueError(
            f"model={name!r} is a {architecture}, which predicts neither tokens nor labels of images; sepcap loads causal and masked "
            "language models (…ForCausalLM, …ForMaskedLM) and image classifiers (…ForImageClassification)"
        )
    return kind_of_class(architecture)
