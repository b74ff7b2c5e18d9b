"""The programs of the compiled models in plain Python: what each answers, and its inputs (METHODS 20)."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

END = "."
"""Last word of an answer of several words."""

GIVEN = "="
"""The word between input and answer; only the words after it are prediction targets."""

Words = Sequence[str]


@dataclass(frozen=True)
class Program:
    """A function from input words to answer words.

    Attributes:
        name: also the first word of its texts, unless `told` is false.
        meaning: description of the answer.
        answer: the function.
        letters: words of the input, each one character.
        longest: maximum number of letters of an input.
        keys: an input begins with one of these, if there are any.
        told: whether the name is the first word of a text; if not, the letters identify the program.
        shortest: minimum number of letters of an input.
        draw: (generator, number of letters) -> letters of a random input; default is uniform.
    """

    name: str
    meaning: str
    answer: Callable[[Words], list[str]]
    letters: str
    longest: int
    keys: str = ""
    told: bool = True
    shortest: int = 1
    draw: Callable[[random.Random, int], Words] | None = None

    def inputs(self, n: int) -> Iterator[tuple[str, ...]]:
        """All inputs of n letters."""
        return itertools.product(*[self.keys] * bool(self.keys), *[self.letters] * n)

    def text(self, given: Words) -> str:
        """The document of an input: program, input, =, answer."""
        return " ".join([*[self.name] * self.told, *given, GIVEN, *self.answer(given)])

    def texts(self, n: int, seed: int) -> list[str]:
        """The distinct texts among n random ones; lengths are uniform."""
        rng = random.Random(f"{self.name} {seed}")
        found = {}
        for _ in range(n):
            length = rng.randint(self.shortest, self.longest)
            letters = self.draw(rng, length) if self.draw else rng.choices(self.letters, k=length)
            found[self.text([*([rng.choice(self.keys)] if self.keys else []), *letters])] = None
        return list(found)


def _rotated(given: Words) -> list[str]:
    letters = given[1:]
    k = int(given[0]) % len(letters)
    return [*letters[k:], *letters[:k], END]


def _recalled(given: Words) -> list[str]:
    before = [i for i, letter in enumerate(given[:-1]) if letter == given[-1]]
    return [given[before[-1] + 1] if before else "none"]


def is_balanced(given: Words) -> bool:
    """Whether every bracket is closed, and none before it is opened.

    >>> is_balanced("(())"), is_balanced("())(")
    (True, False)
    """
    depths = list(itertools.accumulate(1 if bracket == "(" else -1 for bracket in given))
    return min(depths) >= 0 and depths[-1] == 0


def _brackets(rng: random.Random, n: int) -> Words:
    """Balanced in half of the cases: among uniform brackets that is rare."""
    if rng.random() < 0.5:
        return rng.choices("()", k=n)
    word, depth, n = [], 0, n + n % 2
    while len(word) < n:
        opens = depth == 0 or (depth < n - len(word) and rng.random() < 0.5)
        word.append("(" if opens else ")")
        depth += 1 if opens else -1
    return word


@dataclass(frozen=True)
class Pair:
    """Two programs that one model computes, and how they are joined.

    Attributes:
        forget, retain: the programs; which one is to be forgotten is a convention.
        variant: "rotated": the values of every attention head are in a random orthogonal basis; "noisy": neurons and heads without
            effect are added, some of them far more active than the others.
        joined: what the two programs share, and what makes their neurons hard to distinguish.
    """

    forget: Program
    retain: Program
    joined: str
    variant: Literal["", "rotated", "noisy"] = ""


def _sorted(name: str, letters: str, longest: int, reverse: bool = False) -> Program:
    order = "the last letter first" if reverse else "in alphabetical order"
    return Program(name, f"the letters, {order}", lambda x: [*sorted(x, reverse=reverse), END], letters, longest)


def _frequent(letters: str, longest: int, told: bool = True) -> Program:
    meaning = "the most frequent letter; of equally frequent ones, the first in the alphabet"
    return Program("frequent", meaning, lambda x: [min(x, key=lambda letter: (-x.count(letter), letter))], letters, longest, told=told)


_SHIFT = Program(
    "shift", "every letter moved on by k in the alphabet, from the last letter to the first",
    lambda x: [*("abcdef"[("abcdef".index(letter) + int(x[0])) % 6] for letter in x[1:]), END], "abcdef", 5, keys="123",
)  # fmt: skip
_ROTATE = Program("rotate", "the letters, the first k of them moved to the end", _rotated, "abcdef", 5, keys="123")
_REVERSE = Program("reverse", "the letters, the last one first", lambda x: [*reversed(x), END], "abcdefgh", 6)
_DISTINCT = Program("distinct", "how many different letters there are", lambda x: [str(len(set(x)))], "abcdefghi", 8)
_BALANCED = Program(
    "balanced", "whether every bracket is closed, and none before it is opened", lambda x: ["yes" if is_balanced(x) else "no"], "()", 12,
    told=False, draw=_brackets,
)  # fmt: skip
_ADD = Program(
    "add", "the sum of the last two digits, modulo 9", lambda x: [str((int(x[-1]) + int(x[-2])) % 9)], "012345678", 8, shortest=2
)
_RECALL = Program("recall", "the digit after the previous occurrence of the last digit, or none", _recalled, "012345678", 8)

_LATE = "The programs share only the embeddings; both run on every input, and the last layer outputs the one named by the first token."
_GATED = "The end of the answer and the key are shared; the tables of positions are silent while the other program runs."

PAIRS: dict[str, Pair] = {
    "frequent-and-balanced": Pair(
        _frequent("abcdefghij", 12, told=False),
        _BALANCED,
        "Nothing is shared: letters and brackets are different words, and so are the answers.",
    ),
    "shift-and-rotate": Pair(_SHIFT, _ROTATE, _GATED),
    "shift-and-rotate-noisy": Pair(_SHIFT, _ROTATE, _GATED + " Noise is added.", "noisy"),
    "sort-and-reverse": Pair(_sorted("sort", "abcdefgh", 6), _REVERSE, _LATE),
    "sort-and-reverse-rotated": Pair(_sorted("sort", "abcdefgh", 6), _REVERSE, _LATE, "rotated"),
    "up-and-down": Pair(
        _sorted("up", "abcdefghijkl", 5),
        _sorted("down", "abcdefghijkl", 5, reverse=True),
        "Counting the letters that are left is shared; each program has its own copy of the test whether a letter is left.",
    ),
    "add-and-recall": Pair(
        _ADD,
        _RECALL,
        "Reading the last digit is shared; the table of sums runs on every input, and only the last step is silent otherwise.",
    ),
    "distinct-and-frequent": Pair(
        _DISTINCT,
        _frequent("abcdefghi", 8),
        "Counting letters is shared; the neurons of each program are more active while the other one runs.",
    ),
}
"""The compiled models by name."""
