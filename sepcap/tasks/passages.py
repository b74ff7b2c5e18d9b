"""Passages: a context, the break after it, and the paragraph that follows (METHODS 14).

A text is tokenised as a whole, so that a break has the tokens that the model usually sees. Many tokenizers have no single token for
"\\n\\n" there: it is two tokens, or shares one with the full stop before it or the indentation after it. Every token that contains a
part of the break then belongs to the break, and to neither of its neighbours.
"""

import re
import reprlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any

from sepcap.checks import checked
from sepcap.tasks.documents import documents_in_turn
from sepcap.tasks.load import load_task

Ids = tuple[int, ...]

LONGEST_TEXT = 40_000
"""Characters of a document that are searched for a passage."""


@dataclass(frozen=True)
class Passage:
    """Token ids of a context, of the break and of the paragraph after it, without BOS.

    Attributes:
        context: tokens before the break.
        gap: tokens of the break.
        following: tokens of the paragraph after it.
        kind: kind of text, for grouping results.
    """

    context: Ids
    gap: Ids
    following: Ids
    kind: str = "texts"


def check_passage(passage: Passage, called: str, vocabulary: int) -> Passage:
    """Check a passage, and return it with plain whole numbers.

    Args:
        passage: made by the user.
        called: its name in errors.
        vocabulary: number of tokens in the model's vocabulary.

    Raises:
        TypeError: token ids that are not whole numbers.
        ValueError: no break, no paragraph after it, or a token outside the model's vocabulary.
    """
    parts: dict[str, Ids] = {}
    for name in ("context", "gap", "following"):
        given: Any = getattr(passage, name)
        try:
            parts[name] = tuple(map(index, given))
        except TypeError:
            shown = reprlib.repr(given)
            raise TypeError(f"{called}.{name}={shown}: give token ids, whole numbers; `passages` makes them from texts") from None
        if not parts[name] and name != "context":
            raise ValueError(f"{called}.{name} is empty: a passage needs at least one token of a break and one after it")
        if wrong := [token for token in parts[name] if not 0 <= token < vocabulary]:
            raise ValueError(f"{called}.{name} contains {wrong[0]}: this model's tokens are 0 to {vocabulary - 1}")
    return Passage(**parts, kind=passage.kind)


def passages(
    tokenizer: Any, texts: Sequence[Any], at: str = "\n\n", *, most: int | None = None, which: int = -1, kind: str = "texts"
) -> list[Passage]:
    """One passage from every text.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        texts: each with at least one break followed by text.
        at: the break; line ends directly after it belong to it.
        most: maximum tokens of the paragraph after the break.
        which: which of the breaks followed by a paragraph: 0 the first, -1 the last.
        kind: of all passages.

    Raises:
        TypeError: a text that is not a string.
        ValueError: a text without such a break.

    Example:
        >>> passages(model.tokenizer, ["One paragraph.\\n\\nAnother."])[0].gap  # doctest: +SKIP
        (202, 202)
    """
    found = []
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{i}] is a {type(text).__name__}, not a text")
        whole = list(_passages_in(tokenizer, text, at, kind))
        if not whole:
            shown = text if len(text) <= 60 else f"{text[:60]}…"
            raise ValueError(f"texts[{i}] has no {at!r} with text before and after it: {shown!r}")
        if not -len(whole) <= which < len(whole):
            raise ValueError(f"which={which}: texts[{i}] has {len(whole)} {at!r} followed by a paragraph")
        found.append(replace(whole[which], following=whole[which].following[:most]))
    return found


@checked()
def sample_passages(
    tokenizer: Any, tasks: str | Iterable[Any], n: int, *, context: int = 128, following: int = 48, at: str = "\n\n"
) -> list[Passage]:
    """Passages of given lengths from the evaluation part of tasks, at most one per document.

    From every document, the first break with enough tokens before it and in the paragraph after it is used; the context is cut to its
    last `context` tokens, the paragraph to its first `following`. The embedded model was not trained on any text of that part.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        tasks: a task or several, as `load_task` takes them; the name of the task is the kind of its passages.
        n: passages per task.
        context: tokens before the break.
        following: tokens after it.
        at: the break; see `passages`.

    Raises:
        ValueError: a task with fewer such passages.

    Example:
        >>> sepcap.sample_passages(model.tokenizer, ["local-prose", "local-cpp"], 32)  # doctest: +SKIP
    """
    drawn: list[Passage] = []
    for task in [tasks] if isinstance(tasks, str) else tasks:
        task = load_task(task)
        found: list[Passage] = []
        for _, text in documents_in_turn(task, "evaluate"):
            every = _passages_in(tokenizer, text[:LONGEST_TEXT], at, task.name)
            fitting = (p for p in every if len(p.context) >= context and len(p.following) >= following)
            if (first := next(fitting, None)) is not None:
                found.append(Passage(first.context[-context:], first.gap, first.following[:following], task.name))
            if len(found) == n:
                break
        if len(found) < n:
            raise ValueError(
                f"task {task.name!r} has {len(found)} documents with a {at!r} after {context} tokens and before a paragraph of "
                f"{following}, and n={n} were asked for: ask for fewer or shorter passages"
            )
        drawn += found
    return drawn


def _passages_in(tokenizer: Any, text: str, at: str, kind: str) -> Iterator[Passage]:
    """A passage for every break with text before and after it."""
    if not at:
        raise ValueError("at is empty: give the text of a break")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"the tokenizer is a {type(tokenizer).__name__}, which does not give the offsets of its tokens; load a fast one")
    breaks = list(re.finditer(rf"{re.escape(at)}\n*", text))
    if not breaks:
        return
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False)
    ids, places = encoded["input_ids"], encoded["offset_mapping"]
    starts, ends = [start for start, _ in places], [end for _, end in places]
    for i, found in enumerate(breaks):
        # all tokens that contain a character of the break
        first, last = bisect_right(ends, found.start()), bisect_left(starts, found.end())
        until = breaks[i + 1].start() if i + 1 < len(breaks) else len(text)
        stop = bisect_right(ends, until)
        if first < last and text[: found.start()].strip() and text[found.end() : until].strip() and first > 0 and last < stop:
            yield Passage(tuple(ids[:first]), tuple(ids[first:last]), tuple(ids[last:stop]), kind)
