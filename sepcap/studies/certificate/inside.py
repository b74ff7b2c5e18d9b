"""What the residual stream still contains: logit lens and linear probes at every layer (METHODS 22)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from sepcap.evaluation.next_token import counts, most_frequent_targets
from sepcap.evaluation.result import ratio
from sepcap.learning.fit import ROLES
from sepcap.models.forward import device_of, measuring
from sepcap.models.prefix import Recorded, record, unembed
from sepcap.models.sites import n_layers
from sepcap.statistics.collect import halving_batches
from sepcap.statistics.intervals import Ends, as_columns, cluster_sums, ratio_se, summed_interval, t_interval
from sepcap.studies.base.folder import Pieces
from sepcap.studies.base.task_sets import WHOLE, Relative
from sepcap.studies.certificate.arms import UNTOUCHED, Arms
from sepcap.studies.certificate.measured import of_every_arm
from sepcap.studies.certificate.plan import Plan
from sepcap.tasks.batches import TokenSample

PROBES = ("task", "next token")

Features = dict[str, Float[np.ndarray, "layer _ d_model"]]
"""Name of a set of positions -> the residual stream there, before every layer and after the last."""


@dataclass(frozen=True, eq=False)
class Places:
    """Positions of one sample.

    Attributes:
        at: (row, position) of every example, in order.
        targets: the next token of each.
        documents: the cluster of each.
    """

    sample: TokenSample
    at: Int[np.ndarray, "example 2"]
    targets: Int[np.ndarray, " example"]
    documents: Int[np.ndarray, " example"]

    @classmethod
    def of(cls, sample: TokenSample, most: int, among: Int[np.ndarray, " token"] | None, seed: int) -> "Places":
        """At most `most` random positions of prediction targets, or of those that are among some."""
        at = [(i, t) for i, row in enumerate(sample.rows) for t in range(len(row) - 1) if row[t + 1] != sample.bos]
        targets = np.array([sample.rows[i][t + 1] for i, t in at])
        free = np.arange(len(at)) if among is None else np.flatnonzero(np.isin(targets, among))
        chosen = np.sort(np.random.default_rng(seed).permutation(free)[:most])
        places = np.array(at)[chosen]
        return cls(sample, places, targets[chosen], sample.clusters[places[:, 0]])


def looked_inside(plan: Plan, arms: Arms, pieces: Pieces) -> dict[str, pd.DataFrame]:
    """Tables "lens" and "probes"."""
    c = plan.config
    common = np.array(list(most_frequent_targets(plan.fit["forget"], c.probe_classes)))
    sets = {"fit": plan.fit, "test": plan.evaluate}
    places = {f"{part} {role}": Places.of(samples[role], c.probe_tokens, None, 0) for part, samples in sets.items() for role in ROLES}
    places |= {f"{part} next": Places.of(samples["forget"], c.probe_tokens, common, 1) for part, samples in sets.items()}

    def make(model: Any) -> dict[str, torch.Tensor]:
        lens, features = _pass(plan, model, places)
        return {name: torch.from_numpy(value) for name, value in ({"lens": lens} | _probed(places, features)).items()}

    found, every = of_every_arm(plan, arms, pieces, "inside", make)
    return {"lens": _lens(plan, found, every), "probes": _probes(found, every, places)}


@torch.inference_mode()
def _pass(plan: Plan, model: Any, places: Mapping[str, Places]) -> tuple[Float[np.ndarray, "layer row count"], Features]:
    """Evaluation sums of the lens on forget, and the residual stream at all places, before every layer and after the last."""
    sample = plan.evaluate["forget"]
    skip = torch.tensor(list(most_frequent_targets(sample)), dtype=torch.long, device=device_of(model))
    size = plan.config.batch_size
    lens = []
    with measuring(model):
        for batch in sample.batches(size):
            batch = batch.to(device_of(model))
            recorded = record(model, batch.inputs, batch.mask)
            lens.append(np.stack([_lens_sums(model, recorded, stream, batch, skip) for stream in recorded.streams]))
        features = {name: halving_batches(lambda n, of=of: _streams(model, of, n), size) for name, of in places.items()}
    return np.concatenate(lens, axis=1), features


def _lens_sums(model: Any, recorded: Recorded, stream: torch.Tensor, batch: Any, skip: torch.Tensor) -> Float[np.ndarray, "row count"]:
    """Sums of every row, with the logits that the final norm and the unembedding give a residual stream."""
    found = []
    for row, answers, asked in zip(stream, batch.answers, batch.asked, strict=True):
        logits = unembed(model, recorded, row[asked])
        found.append(counts(logits, answers[asked], asked[asked], skip).sum(0).cpu().numpy())
    return np.stack(found)


def _streams(model: Any, places: Places, size: int) -> Float[np.ndarray, "layer example d_model"]:
    rows = np.unique(places.at[:, 0])
    found = []
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        (batch,) = places.sample.take(chosen.tolist()).batches(len(chosen))
        recorded = record(model, batch.inputs.to(device_of(model)), None if batch.mask is None else batch.mask.to(device_of(model)))
        here = places.at[np.isin(places.at[:, 0], chosen)]
        row, pos = (torch.from_numpy(x) for x in (np.searchsorted(chosen, here[:, 0]), here[:, 1]))
        found.append(np.stack([stream.float().cpu()[row, pos].numpy() for stream in recorded.streams]))
    return np.concatenate(found, axis=1)


def _probed(places: Mapping[str, Places], features: Features) -> dict[str, Float[np.ndarray, "layer _"]]:
    """Whether the probe of every layer is right at every test position, for both probes and for random labels."""
    rng = np.random.default_rng(0)
    hits: dict[str, np.ndarray] = {}
    for probe in PROBES:
        parts = {part: [f"{part} {role}" for role in ROLES] if probe == "task" else [f"{part} next"] for part in ("fit", "test")}
        x = {part: np.concatenate([features[name] for name in names], axis=1) for part, names in parts.items()}
        if probe == "task":
            y = {part: np.concatenate([np.full(len(places[n].at), i) for i, n in enumerate(names)]) for part, names in parts.items()}
            # a document is of one task, so a random label is of a document too
            random = {part: np.concatenate([_by_document(places[n], rng) for n in names]) for part, names in parts.items()}
        else:
            y = {part: places[names[0]].targets for part, names in parts.items()}
            random = {part: rng.choice(y["fit"], len(labels)) for part, labels in y.items()}
        for name, labels in ((probe, y), (f"{probe} control", random)):
            hits[name] = np.stack([_fitted(*layer, labels) for layer in zip(x["fit"], x["test"], strict=True)])
    return hits


def _by_document(places: Places, rng: np.random.Generator) -> Int[np.ndarray, " example"]:
    return rng.integers(2, size=places.documents.max() + 1)[places.documents]


def _fitted(fit: np.ndarray, test: np.ndarray, labels: Mapping[str, np.ndarray]) -> Float[np.ndarray, " example"]:
    """1 where a linear classifier, fitted by ridge regression to standardised features, is right."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe: Any = make_pipeline(StandardScaler(), RidgeClassifier(alpha=1.0)).fit(fit, labels["fit"])
    return (probe.predict(test) == labels["test"]).astype(np.float64)


