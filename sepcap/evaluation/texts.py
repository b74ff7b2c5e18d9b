"""Similarity of two texts: cosine distance of their embeddings, and the tokens that they share (METHODS 14).

The published numbers use sentence embeddings. If no model for them is available, TF-IDF vectors are used instead: they measure shared
words and ignore their meaning. Results state which was used, and the two are not compared.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sepcap.checks import checked
from sepcap.errors import missing_extra

Embedder = Callable[[list[str]], Any]
"""A vector for each of a list of texts: an array [text, dimension]."""

Fit = Callable[[Sequence[str]], Embedder]
"""Returns an embedder, given all the texts that will be compared; only TF-IDF uses them."""

TF_IDF = "tf-idf"
TF_IDF_NAME = "TF-IDF (scikit-learn, no sentence embeddings)"
SENTENCES = "sentence-transformers/all-mpnet-base-v2"
"""The sentence embedder of [PAR], used by "auto" if it is on this machine."""

PROBES = ("The fox ran over the hill. It was late, and nobody saw it.", "def add(a, b):\n    return a + b  # 12.5", "no", "Größe: 1 − x²")
"""Texts whose distances distinguish embedders."""


@checked()
def get_embedder(embedder: str | Path | Embedder | None) -> tuple[Fit | None, str | None]:
    """Function that returns an embedder for the texts to be compared, and the name of the embedder in results.

    Args:
        embedder: "auto": `SENTENCES` if sentence-transformers is installed and has it on this machine, else "tf-idf"; nothing
            is downloaded. "tf-idf": word weights of scikit-learn, fitted to all the texts that are compared, true and generated, so
            that every word has a weight. The folder or name of a sentence-transformers
            model. A function from a list of texts to an array [text, dimension]. None: no distances.

    Raises:
        ImportError: sentence-transformers or scikit-learn is missing.
        OSError: a model that cannot be loaded.
    """
    if embedder is None:
        return None, None
    if callable(embedder):
        return lambda texts: embedder, f"function {getattr(embedder, '__name__', type(embedder).__name__)}"
    if embedder == "auto":
        at_hand = _sentences(SENTENCES, local=True) if find_spec("sentence_transformers") else None
        return (lambda texts: at_hand, SENTENCES) if at_hand else (_tf_idf(), TF_IDF_NAME)
    if embedder == TF_IDF:
        return _tf_idf(), TF_IDF_NAME
    if not find_spec("sentence_transformers"):
        raise missing_extra("sentence-transformers", "embeddings", f"embedder={str(embedder)!r}")
    loaded = _sentences(str(embedder), local=Path(embedder).is_dir())
    if loaded is None:
        raise OSError(
            f"embedder={str(embedder)!r} is not the folder or name of a sentence-transformers model that can be loaded here; "
            f"embedder={TF_IDF!r} needs no model and no network"
        )
    return lambda texts: loaded, Path(embedder).name if Path(embedder).is_dir() else str(embedder)


def _sentences(name: str, *, local: bool) -> Embedder | None:
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(name, local_files_only=local)
    except (OSError, ValueError):
        return None
    return lambda texts: model.encode(texts, show_progress_bar=False)


def _tf_idf() -> Fit:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise missing_extra("scikit-learn", "embeddings", f"embedder={TF_IDF!r}") from error

    def fit(texts: Sequence[str]) -> Embedder:
        # numbers and punctuation count as words: without them little would be left of code
        vectors = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", sublinear_tf=True).fit(texts)
        return lambda some: vectors.transform(some).toarray()

    return fit


def probe(fit: Fit) -> list[float]:
    """Cosine distances of all pairs of `PROBES`, to three decimals: they are the same for embedders that measure the same distances.

    The numbers are few and coarse, so that rounding differences between machines or numbers of threads do not change them.

    Raises:
        ValueError: an embedder that does not return one finite vector per text.
    """
    first, second = zip(*combinations(embed(fit(PROBES), PROBES), 2), strict=True)
    return [round(float(distance), 3) + 0.0 for distance in cosine_distance(np.stack(first), np.stack(second))]


def embed(embedder: Embedder, texts: Sequence[str]) -> Float[np.ndarray, "text dimension"]:
    """Vectors of texts, each distinct text embedded once.

    Raises:
        ValueError: an embedder that does not return one finite vector per text.
    """
    distinct = list(dict.fromkeys(texts))
    vectors = np.asarray(embedder(distinct), dtype=np.float64)
    if vectors.ndim != 2 or len(vectors) != len(distinct) or not np.isfinite(vectors).all():
        raise ValueError(
            f"embedder returned shape {vectors.shape} for {len(distinct)} texts; it must give one vector of finite numbers for each"
        )
    place = {text: i for i, text in enumerate(distinct)}
    return vectors[[place[text] for text in texts]]


def cosine_distance(a: Float[np.ndarray, "text dimension"], b: Float[np.ndarray, "text dimension"]) -> Float[np.ndarray, " text"]:
    """1 − cos of the vectors of each row; 1 if one of them is zero.

    >>> cosine_distance(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[2.0, 0.0], [0.0, 0.0]])).tolist()
    [0.0, 1.0]
    """
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return 1 - np.divide((a * b).sum(1), norms, out=np.zeros(len(a)), where=norms > 0)


def unigram_f1(found: Sequence[int], true: Sequence[int]) -> float:
    """Twice the number of shared tokens, counted with multiplicity, over the number of tokens of both.

    >>> unigram_f1([1, 1, 2], [1, 3, 1])
    0.6666666666666666
    """
    if not found or not true:
        return 0.0
    return 2 * sum((Counter(found) & Counter(true)).values()) / (len(found) + len(true))


def bigrams_found(found: Sequence[int], true: Sequence[int]) -> float:
    """Share of the distinct pairs of neighbouring tokens of `true` that are in `found`; NaN if `true` has none.

    >>> bigrams_found([1, 2, 3, 4], [3, 4, 5])
    0.5
    """
    wanted = set(pairwise(true))
    return len(wanted & set(pairwise(found))) / len(wanted) if wanted else float("nan")
