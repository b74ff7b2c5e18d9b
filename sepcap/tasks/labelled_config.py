"""Fields of every study of labelled texts (METHODS 13); imports nothing heavy."""

from dataclasses import dataclass
from typing import Any

from sepcap.checks import check_fields

PER_CATEGORY = 5
"""Default number of texts per category. With 3 every relabelling can be tried, but single dimensions hardly differ from chance."""

PER_CATEGORY_HALVED = 2 * PER_CATEGORY
"""Default number of texts per category if one half is searched and the other tests the result."""

PERMUTATIONS = 20_000
"""Maximum number of relabellings; twelve texts in four categories of three have 15,400, so their test is exact."""


@dataclass(frozen=True)
class LabelledTextsConfig:
    """Which texts are compared, at which tokens, and how often they are relabelled."""

    model: str = "default"
    """"default", a folder, or a hub name."""
    tasks: tuple[Any, ...] = ()
    """Categories: names of tasks (see `sepcap tasks`) or paths (in Python anything that `load_task` takes). Default is prose, language
    reference, Python and C++ of the running Python installation."""
    texts: Any = None
    """Instead of tasks: `LabelledTexts`, category -> list of texts, or category -> task; see `sepcap.load_labelled_texts`."""
    per_category: int = PER_CATEGORY
    """Texts per category, if they are taken from tasks."""
    skip: int = 0
    """Texts per category to skip first: the value of per_category gives texts that another call did not use."""
    context: int | None = None
    """Tokens that every text must fill, and at which the default positions end; default is the model's context, at most 512."""
    positions: tuple[int, ...] | None = None
    """Token positions to use; default is ten, every fourth up to the end of the context."""
    permutations: int = PERMUTATIONS
    """Most relabellings of the texts: all of them if there are no more, else random ones."""
    seed: int = 0
    """Seed of the relabellings, and of the halves of the texts if one half is searched."""
    batch_size: int = 16
    """Texts per forward pass; halved, with a warning, if memory runs out."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.tasks and self.texts is not None:
            raise ValueError(f"tasks={self.tasks} and texts are both given: give one of them")
