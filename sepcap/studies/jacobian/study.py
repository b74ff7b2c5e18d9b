"""Singular values and rank of the Jacobians of attention and mlp blocks (METHODS 13)."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sepcap.checks import checked
from sepcap.errors import unknown
from sepcap.models.blocks.parts import block_part, widest
from sepcap.models.loading.load import DTYPES
from sepcap.models.loading.untrained import untrained
from sepcap.progress import progress
from sepcap.statistics.intervals import t_factor
from sepcap.statistics.spectrum import Count, Spectrum, all_values, jacobian, jacobian_blocks, jacobian_products, leading_values
from sepcap.studies.base.folder import Pieces
from sepcap.studies.base.result import Figures, StudyResult
from sepcap.studies.base.runner import run_study, study
from sepcap.studies.base.text import between, counted
from sepcap.studies.jacobian import figures
from sepcap.studies.jacobian.config import RANDOM, TRAINED, JacobianSpectrumConfig
from sepcap.studies.jacobian.plan import JacobianSpectrumPlan, chunk_of, plan_jacobian_spectrum

Found = tuple[dict[str, Tensor], dict[str, Any]]
"""Values and errors of one Jacobian, and its rows of the tables."""

COLUMNS = ("largest", "rank", "bound", "stable_rank", "participation_ratio", "effective_rank", "remainder", "products")

LEAST = {"rank": 0, "stable_rank": 1, "participation_ratio": 1, "effective_rank": 1}
"""Measure -> its smallest value for a Jacobian that is not 0; the upper limit of all is the largest rank possible."""

ENDS = {
    "rank": ("narrowest layer", "widest layer"),
    "stable_rank": ("layer with the lowest stable rank", "layer with the highest stable rank"),
}
"""Names of the layers with the lowest and the highest value of a measure."""


class JacobianSpectrum(StudyResult):
    """Singular values of the Jacobians of one part of the blocks, over layers and rows of tokens.

    Attributes:
        tables: "jacobians" has one row per weights ("trained", "random"), layer and row of tokens: the largest singular value; the
            rank at the threshold and whether it is only a lower bound (`at_least`); the largest rank that the sizes allow (`bound`);
            stable rank with its standard error (the part that a randomised basis misses is estimated by random directions),
            participation ratio of the squares, effective rank (exponential of the entropy); the bound on the norm of the missed part
            (`remainder`); number of products. "ranks" has the rank at every threshold.
        tensors: for each weights, values [layer, row, value], and `_errors` of the same shape: the largest distance to the nearest
            singular value, which need not be the one with the same index (`JacobianSpectrumConfig.tolerance`).

    Example:
        >>> found = sepcap.jacobian_spectrum(model, part="attn")  # doctest: +SKIP
        >>> found.by_layer[["weights", "layer", "rank", "rank_low", "rank_high", "bound"]]  # doctest: +SKIP
    """

    STUDY: ClassVar[str] = "jacobian-spectrum"
    TITLE: ClassVar[str] = "How many directions pass through a block?"
    FIGURES: ClassVar[Figures] = {
        "ranks": ("Rank over layers", figures.jacobian_ranks),
        "spectra": ("Singular values", figures.jacobian_spectra),
    }

    @cached_property
    def by_layer(self) -> pd.DataFrame:
        """One row per weights and layer: means over rows, with the ends `_low` and `_high` of 95% intervals (Student's t over rows).

        Intervals are cut at the possible values: at 0 for the rank and at 1 for the other measures, and at the largest rank possible.
        If that differs between rows (active neurons of an mlp), it is only estimated by its mean over rows, and the other intervals are
        cut at the upper end of its interval.

        If the rank of any row is only a lower bound (`at_least`), so is its mean, and its interval is NaN.
        """
        table, found = self.tables["jacobians"], []
        for weights, layer in dict.fromkeys(zip(table["weights"], table["layer"], strict=True)):
            rows = table[(table["weights"] == weights) & (table["layer"] == layer)]
            at_least, most = bool(np.any(rows["at_least"])), mean_and_interval(rows["bound"])[2]
            line: dict[str, Any] = {"weights": weights, "layer": layer, "rows": len(rows)}
            line["n_documents"] = self.config["n_documents"]
            for name in ("rank", "bound", "stable_rank", "participation_ratio", "effective_rank", "largest"):
                mean, *ends = mean_and_interval(rows[name])
                if name in LEAST:
                    ends = [math.nan, math.nan] if name == "rank" and at_least else np.clip(ends, LEAST[name], max(most, mean)).tolist()
                line |= dict(zip((name, f"{name}_low", f"{name}_high"), (mean, *ends), strict=True))
            found.append(line | {"at_least": at_least})
        return pd.DataFrame(found)

    @property
    def settled_threshold(self) -> float | None:
        """The smallest of the reported thresholds at which no rank is only a lower bound; None if there is none."""
        ranks = self.tables["ranks"]
        open_there = set(ranks.loc[ranks["at_least"], "threshold"])
        return min(set(ranks["threshold"]) - open_there, default=None)

    @checked()
    def at(self, threshold: float) -> "JacobianSpectrum":
        """The same result with the rank counted at another of the reported thresholds.

        Raises:
            ValueError: a threshold that is not in the table "ranks".

        Example:
            >>> found.at(0.1).by_layer  # doctest: +SKIP
        """
        there = self.tables["ranks"]["threshold"].drop_duplicates()
        if threshold not in there.tolist():
            raise ValueError(f"threshold={threshold:g} is not reported; give one of {', '.join(f'{t:g}' for t in there)}")
        jacobians, keys = self.tables["jacobians"], ["weights", "layer", "row"]
        ranks = self.tables["ranks"][self.tables["ranks"]["threshold"] == threshold]
        counted_there = jacobians.drop(columns=["rank", "at_least"]).merge(ranks, on=keys).reindex(columns=jacobians.columns)
        return JacobianSpectrum({**self.config, "threshold": threshold}, {**self.tables, "jacobians": counted_there}, self.tensors)

    @checked()
    def against_control(self, measure: str = "rank", intervals: int = 1) -> pd.DataFrame:
        """Trained minus random weights on the same rows, per layer, with the 95% interval of the mean over rows.

        For the rank it is NaN if the rank of any row, trained or random, is only a lower bound: the difference would depend on how many
        directions were tried. `found.at(found.settled_threshold)` compares settled ranks.

        Args:
            measure: column of the table "jacobians".
            intervals: number of intervals to correct for (Bonferroni): the number of layers, if one of them is picked.

        Raises:
            ValueError: an unknown measure, or a study without control.
        """
        if measure not in COLUMNS:
            raise unknown("measure", measure, COLUMNS)
        if not self.config["control"]:
            raise ValueError("there is no control: the study was run with control=False")
        table = self.tables["jacobians"].set_index(["weights", "layer", "row"]).sort_index()
        lines = table[measure].astype(float)
        if measure == "rank":
            lines = lines.mask(table["at_least"].astype(bool))
        names = ("difference", "low", "high")
        return pd.DataFrame(
            {"layer": layer, **dict(zip(names, mean_and_interval(lines[TRAINED, layer] - lines[RANDOM, layer], intervals), strict=True))}
            for layer in self.config["layers"]
        )

    def summary(self) -> list[str]:
        """The layers with the lowest and the highest rank, compared with the largest rank possible and with random weights.

        A layer that is chosen by its value has no interval; `by_layer` has those of layers named beforehand. Ranks that are only lower
        bounds are reported as such and not compared.
        """
        c = self.config
        said = [
            f"{'Attention' if c['part'] == 'attn' else 'Mlp'} blocks of {c['model']} at {counted(c['tokens'], 'token')}, "
            f"{counted(c['rows'], 'row')} of {c['task']} ({counted(c['n_documents'], 'document')}): the Jacobian without the residual "
            f"connection has {c['size']:,} rows and columns; a direction counts towards the rank if its singular value is above "
            f"{c['threshold']:g} of the largest."
        ]
        if not self.tables["jacobians"]["at_least"].to_numpy().any():
            return [*said, *self._compared(("rank", "stable_rank"))]
        said.append(self._unsettled())
        coarser = self.settled_threshold
        if coarser is None:
            return [*said, *self._compared(("stable_rank",))]
        said.append(f"At {coarser:g} of the largest every rank is settled; the following ranks are counted at that threshold.")
        return [*said, *self.at(coarser)._compared(("rank", "stable_rank"))]

    def _unsettled(self) -> str:
        c, table = self.config, self.tables["jacobians"]
        bounds = table.loc[table["at_least"], "rank"].to_numpy()
        there = f"{bounds.min():,}" if bounds.min() == bounds.max() else f"{bounds.min():,} to {bounds.max():,}"
        return (
            f"The rank at {c['threshold']:g} is not settled: in {len(bounds)} of {counted(len(table), 'Jacobian')} it is only known to be "
            f"at least {there}, which depends on how many directions were tried, so it is not compared between layers or with random "
            f"weights. To settle it: method='exact', a larger k (here {c['k']}), a larger threshold, or fewer tokens."
        )

    def _compared(self, measures: tuple[str, ...]) -> list[str]:
        """The layers lowest and highest in the first of the measures, and every measure against random weights."""
        first = measures[0]
        trained = [line for line in self.by_layer.to_dict("records") if line["weights"] == TRAINED]
        known = sorted((line for line in trained if not math.isnan(line[first])), key=lambda line: line[first])
        ends = [("only layer", trained[0])]
        if len(trained) > 1:
            ends = list(zip(ENDS[first], (known[0], known[-1]), strict=True)) if known else []
        if len(trained) > 1:  # the interval of a layer named beforehand is not valid for one chosen by its value
            ends = [(how, line | {f"{name}_low": math.nan for name in measures}) for how, line in ends]
        said = [f"The {how} is {line['layer']}: {_of_layer(line, measures)}." for how, line in ends]
        return said + [self._against(measure) for measure in measures if self.config["control"]]

    def _against(self, measure: str) -> str:
        """One measure against random weights, in a sentence."""
        differences, name = self.against_control(measure, len(self.config["layers"])), measure.replace("_", " ")
        table = self.by_layer.dropna(subset=[measure])
        trained, random = (table.loc[table["weights"] == weights, measure].to_numpy() for weights in (TRAINED, RANDOM))
        if not len(trained) or not len(random):
            return f"The {name} is not compared with random weights: a Jacobian of zeros has none."
        said = f"With random weights the {name} is {random.mean():,.4g} on average over the layers; trained it is "
        if self.config["rows"] == 1:
            return f"{said}{trained.mean():,.4g} (one row of tokens gives no interval)."
        lower, higher = (differences["high"].to_numpy() < 0).sum(), (differences["low"].to_numpy() > 0).sum()
        return (
            f"{said}lower in {lower} and higher in {higher} of {counted(len(differences), 'layer')} (95% intervals of the difference "
            "over rows, Bonferroni-corrected for all layers, exclude 0)."
        )


def _of_layer(line: Mapping[Any, Any], measures: tuple[str, ...]) -> str:
    """The measures of a layer in words, if they are defined."""
    if line["largest"] == 0:
        return "its Jacobian is 0 in every row"
    none = math.isnan(line["stable_rank"])
    stable = "no stable rank, because the Jacobian of some rows is 0" if none else f"stable rank {between(line, 'stable_rank')}"
    if "rank" not in measures:
        return stable
    return f"rank {between(line, 'rank')} of {line['bound']:,.4g} possible ({100 * line['rank'] / line['bound']:.0f}%); {stable}"


def mean_and_interval(values: Any, intervals: int = 1) -> tuple[float, float, float]:
    """Mean with its 95% interval by Student's t, Bonferroni-corrected for `intervals`; the interval is NaN for a single value."""
    x = np.asarray(values, dtype=np.float64)
    half = t_factor(len(x), intervals) * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


@study(JacobianSpectrumConfig)
@checked()
def jacobian_spectrum(
    model: Any, config: JacobianSpectrumConfig, *, out: str | Path | None = None, say: Callable[[str], Any]
) -> JacobianSpectrum:
    """Singular values of the Jacobian ∂output/∂input of attention or mlp blocks, without the residual connection.

    The input is the residual stream where it enters the part (after attention, for the mlp of a sequential block) at n tokens,
    flattened to n·d_model numbers; the norm before the part belongs to the function. The output is what the part adds to the
    stream at the same tokens, after any norm that follows the part (Gemma). BOS before the tokens is held fixed and not counted.

    Args:
        model: what `load_model` returns; default is to load `config.model`.
        config: a `JacobianSpectrumConfig`; its fields can also be given as keywords.
        out: folder to which every spectrum is written as soon as it is computed; the same call resumes there.
        progress: True announces the work, its memory and its time before it starts, also if "auto" chooses the leading values only,
            and shows bars; False shows nothing; a function receives the announcements.

    Returns:
        JacobianSpectrum with `.tables`, `.by_layer`, `.against_control()`, `.summary()` and `.figure("ranks" | "spectra")`.

    Raises:
        ValueError: an option out of its range, a threshold within rounding, an image classifier, too little text.
        IndexError: a layer that does not exist.
        NotImplementedError: a HookedTransformer, a mixture of experts in float64.
        MemoryError: method="exact" if the Jacobian would not fit into the free memory.
        FileExistsError: `out` contains something else.

    Source: [OPT]; METHODS section 13.

    Example:
        >>> sepcap.jacobian_spectrum(model, part="attn", tokens=4, rows=6).figure()  # doctest: +SKIP
    """
    prepared = plan_jacobian_spectrum(model, config)
    return run_study(JacobianSpectrum, prepared.resolved, partial(measure_spectra, prepared), out, prepared.cost, say)


def measure_spectra(prepared: JacobianSpectrumPlan, pieces: Pieces) -> JacobianSpectrum:
    """Compute every spectrum of a plan; each is written before the next starts, and existing ones are read."""
    found: dict[str, list[Found]] = {}
    with progress(total=prepared.jacobians * prepared.products, desc="Jacobians", unit="product", unit_scale=True) as bar:
        for weights in (TRAINED, RANDOM) if prepared.config.control else (TRAINED,):
            found[weights] = list(_of_weights(prepared, weights, pieces, bar))
    return _gather(prepared, found)


def _of_weights(prepared: JacobianSpectrumPlan, weights: str, pieces: Pieces, bar: Any) -> Iterator[Found]:
    model = prepared.model if weights == TRAINED else None
    for layer in prepared.layers:
        for row in range(len(prepared.rows)):
            ends_at = bar.n + prepared.products
            name = f"{weights}-{layer}-{row}"
            done = pieces.get(name)
            if done is None:
                model = untrained(prepared.model)(prepared.config.seed) if model is None else model
                done = _spectrum(prepared, model, weights, layer, row, bar.update)
                pieces.put(name, *done)
            bar.update(ends_at - bar.n)
            yield done


def _spectrum(prepared: JacobianSpectrumPlan, model: Any, weights: str, layer: int, row: int, count: Count) -> Found:
    c, size = prepared.config, prepared.resolved["size"]
    ids, kept = prepared.rows[row]
    with block_part(model, layer, c.part, ids, kept, norm=c.norm, dtype=DTYPES[c.precision]) as part:
        chunk = chunk_of(part.product_bytes, size)
        if prepared.method == "randomized":
            products = jacobian_products(part.function, part.at, chunk, count)
            # different directions for every Jacobian, so that intervals over rows include the randomness of the directions
            seed = np.random.SeedSequence([c.seed % 2**32, int(weights == RANDOM), layer, row]).generate_state(1)
            spectrum = leading_values(products, min(c.k, size), tolerance=c.tolerance, seed=int(seed[0]))
        else:
            whole = jacobian_blocks if c.part == "mlp" else jacobian
            spectrum = all_values(whole(part.function, part.at, chunk, count), prepared.products)
        bound = widest(part, model)
    line = {"weights": weights, "layer": layer, "row": row, **_measures(spectrum, c.threshold), "bound": bound}
    ranks = [dict(zip(("threshold", "rank", "at_least"), (t, *spectrum.rank(t)), strict=True)) for t in c.thresholds(size)]
    return {"values": spectrum.values, "errors": spectrum.errors}, {"line": line, "ranks": ranks}


def _measures(spectrum: Spectrum, threshold: float) -> dict[str, Any]:
    rank, at_least = spectrum.rank(threshold)
    return {
        "largest": float(spectrum.values[0]),
        "rank": rank,
        "at_least": at_least,
        "stable_rank": spectrum.stable_rank(),
        "stable_rank_error": spectrum.stable_rank_error(),
        "participation_ratio": spectrum.participation_ratio(),
        "effective_rank": spectrum.effective_rank(),
        "remainder": spectrum.remainder,
        "products": spectrum.products,
    }


def _gather(prepared: JacobianSpectrumPlan, found: Mapping[str, list[Found]]) -> JacobianSpectrum:
    every = [note for done in found.values() for _, note in done]
    lines = pd.DataFrame([note["line"] for note in every])
    ranks = pd.DataFrame(
        [{key: note["line"][key] for key in ("weights", "layer", "row")} | rank for note in every for rank in note["ranks"]]
    )
    shape = (len(prepared.layers), len(prepared.rows), -1)
    tensors = {}
    for weights, done in found.items():
        tensors[weights] = torch.stack([part["values"].cpu() for part, _ in done]).reshape(shape)
        tensors[f"{weights}_errors"] = torch.stack([part["errors"].cpu() for part, _ in done]).reshape(shape)
    return JacobianSpectrum(prepared.resolved, {"jacobians": lines, "ranks": ranks}, tensors)