def _lens(plan: Plan, found: Mapping[str, Mapping[str, np.ndarray]], every: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    c, sample = plan.config, plan.evaluate["forget"]
    last = n_layers(plan.model)
    sums = {(arm, i): cluster_sums(one["lens"][i], sample.clusters) for arm, one in found.items() for i in range(last + 1)}
    whole = sums[every[UNTOUCHED][0], last]
    relative = Relative({WHOLE: whole} | {f"{arm}@{layer}": value for (arm, layer), value in sums.items()}, c.metric, sample.fingerprint)
    rows = []
    for kind, arms in every.items():
        for layer in range(last + 1):
            accuracy = float(np.mean([ratio(sums[arm, layer], c.metric) for arm in arms]))
            named = {"kind": kind, "layer": layer, "accuracy": accuracy}
            rows.append(named | relative.mean([f"{arm}@{layer}" for arm in arms]).columns("forget") | {"seeds": len(arms)})
    return pd.DataFrame(rows)


def _probes(
    found: Mapping[str, Mapping[str, np.ndarray]], every: Mapping[str, Sequence[str]], places: Mapping[str, Places]
) -> pd.DataFrame:
    rows = []
    for probe in PROBES:
        parts = [f"test {role}" for role in ROLES] if probe == "task" else ["test next"]
        offsets = np.cumsum([0, *(places[name].documents.max() + 1 for name in parts)])
        documents = np.concatenate([places[name].documents + offset for name, offset in zip(parts, offsets[:-1], strict=True)])
        of_task = [np.full(len(places[name].at), i) for i, name in enumerate(parts)]
        labels = np.concatenate(of_task if probe == "task" else [places[name].targets for name in parts])
        chance = float(np.unique(labels, return_counts=True)[1].max() / len(labels))
        for kind, arms in every.items():
            for layer in range(len(found[arms[0]][probe])):
                row: dict[str, Any] = {"probe": probe, "kind": kind, "layer": layer}
                for name, key in (("accuracy", probe), ("control", f"{probe} control")):
                    row |= as_columns(name, *_mean([found[arm][key][layer] for arm in arms], documents))
                rows.append(row | {"selectivity": row["accuracy"] - row["control"], "chance": chance, "seeds": len(arms)})
    return pd.DataFrame(rows)


def _mean(hits: Sequence[Float[np.ndarray, " example"]], documents: Int[np.ndarray, " example"]) -> tuple[float, tuple[float, float]]:
    """Mean over examples and seeds, with a 95% interval over documents, and over seeds if there are several."""
    each = np.stack([np.mean(hits, axis=0), np.ones(len(documents))], axis=1)
    sums = cluster_sums(each, documents)
    value, error = float(each[:, 0].mean()), ratio_se(sums[:, 0], sums[:, 1])
    if len(hits) == 1:
        return value, _as_share(t_interval(value, error, len(sums)))
    between = float(np.std([one.mean() for one in hits], ddof=1)) / np.sqrt(len(hits))
    return value, _as_share(summed_interval(value, (error, between), (len(sums), len(hits))))


def _as_share(ends: Ends) -> Ends:
    """Ends of the interval of an accuracy, which lies between 0 and 1."""
    low, high = np.clip(ends, 0, 1).tolist()
    return low, high
