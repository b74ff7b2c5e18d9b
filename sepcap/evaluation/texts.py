"""How like two texts are: cosine distance of their embeddings, and the tokens that they share (METHODS 14).

Sentence embeddings are what the published numbers are made of. Where no model for them is at hand, TF-IDF vectors stand in: they see words
that both texts have, and nothing of what the words mean. Results carry the name of what was used, and the two are not compared.
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
"""From all the texts that will be compared to what embeds them; only TF-IDF looks at them."""

TF_IDF = "tf-idf"
TF_IDF_NAME = "TF-IDF (scikit-learn, no sentence embeddings)"
SENTENCES = "sentence-transformers/all-mpnet-base-v2"
"""The sentence embedder of [PAR], taken by "auto" where it lies on this machine."""

PROBES = ("The fox ran over the hill. It was late, and nobody saw it.", "def add(a, b):\n    return a + b  # 12.5", "no", "Größe: 1 − x²")
"""Texts whose distances tell embedders apart."""


@checked()
def get_embedder(embedder: str | Path | Embedder | None) -> tuple[Fit | None, str | None]:
    """What makes an embedder of the texts that are to be compared, and the name that results give it.

    Args:
        embedder: "auto": `SENTENCES` where sentence-transformers is installed and has it on this machine, else "tf-idf"; nothing
            is downloaded. "tf-idf": word weights of scikit-learn, fitted to all the texts that are compared, true and written, so that
            no word is without a weight. The folder or name of a sentence-transformers
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
            f"embedder={str(embedder)!r} is no folder or name of a sentence-transformers model that can be loaded here; "
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
        # numbers and marks are words too: of code little else would be left
        vectors = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", sublinear_tf=True).fit(texts)
        return lambda some: vectors.transform(some).toarray()

    return fit


def probe(fit: Fit) -> list[float]:
    """Cosine distances of every two of `PROBES`, to three decimals: embedders that measure the same distances have the same ones.

    Few and coarse numbers, so that what another machine or number of threads rounds otherwise does not make another embedder of it.

    Raises:
        ValueError: an embedder that does not give one finite vector per text.
    """
    first, second = zip(*combinations(embed(fit(PROBES), PROBES), 2), strict=True)
    return [round(float(distance), 3) + 0.0 for distance in cosine_distance(np.stack(first), np.stack(second))]


def embed(embedder: Embedder, texts: Sequence[str]) -> Float[np.ndarray, "text dimension"]:
    """Vectors of texts, each different text embedded once.

    Raises:
        ValueError: an embedder that does not give one finite vector per text.
    """
    distinct = list(dict.fromkeys(texts))
    vectors = np.asarray(embedder(distinct), dtype=np.float64)
    if vectors.ndim != 2 or len(vectors) != len(distinct) or not np.isfinite(vectors).all():
        raise ValueError(
            f"embedder gave an array of shape {vectors.shape} for {len(distinct)} texts; it must give one vector of finite numbers for each"
        )
    place = {text: i for i, text in enumerate(distinct)}
    return vectors[[place[text] for text in texts]]


def cosine_distance(a: Float[np.ndarray, "text dimension"], b: Float[np.ndarray, "text dimension"]) -> Float[np.ndarray, " text"]:
    """1 − cos of the vectors of each row; 1 where one of them is zero.

    >>> cosine_distance(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[2.0, 0.0], [0.0, 0.0]])).tolist()
    [0.0, 1.0]
    """
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return 1 - np.divide((a * b).sum(1), norms, out=np.zeros(len(a)), where=norms > 0)


def unigram_f1(found: Sequence[int], true: Sequence[int]) -> float:
    """Twice the tokens that both have, counted as often as both have them, over the number of tokens of both.

    >>> unigram_f1([1, 1, 2], [1, 3, 1])
    0.6666666666666666
    """
    if not found or not true:
        return 0.0
    return 2 * sum((Counter(found) & Counter(true)).values()) / (len(found) + len(true))


def bigrams_found(found: Sequence[int], true: Sequence[int]) -> float:
    """Share of the distinct pairs of neighbouring tokens of `true` that are in `found`; NaN where it has none.

    >>> bigrams_found([1, 2, 3, 4], [3, 4, 5])
    0.5
    """
    wanted = set(pairwise(true))
    return len(wanted & set(pairwise(found))) / len(wanted) if wanted else float("nan")
