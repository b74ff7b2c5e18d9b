"""From likelihoods and generated texts to tables: values and paired differences, with intervals over texts (METHODS 14)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sepcap.evaluation.texts import Fit, bigrams_found, cosine_distance, embed, unigram_f1
from sepcap.statistics.intervals import t_factor
from sepcap.studies.paragraphs.conditions import (
    ANOTHER,
    DONORS,
    MISMATCHED,
    NEUTRAL,
    ORIGINAL,
    OTHER_KIND,
    OWN,
    TRANSFERRED,
    Condition,
    profile,
)
from sepcap.studies.paragraphs.config import ParagraphTransferConfig
from sepcap.tasks.passages import Passage

ALL = "all"
"""Name of the group of all kinds of text together."""

EDGES = (0, 1, 2, 5, 10, 20, 40, 80, 160, 320)
"""Positions in the paragraph at which a new group of positions starts."""
CHUNK = 512
"""Pairs of texts embedded at a time."""


@dataclass(frozen=True)
class Found:
    """Measurements: condition -> number of the text -> log-likelihood of every token, or token ids of every sample."""

    likelihood: dict[Condition, dict[int, np.ndarray]]
    texts: dict[Condition, dict[int, list[list[int]]]]

    def add_likelihood(self, condition: Condition, rows: Sequence[int], values: np.ndarray) -> None:
        """Log-likelihoods [text, pos] of some texts, NaN after the last token."""
        held = self.likelihood.setdefault(condition, {})
        held |= {i: row[~np.isnan(row)] for i, row in zip(rows, values, strict=True)}

    def add_texts(self, condition: Condition, rows: Sequence[int], written: Sequence[list[int]]) -> None:
        """Token ids; the samples of a text are adjacent."""
        held = self.texts.setdefault(condition, {})
        samples = len(written) // len(rows) if rows else 0
        held |= {i: list(written[k * samples : (k + 1) * samples]) for k, i in enumerate(rows)}


def make_tables(
    found: Found,
    passages: Sequence[Passage],
    tokenizer: Any,
    donors: dict[str, list[int | None]],
    config: ParagraphTransferConfig,
    resolved: dict[str, Any],
    embedder: Fit | None,
) -> tuple[dict[str, pd.DataFrame], dict[str, Tensor]]:
    """The tables and tensors of a `ParagraphTransfer`; see there."""
    kinds = [p.kind for p in passages]
    main = [c for c in found.likelihood if c.name in resolved["conditions"]]
    measured = [_likelihoods(found.likelihood, main, kinds)]
    extra: dict[str, pd.DataFrame] = {}
    if found.texts:
        extra["generations"] = _generations(found.texts, tokenizer)
        extra["scores"] = _scores(found.texts, passages, tokenizer, config, embedder)
        measured.append(_measured_scores(extra["scores"], kinds))
    everything = pd.concat(measured, ignore_index=True)
    layers = profile(tuple(resolved["layers"]), list(donors)) if config.profile != "none" else {}
    tables = {
        "differences": differences(everything),
        "values": values(everything),
        "layers": _layers(found.likelihood, layers, kinds),
        "chosen_layers": _chosen_layers(found.likelihood, layers, kinds, config.seed),
        "positions": _positions(found.likelihood, main, kinds),
        "likelihood": measured[0].drop(columns=["metric", "given", "reference"]),
        "texts": _texts(passages, tokenizer, donors),
        **extra,
    }
    longest = max(len(p.following) for p in passages)
    log_likelihood = torch.full((len(main), len(passages), longest), torch.nan, dtype=torch.float64)
    for c, condition in enumerate(main):
        for i, row in found.likelihood[condition].items():
            log_likelihood[c, i, : len(row)] = torch.from_numpy(row)
    return tables, {"log_likelihood": log_likelihood}


Interval = tuple[float, float, float]
"""An estimate and the ends of its 95% interval, NaN for fewer than two texts."""


def interval(total: Float[np.ndarray, " text"], weight: Float[np.ndarray, " text"]) -> Interval:
    """Σ total / Σ weight with the 95% interval of Student's t over texts.

    With equal weights this is the interval of a mean; with others, the residuals total − ratio · weight replace the deviations from
    the mean.
    """
    n = len(total)
    ratio = float(total.sum() / weight.sum()) if n else float("nan")
    if n < 2:
        return ratio, float("nan"), float("nan")
    half = t_factor(n) * float((total - ratio * weight).std(ddof=1)) / (np.sqrt(n) * float(weight.mean()))
    return ratio, ratio - half, ratio + half


def share(part: Float[np.ndarray, " text"], whole: Float[np.ndarray, " text"]) -> Interval:
    """Σ part / Σ whole with its 95% interval by Fieller: all shares r for which the interval of part − r · whole contains 0.

    NaN if the interval of the whole itself is not above 0: the share is then undefined.
    """
    n = len(part)
    if not interval(whole, np.ones(n))[1] > 0:
        return float("nan"), float("nan"), float("nan")
    x, w = float(part.mean()), float(whole.mean())
    spread = np.cov(part, whole) * t_factor(n) ** 2 / n
    a, b, c = w * w - spread[1, 1], x * w - spread[0, 1], x * x - spread[0, 0]
    root = np.sqrt(max(b * b - a * c, 0.0))
    return x / w, float((b - root) / a), float((b + root) / a)


def _groups(table: Any) -> Iterator[tuple[str, Any]]:
    yield ALL, table
    kinds = table["kind"].unique()
    if len(kinds) > 1:
        for kind in kinds:
            yield kind, table[table["kind"] == kind]


def _likelihoods(found: dict[Condition, dict[int, np.ndarray]], main: list[Condition], kinds: list[str]) -> pd.DataFrame:
    rows = [
        {"metric": "nats", "text": i, "kind": kinds[i], "condition": c.name, "given": 0, "reference": 0, "total": x.sum(), "weight": len(x)}
        for c in main
        for i, x in found[c].items()
    ]
    return pd.DataFrame(rows)


def _measured_scores(scores: Any, kinds: list[str]) -> pd.DataFrame:
    """One row per text, averaged over its samples."""
    keys = ["text", "condition", "given", "reference"]
    means = scores.groupby(keys, sort=False)[["distance", "overlap", "bigrams"]].mean().reset_index()
    long = means.melt(id_vars=keys, var_name="metric", value_name="total").dropna(subset="total")
    return long.assign(kind=[kinds[i] for i in long["text"]], weight=1.0)


def values(measured: pd.DataFrame) -> pd.DataFrame:
    """Mean, its interval, and the median over texts, of every metric in every condition."""
    own = measured[measured["reference"] == measured["given"]]
    rows = []
    for kind, group in _groups(own):
        for (metric, condition), part in group.groupby(["metric", "condition"], sort=False):
            total, weight = part["total"].to_numpy(float), part["weight"].to_numpy(float)
            mean, low, high = interval(total, weight)
            row = {"kind": kind, "metric": metric, "condition": condition, "given": part["given"].iloc[0], "texts": len(part)}
            rows.append(row | {"mean": mean, "low": low, "high": high, "median": float(np.median(total / weight))})
    return pd.DataFrame(rows)


def _pairs(conditions: Sequence[str]) -> list[tuple[str, str]]:
    """Compared pairs: every condition with the break alone, and the transfer with its controls and baselines."""
    pairs = [(name, NEUTRAL) for name in conditions if name != NEUTRAL]
    controls = [name for name in conditions if name in (MISMATCHED, OTHER_KIND) or name.startswith("given ")]
    return pairs + [(TRANSFERRED, name) for name in controls]


def differences(measured: pd.DataFrame) -> pd.DataFrame:
    """Paired differences with intervals; both sides are compared with the same rest of the paragraph."""
    rows = []
    for kind, group in _groups(measured):
        for metric, of_metric in group.groupby("metric", sort=False):
            by = {key: part.set_index("text") for key, part in of_metric.groupby(["condition", "reference"])}
            given = of_metric.groupby("condition", sort=False)["given"].first().to_dict()
            for name, against in _pairs(list(given)):
                reference = max(given[name], given[against])
                if (name, reference) not in by or (against, reference) not in by:
                    continue
                a, b = by[name, reference], by[against, reference]
                both = a.index.intersection(b.index)
                change, weight = (a.loc[both, "total"] - b.loc[both, "total"]).to_numpy(float), a.loc[both, "weight"].to_numpy(float)
                mean, low, high = interval(change, weight)
                row = {"kind": kind, "metric": metric, "condition": name, "against": against, "reference": reference, "texts": len(both)}
                row |= {"difference": mean, "low": low, "high": high}
                if metric == "nats" and against == NEUTRAL and (ORIGINAL, 0) in by:
                    whole = (by[ORIGINAL, 0].loc[both, "total"] - b.loc[both, "total"]).to_numpy(float)
                    row |= dict(zip(("share", "share_low", "share_high"), share(change, whole), strict=True))
                rows.append(row)
    return pd.DataFrame(rows)


def _layers(found: dict[Condition, dict[int, np.ndarray]], parts: dict[tuple[str, int, str], Condition], kinds: list[str]) -> pd.DataFrame:
    """Gain over the break alone with some layers patched, from the own break, from another's, and their difference."""
    neutral = found[Condition(NEUTRAL)]
    rows = []
    for (part, layer), gains in _gains(found, parts).items():
        for donor, of_text in gains.items():
            tokens = [len(neutral[i]) for i in of_text]
            rows += _gain_rows(of_text, tokens, kinds, {"part": part, "layer": layer, "donor": donor})
    columns = ["kind", "part", "layer", "donor", "gain", "low", "high", "texts"]
    return pd.DataFrame(rows, columns=columns)


