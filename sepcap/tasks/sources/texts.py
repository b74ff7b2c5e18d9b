"""A user's own texts as the source of a task: each document is in one of two parts, determined by its content."""

import hashlib
from typing import Any

from sepcap.errors import unknown
from sepcap.tasks.sources.files import checked_text, choose_column
from sepcap.tasks.sources.given import plain
from sepcap.tasks.task import PARTS, Split


class DataSource:
    """A user's own texts: distinct documents in the order of a hash of their content, whose parity determines the part.

    The same text is thus in the same part of every task. Only if that would leave one part with less than a
    third of the documents (when there are few), they are assigned to the parts in turn.

    Texts that differ only in white space are one document. A single document is cut in two near its middle, at a line
    break if there is one in the middle half, else at a space.
    """

    def __init__(self, dataset: Any, column: str | None = None, called: str = "the dataset") -> None:
        import datasets

        dataset = plain(dataset)
        column = text_column(dataset, column)
        texts = dataset[column]
        distinct: dict[str, tuple[bytes, int]] = {}
        for i, text in enumerate(texts):
            words = words_digest(checked_text(text, f"row {i}", column))
            if words is not None:
                key = words.hex()
                # of variants in white space the one with the smallest hash is kept, so that their order does not matter
                distinct[key] = min(distinct.get(key, (b"\xff" * 33, i)), (_digest(text), i))
        if not distinct:
            raise ValueError(f"{called} has no text: {len(dataset)} rows, none with text in column {column!r}")
        ranked = sorted(distinct.items())
        self.fingerprint = hashlib.sha256("".join(key for key, _ in ranked).encode()).hexdigest()[:16]
        # with the white space and the row numbers, which a sample depends on too
        self.content = hashlib.sha256(repr([variant for _, variant in ranked]).encode()).hexdigest()
        if len(ranked) == 1:
            i = ranked[0][1][1]
            halves = _halves(texts[i])
            self._rows = {"collect": [i], "evaluate": [i]}
            self._parts = {s: datasets.Dataset.from_dict({"text": [t]}) for s, t in zip(self._rows, halves, strict=True)}
            return
        # by the hash of the text alone, so that a text that is in two tasks is in the same part of both
        self._rows = {split: [i for key, (_, i) in ranked if int(key, 16) % 2 == parity] for parity, split in enumerate(PARTS)}
        if min(map(len, self._rows.values())) < max(2, len(ranked) / 3):
            # the hashes of a few texts can put nearly all into one part: assign them in turn
            rows = [i for _, (_, i) in ranked]
            self._rows = {"collect": rows[0::2], "evaluate": rows[1::2]}
        texts_only = dataset.select_columns([column])
        if column != "text":
            texts_only = texts_only.rename_column(column, "text")
        self._parts = {split: texts_only.select(chosen) for split, chosen in self._rows.items()}

    def documents(self, split: Split) -> Any:
        """The documents of one part."""
        if split not in self._parts:
            raise unknown("split", split, self._parts, "Only the local tasks have a train split.")
        return self._parts[split]

    def indices(self, split: Split, n: int) -> list[int] | str:
        """Row numbers in the user's dataset."""
        return self._rows[split][:n]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def words_digest(text: str) -> bytes | None:
    """Hash of the words of a text joined by single spaces, in pieces so that a long text takes little memory; None if it has no word.

    >>> words_digest(" two  words\\n") == hashlib.sha256(b"two words").digest()
    True
    """
    digest, empty, apart = hashlib.sha256(), True, False
    for start in range(0, len(text), 2**20):
        piece = text[start : start + 2**20]
        if words := piece.split():
            if not empty and (apart or piece[0].isspace()):
                digest.update(b" ")
            digest.update(" ".join(words).encode())
            empty = False
        apart = piece[-1].isspace()
    return None if empty else digest.digest()


def _halves(text: str) -> tuple[str, str]:
    middle, quarter = len(text) // 2, len(text) // 4
    for separator in ("\n", " "):
        breaks = [text.rfind(separator, quarter, middle), text.find(separator, middle, middle + quarter)]
        if max(breaks) >= 0:
            at = min((b for b in breaks if b >= 0), key=lambda b: abs(b - middle))
            return text[:at], text[at + 1 :]
    return text[:middle], text[middle:]


def text_column(dataset: Any, column: str | None) -> str:
    """The column with the texts; an error lists the existing columns."""
    names = list(dataset.column_names)
    strings = [n for n in names if getattr(dataset.features[n], "dtype", "") in ("string", "large_string")]
    images = [n for n in names if type(dataset.features[n]).__name__ == "Image"]
    if column is None and "text" not in names and len(strings) != 1 and images:
        raise ValueError(
            f"column {images[0]!r} contains images: a Dataset of images has them in a column 'image' and the classes, as whole numbers, "
            f"in a column 'label' (dataset.rename_columns({{{images[0]!r}: 'image', …: 'label'}})); the columns are {names}"
        )
    return choose_column(names, strings, column)
