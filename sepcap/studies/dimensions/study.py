"""Single residual dimensions across layers, and a search for dimensions that separate kinds of text (METHODS 13)."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from sepcap.checks import checked
from sepcap.errors import warn
from sepcap.models.blocks.places import Look, all_layers, place_hooks
from sepcap.models.forward import Hook
from sepcap.progress import progress
from sepcap.statistics.intervals import t_factor
from sepcap.statistics.vectors import vectors_at
from sepcap.studies.base.folder import Pieces
from sepcap.studies.base.permutations import TIES, Relabellings, relabel
from sepcap.studies.base.provenance import made_with
from sepcap.studies.base.runner import run_study, study
from sepcap.studies.dimensions.config import DimensionSearchConfig, DimensionTracesConfig
from sepcap.studies.dimensions.result import DimensionSearch, DimensionTraces
from sepcap.tasks.labelled import LabelledTexts, texts_of

Values = Float[Tensor, "location text position dim"]


@study(DimensionTracesConfig)
@checked()
def trace_dimensions(
    model: Any, config: DimensionTracesConfig, *, out: str | Path | None = None, say: Callable[[str], Any]
) -> DimensionTraces:
    """Trace residual dimensions through the layers, at the same positions of labelled texts.

    Args:
        model: what `load_model` returns; default is to load `config.model`.
        config: a `DimensionTracesConfig`; its fields can also be given as keywords.
        out: folder of the study; a finished one is read. Without one, nothing is saved.
        progress: True announces the work and shows bars, False shows nothing; a function receives the announcements.

    Returns:
        DimensionTraces with `.dims`, `.tables["values"]`, `.tables["separation"]` and `.figure()`.

    Raises:
        ValueError: no dimension, one that does not exist or is repeated; a table found on these texts with another seed; texts too
            short or too few (without `dims`, fewer than six per category).
        NotImplementedError: an image classifier.
        FileExistsError: the folder contains another configuration (the error names the differing fields).

    Source: [OPT]; METHODS section 13.

    Example:
        >>> found = sepcap.find_dimensions(model, n=4)  # doctest: +SKIP
        >>> sepcap.trace_dimensions(model, dims=found).figure()  # doctest: +SKIP
    """
    texts, at, length = texts_of(model, config)
    given = None if config.dims is None else _within(model, _check_dims(config.dims))
    every, searched, locations = _check_locations(model, None), None, None
    if given is None:
        texts.rows(model, length)  # raises if a text of one half begins like one of the other
        searched, texts = texts.halves(config.seed)
    elif isinstance(config.dims, pd.DataFrame) and (half := _other_half(texts, config.dims, config.seed)) is not None:
        searched, texts = half
        locations = [int(location) for location in config.dims["location"]]
    rows = texts.rows(model, length)
    relabellings = relabel(texts.labels, config.permutations, config.seed)
    resolved = {
        **made_with(model),
        "dims": given,
        "dims_locations": locations,
        "n": config.n if given is None else len(given),
        "locations": len(every),
        "searched": None if searched is None else len(searched.labels),
        **_sampled(texts, at, config, relabellings),
        "n_documents": len(texts.labels),
    }

    def compute(_: Pieces) -> DimensionTraces:
        dims: Any = given
        found_at = locations
        if given is None and searched is not None:
            found = _search(model, searched, at, length, config, every)
            dims, found_at = found["dim"].tolist(), found["location"].tolist()
        values = vectors_at(model, rows, partial(location_hooks, model), at, dims=dims, batch_size=config.batch_size)
        means = values.double().mean(dim=2).numpy()
        separated = _separation_table(means, dims, relabellings)
        tables = {
            "tests": _tests_found(means, dims, found_at, relabellings) if found_at else _tests_given(separated, dims, means.shape[1]),
            "values": _value_table(values, dims, texts, at),
            "means": _mean_table(values, dims, texts),
            "separation": separated,
            "texts": texts.table,
        }
        return DimensionTraces(resolved, tables)

    def cost() -> str:
        return f"{len(rows) + (0 if given or searched is None else len(searched.labels)):,} texts of {length:,} tokens"

    return run_study(DimensionTraces, resolved, compute, out, cost, say)


def _other_half(texts: LabelledTexts, table: pd.DataFrame, seed: int) -> tuple[LabelledTexts, LabelledTexts] | None:
    """The searched texts, and those left for the test; None if the table names no half, or one of other texts (a warning)."""
    if "searched" not in table:
        return None
    halves = [str(name) for name in dict.fromkeys(table["searched"])]
    these = [name for name in halves if name.startswith(_half_of(texts, ""))]
    if not these:
        warn(
            f"dims: the table was found in {' and '.join(halves)}, which are other texts than these ({texts.fingerprint}), so all of "
            "these are tested. If the search used some of them, p is too small"
        )
        return None
    if halves != [_half_of(texts, seed)] or "location" not in table:
        raise ValueError(
            f"dims: the table was found in {' and '.join(halves)}, and with seed={seed} these texts are cut into other halves, so "
            "searched texts would be tested; give the seed= of find_dimensions, and its table with the columns dim, location and searched"
        )
    return texts.halves(seed)


def _half_of(texts: LabelledTexts, seed: int | str) -> str:
    """Name of the searched half in the table: never parsed as a number, also after writing and reading a CSV."""
    return f"half of texts {texts.fingerprint}, seed {seed}"


@study(DimensionSearchConfig)
@checked()
def find_dimensions(
    model: Any, config: DimensionSearchConfig, *, out: str | Path | None = None, say: Callable[[str], Any]
) -> DimensionSearch:
    """Rank residual dimensions by how well they separate categories of text on one half of the texts, and test them on the other half.

    Each text counts once, as the mean over its positions. A dimension is scored at every location by η², the share of the variance
    between texts that their categories explain (an increasing function of the F ratio of between to within), and ranked by its
    highest η² on the first half. On the other half it is scored at that location; its p-value is the share of relabellings under which
    any of the n dimensions reaches at least its η² (Westfall and Young).

    Args:
        model: what `load_model` returns; default is to load `config.model`.
        config: a `DimensionSearchConfig`; its fields can also be given as keywords.
        out: folder of the study; a finished one is read. Without one, nothing is saved.
        progress: True announces the work and shows bars, False shows nothing; a function receives the announcements.

    Returns:
        DimensionSearch with `.table`, `.dims` and `.figure()`. Pass it, or rows of its table, to `trace_dimensions` as `dims`, which
        then shows the other half of the texts.

    Raises:
        ValueError: as in `trace_dimensions`; fewer than six texts of a category; a location that does not exist.
        FileExistsError: the folder contains another configuration (the error names the differing fields).

    Source: METHODS section 13; Westfall and Young 1993.

    Example:
        >>> sepcap.find_dimensions(model, n=5).table  # doctest: +SKIP
    """
    texts, at, length = texts_of(model, config)
    chosen = _check_locations(model, config.locations)
    rows = texts.rows(model, length)  # raises if a text of one half begins like one of the other
    first, second = texts.halves(config.seed)
    relabellings = relabel(second.labels, config.permutations, config.seed)
    resolved = {**made_with(model), "n": config.n, "locations": chosen, **_sampled(texts, at, config, relabellings)}
    resolved["n_documents"] = {"search": len(first.labels), "evaluate": len(second.labels)}

    def compute(_: Pieces) -> DimensionSearch:
        found = _search(model, first, at, length, config, chosen)
        dims, locations = found["dim"].tolist(), found["location"].tolist()
        means = _means(model, second, at, length, config, chosen, dims)
        tested = _tests_found(means, dims, [chosen.index(location) for location in locations], relabellings)
        table = tested.assign(location=locations, eta2_searched=found["eta2"], searched=_half_of(texts, config.seed))
        return DimensionSearch(resolved, {"dimensions": table, "texts": texts.table})

    return run_study(DimensionSearch, resolved, compute, out, lambda: f"{len(rows):,} texts of {length:,} tokens", say)


def _sampled(texts: LabelledTexts, at: Sequence[int], config: Any, relabellings: Relabellings) -> dict[str, Any]:
    """What determines the texts and the test, for the configuration of both studies."""
    return {
        "positions": list(at),
        "texts": texts.fingerprint,
        "categories": {category: len(held) for category, held in texts.texts.items()},
        "permutations": config.permutations,
        "relabellings": relabellings.said,
        "seed": config.seed,
    }


def _search(model: Any, texts: LabelledTexts, at: Sequence[int], length: int, config: Any, locations: list[int]) -> pd.DataFrame:
    """The `config.n` dimensions that separate the texts best, each with its location and eta2."""
    found = search_dims(_means(model, texts, at, length, config, locations), texts.labels).head(config.n)
    return found.assign(location=[locations[place] for place in found["location"]])


def _means(
    model: Any,
    texts: LabelledTexts,
    at: Sequence[int],
    length: int,
    config: Any,
    locations: list[int],
    dims: list[int] | None = None,
) -> Float[np.ndarray, "location text dim"]:
    """Values of dimensions at locations, as means over the positions of every text."""
    hooks_for = partial(location_hooks, model, locations=locations)
    values = vectors_at(model, texts.rows(model, length), hooks_for, at, dims=dims, batch_size=config.batch_size)
    return values.double().mean(dim=2).numpy()


def search_dims(means: Float[np.ndarray, "location text dim"], labels: Int[np.ndarray, " text"]) -> pd.DataFrame:
    """All dimensions, the best first, at the location with their highest eta2: dim, location (index into `means`) and eta2.

    Args:
        means: mean over positions of every text.
        labels: number of the category of every text.
    """
    locations, texts, dims = means.shape
    eta2 = _explained(_scaled(means.transpose(1, 0, 2).reshape(texts, locations * dims)), labels[None])[0].reshape(locations, dims)
    best, every = eta2.argmax(axis=0), np.arange(dims)
    table = pd.DataFrame({"dim": every, "location": best, "eta2": eta2[best, every]})
    return table.sort_values("eta2", ascending=False, kind="stable", ignore_index=True)


def separation(
    means: Float[np.ndarray, "location text dim"], relabellings: Relabellings
) -> tuple[Float[np.ndarray, "location dim"], Float[np.ndarray, "location dim"], Float[np.ndarray, "location dim"]]:
    """η² of every dimension at every location, its p-value corrected for all of them, and its uncorrected p-value.

    η² = Σ over categories of n (mean of the category − mean)² / Σ over texts of (value − mean)²; 0 if all texts are equal.
    """
    locations, texts, dims = means.shape
    scaled = _scaled(means.transpose(1, 0, 2).reshape(texts, locations * dims))
    labels = relabellings.labels
    found = _explained(scaled, labels[:1])[0]
    highest, as_high = [], np.zeros(locations * dims)
    step = max(1, 4_000_000 // (scaled.shape[1] * (labels.max() + 1)))
    for start in progress(range(0, len(labels), step), desc="relabel texts"):
        explained = _explained(scaled, labels[start : start + step])
        highest.append(explained.max(axis=1))
        as_high += (explained >= found - TIES).sum(axis=0)
    ordered = np.sort(np.concatenate(highest))
    reached = len(ordered) - np.searchsorted(ordered, found - TIES)
    shape = (locations, dims)
    return found.reshape(shape), (reached / len(labels)).reshape(shape), (as_high / len(labels)).reshape(shape)


def _scaled(cells: Float[np.ndarray, "text cell"]) -> Float[np.ndarray, "text cell"]:
    """Every cell minus its mean, with sum of squares 1; 0 if all texts are equal."""
    centred = cells - cells.mean(axis=0)
    total = (centred**2).sum(axis=0)
    # differences within float32 rounding count as 0
    flat = total <= 1e-12 * (cells**2).sum(axis=0)
    return np.where(flat, 0.0, centred / np.sqrt(np.where(flat, 1.0, total)))


def _explained(
    scaled: Float[np.ndarray, "text cell"], labels: Int[np.ndarray, "relabelling text"]
) -> Float[np.ndarray, "relabelling cell"]:
    explained = np.zeros((len(labels), scaled.shape[1]))
    for category in range(labels.max() + 1):
        members = (labels == category).astype(np.float64)
        explained += (members @ scaled) ** 2 / members.sum(axis=1, keepdims=True)
    return explained


def location_hooks(model: Any, look: Look, locations: Sequence[int] | None = None) -> list[Hook]:
    """Hooks on the residual stream: location 0 at the input of the first block, location l + 1 at the output of block l."""
    wanted = range(len(all_layers(model)) + 1) if locations is None else locations
    blocks = [location - 1 for location in wanted if location > 0]
    entering = place_hooks(model, "resid_pre", [0], look) if 0 in wanted else []
    return entering + place_hooks(model, "resid_post", blocks, lambda layer, vectors: look(layer + 1, vectors))


def _check_locations(model: Any, locations: Iterable[int] | None) -> list[int]:
    last = len(all_layers(model))
    chosen = list(range(last + 1)) if locations is None else sorted({int(location) for location in locations})
    if not chosen or not 0 <= chosen[0] <= chosen[-1] <= last:
        raise ValueError(f"locations={chosen}: give some of 0 (input of the first block) to {last} (output of the last)")
    return chosen


def _check_dims(dims: int | Iterable[int] | pd.DataFrame) -> list[int]:
    if isinstance(dims, pd.DataFrame):
        if "dim" not in dims:
            there = ", ".join(map(str, dims.columns))
            raise ValueError(f"dims is a table with the columns {there}; give what find_dimensions returns, or rows of its table")
        dims = dims["dim"].tolist()
    chosen = [int(dims)] if isinstance(dims, int | np.integer) else [int(dim) for dim in dims]
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"dims={chosen}: give different dimensions, at least one")
    return chosen


def _within(model: Any, dims: list[int]) -> list[int]:
    width = int(model.cfg.d_model)
    if not 0 <= min(dims) <= max(dims) < width:
        raise ValueError(f"dims={dims}: the residual stream has dimensions 0 to {width - 1}")
    return dims


def _value_table(values: Values, dims: list[int], texts: LabelledTexts, at: Sequence[int]) -> pd.DataFrame:
    locations, n, _, _ = values.shape
    index = pd.MultiIndex.from_product([dims, range(locations), range(n), at], names=["dim", "location", "text", "position"])
    table = index.to_frame(index=False)
    table["category"] = np.array(texts.categories)[texts.labels[table["text"]]]
    return table.assign(value=values.permute(3, 0, 1, 2).reshape(-1).numpy())


def _mean_table(values: Values, dims: list[int], texts: LabelledTexts) -> pd.DataFrame:
    of_texts = values.double().mean(dim=2).numpy()
    rows = []
    for number, category in enumerate(texts.categories):
        own = of_texts[:, texts.labels == number]
        half = t_factor(own.shape[1]) * stats.sem(own, axis=1)
        for i, dim in enumerate(dims):
            means = own[:, :, i].mean(axis=1)
            ends = {"low": means - half[:, i], "high": means + half[:, i]}
            rows.append(pd.DataFrame({"dim": dim, "location": range(len(means)), "category": category, "mean": means, **ends}))
    return pd.concat(rows, ignore_index=True)


def _separation_table(means: Float[np.ndarray, "location text dim"], dims: list[int], relabellings: Relabellings) -> pd.DataFrame:
    eta2, p, alone = separation(means, relabellings)
    columns = {"eta2": eta2.T.ravel(), "p": p.T.ravel(), "p_uncorrected": alone.T.ravel()}
    return pd.DataFrame({"dim": np.repeat(dims, len(eta2)), "location": np.tile(np.arange(len(eta2)), len(dims)), **columns})


def _tests_found(
    means: Float[np.ndarray, "location text dim"], dims: list[int], locations: list[int], relabellings: Relabellings
) -> pd.DataFrame:
    """Every dimension at the location where a search on other texts found it, with p corrected for these dimensions."""
    at_locations = np.stack([means[location, :, i] for i, location in enumerate(locations)], axis=1)
    eta2, p, alone = (values[0] for values in separation(at_locations[None], relabellings))
    found = {"dim": dims, "location": locations, "eta2": eta2, "p": p, "p_uncorrected": alone}
    return pd.DataFrame(found | {"n_documents": means.shape[1]})


def _tests_given(separated: pd.DataFrame, dims: list[int], n_documents: int) -> pd.DataFrame:
    """Every dimension at the location with its highest eta2, with p corrected for all dimensions and locations."""
    rows = [separated.loc[separated.loc[separated["dim"] == dim, "eta2"].idxmax()] for dim in dims]
    return pd.DataFrame(rows).astype({"dim": int, "location": int}).reset_index(drop=True).assign(n_documents=n_documents)