def _gain_rows(totals: dict[int, float], tokens: list[int], kinds: list[str], where: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per kind of text: gain per token with its interval, from the total gain and the tokens of every text."""
    table = pd.DataFrame({"kind": [kinds[i] for i in totals], "total": list(totals.values()), "weight": tokens})
    rows = []
    for kind, group in _groups(table):
        gain, low, high = interval(group["total"].to_numpy(float), group["weight"].to_numpy(float))
        rows.append({"kind": kind, **where, "gain": gain, "low": low, "high": high, "texts": len(group)})
    return rows


def _gains(
    found: dict[Condition, dict[int, np.ndarray]], parts: dict[tuple[str, int, str], Condition]
) -> dict[tuple[str, int], dict[str, dict[int, float]]]:
    """(part, layer) -> donor or "difference" -> text -> gain in nats over the break alone."""
    neutral, every = found[Condition(NEUTRAL)], {}
    for part, layer in dict.fromkeys((part, layer) for part, layer, _ in parts):
        gains = {
            donor: {i: float(x.sum() - neutral[i].sum()) for i, x in found[parts[part, layer, donor]].items()}
            for donor in (OWN, ANOTHER)
            if (part, layer, donor) in parts
        }
        if ANOTHER in gains:
            gains["difference"] = {i: gains[OWN][i] - gain for i, gain in gains[ANOTHER].items()}
        every[part, layer] = gains
    return every


def _chosen_layers(
    found: dict[Condition, dict[int, np.ndarray]], parts: dict[tuple[str, int, str], Condition], kinds: list[str], seed: int
) -> pd.DataFrame:
    """For every part of the profile the layer with the largest gain on one half of the texts, with its gain on the other half.

    The gain is that of the own break minus another's, or of the own break alone if there is no other one.
    """
    neutral = found[Condition(NEUTRAL)]
    by_part: dict[str, dict[int, tuple[str, dict[int, float]]]] = {}
    for (part, layer), gains in _gains(found, parts).items():
        donor = "difference" if "difference" in gains else OWN
        by_part.setdefault(part, {})[layer] = donor, gains[donor]
    rows = []
    for part, layers in by_part.items():
        texts = sorted(set.intersection(*(set(gains) for _, gains in layers.values())))
        first, second = _halves(texts, kinds, seed)
        if len(first) < 2 or len(second) < 2:
            continue

        def gain(layer: int, half: list[int], layers: Any = layers) -> Interval:
            return interval(np.array([layers[layer][1][i] for i in half]), np.array([len(neutral[i]) for i in half], dtype=float))

        best = max(layers, key=lambda layer: gain(layer, first)[0])
        row = {"part": part, "layer": best, "among": len(layers), "donor": layers[best][0], "searched": len(first)}
        row["gain_searched"], _, _ = gain(best, first)
        rows.append(row | dict(zip(("gain", "low", "high"), gain(best, second), strict=True)) | {"texts": len(second)})
    return pd.DataFrame(rows, columns=["part", "layer", "among", "donor", "searched", "gain_searched", "gain", "low", "high", "texts"])


def _halves(texts: list[int], kinds: list[str], seed: int) -> tuple[list[int], list[int]]:
    """Two halves of the texts, with half of the texts of every kind in each; with an odd number the second has one more."""
    rng, first = np.random.default_rng([seed, 1]), set()
    for kind in dict.fromkeys(kinds[i] for i in texts):
        of_kind = rng.permutation([i for i in texts if kinds[i] == kind])
        first |= set(of_kind[: len(of_kind) // 2].tolist())
    return [i for i in texts if i in first], [i for i in texts if i not in first]


def _positions(found: dict[Condition, dict[int, np.ndarray]], main: list[Condition], kinds: list[str]) -> pd.DataFrame:
    """Gain over the break alone, by token position in the paragraph."""
    neutral = found[Condition(NEUTRAL)]
    longest = max(map(len, neutral.values()))
    edges = [edge for edge in EDGES if edge < longest] + [longest]
    rows = []
    for condition in (c for c in main if c.name != NEUTRAL):
        for first, end in pairwise(edges):
            gains = {i: x[first:end] - neutral[i][first:end] for i, x in found[condition].items() if len(x) > first}
            if not gains:
                continue
            totals, tokens = {i: g.sum() for i, g in gains.items()}, [len(g) for g in gains.values()]
            rows += _gain_rows(totals, tokens, kinds, {"condition": condition.name, "first": first, "last": end - 1})
    return pd.DataFrame(rows)


def _generations(found: dict[Condition, dict[int, list[list[int]]]], tokenizer: Any) -> pd.DataFrame:
    rows = [
        {"text": i, "condition": c.name, "given": c.given, "sample": s, "tokens": len(ids), "written": _decoded(tokenizer, ids)}
        for c, of_text in found.items()
        for i, samples in of_text.items()
        for s, ids in enumerate(samples)
    ]
    return pd.DataFrame(rows)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True)


def _scores(
    found: dict[Condition, dict[int, list[list[int]]]],
    passages: Sequence[Passage],
    tokenizer: Any,
    config: ParagraphTransferConfig,
    embedder: Fit | None,
) -> pd.DataFrame:
    """Scores of every text against the rest of the paragraph; texts without given tokens are also scored against the baselines' rests."""
    rows, written, true = [], [], []
    # text by text, so that the vectors of its paragraph are computed once
    for i, passage in enumerate(passages):
        for c, of_text in found.items():
            for s, ids in enumerate(of_text.get(i, [])):
                for k in [c.given] if c.given else sorted({0, *config.given}):
                    if k >= len(passage.following):
                        continue
                    rest = list(passage.following[k:])
                    rows.append({"text": i, "condition": c.name, "given": c.given, "sample": s, "reference": k})
                    rows[-1] |= {"overlap": unigram_f1(ids, rest), "bigrams": bigrams_found(ids, rest)}
                    written.append(_decoded(tokenizer, ids))
                    true.append(_decoded(tokenizer, rest))
    distances: list[np.ndarray] = []
    vectors_of = None if embedder is None else embedder(sorted({*written, *true}))
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        if vectors_of is not None:
            vectors = embed(vectors_of, written[part] + true[part])
            distances.append(cosine_distance(vectors[: len(vectors) // 2], vectors[len(vectors) // 2 :]))
    table = pd.DataFrame(rows)
    table["distance"] = np.concatenate(distances) if distances else np.nan
    return table


def _texts(passages: Sequence[Passage], tokenizer: Any, donors: dict[str, list[int | None]]) -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "text": range(len(passages)),
            "kind": [p.kind for p in passages],
            "context_tokens": [len(p.context) for p in passages],
            "break_tokens": [len(p.gap) for p in passages],
            "following_tokens": [len(p.following) for p in passages],
            "before": [tokenizer.decode(list(p.context[-40:])) for p in passages],
            "following": [tokenizer.decode(list(p.following)) for p in passages],
        }
    )
    for donor in DONORS.values():
        if donor in donors and donor != OWN:
            table[donor.replace(" ", "_")] = pd.array(donors[donor], dtype="Int64")
    return table
