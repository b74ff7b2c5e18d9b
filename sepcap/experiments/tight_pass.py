"""Through how many directions attention or an mlp passes anything: the spectrum of its Jacobian (METHODS 13, "Tight pass")."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sepcap.checks import checked
from sepcap.errors import unknown
from sepcap.experiments.result import Figures, Pieces, StudyResult, is_finished, open_study
from sepcap.experiments.tight_pass_config import TightPassConfig, counted
from sepcap.experiments.tight_pass_plan import TightPassPlan, chunk_of, plan_tight_pass
from sepcap.models.load import DTYPES
from sepcap.models.parts import block_part, widest
from sepcap.models.untrained import untrained
from sepcap.progress import progress, tell
from sepcap.statistics.intervals import t_factor
from sepcap.statistics.spectrum import Count, Spectrum, all_values, jacobian, jacobian_blocks, jacobian_products, leading_values

TRAINED, RANDOM = "trained", "random"

Found = tuple[dict[str, Tensor], dict[str, Any]]
"""Values and errors of one Jacobian, and its lines in the tables."""

COLUMNS = ("largest", "rank", "bound", "stable_rank", "participation_ratio", "effective_rank", "remainder", "products")

LEAST = {"rank": 0, "stable_rank": 1, "participation_ratio": 1, "effective_rank": 1}
"""Measure of how many directions pass -> what no Jacobian is below, but for one that is 0; none is above the largest rank possible."""

ENDS = {
    "rank": ("narrowest layer", "widest layer"),
    "stable_rank": ("layer with the lowest stable rank", "layer with the highest stable rank"),
}
"""What the layers at both ends of a measure are called."""


@dataclass(frozen=True, eq=False, repr=False)
class TightPass(StudyResult):
    """Singular values of the Jacobians of one part of the blocks, over layers and rows of tokens.

    Attributes:
        tables: "jacobians" has one row per weights ("trained", "random"), layer and row of tokens: the largest singular value; the
            rank at the threshold and whether it is only a lower bound (`at_least`); the largest rank that the sizes allow (`bound`);
            stable rank with its standard error (what a randomised basis misses is estimated by random directions), participation
            ratio of the squares, effective rank (exponential of the entropy); the bound on the norm of what a randomised basis misses
            (`remainder`); products made. "ranks" has the rank at every threshold.
        tensors: for each weights, values [layer, row, value], and `_errors` of the same shape: how far the nearest singular value can
            be, which need not be the one with the same number (`TightPassConfig.tolerance`).

    Example:
        >>> found = sepcap.tight_pass(model, "all", "attn")  # doctest: +SKIP
        >>> found.by_layer[["weights", "layer", "rank", "rank_low", "rank_high", "bound"]]  # doctest: +SKIP
    """

    STUDY: ClassVar[str] = "tight-pass"
    TITLE: ClassVar[str] = "Is there a tight pass?"
    FIGURES: ClassVar[Figures] = {
        "ranks": ("Rank over layers", "tight_pass_ranks"),
        "spectra": ("Singular values", "tight_pass_spectra"),
    }

    @cached_property
    def by_layer(self) -> pd.DataFrame:
        """One row per weights and layer: means over rows, with the ends `_low` and `_high` of 95% intervals (Student's t over rows).

        Intervals end where nothing can lie beyond: at 0 for the rank and at 1 for the other measures, and at the largest rank possible.
        Where this differs from row to row (active neurons of an mlp), it is known no better than its mean over rows, and the upper end
        of its own interval is where the others end.

        Where the rank of any row is only a lower bound (`at_least`), so is its mean, which has no interval (NaN).
        """
        table, found = self.tables["jacobians"], []
        for weights, layer in dict.fromkeys(zip(table["weights"], table["layer"], strict=True)):
            rows = table[(table["weights"] == weights) & (table["layer"] == layer)]
            at_least, most = bool(np.any(rows["at_least"])), mean_and_interval(rows["bound"])[2]
            line: dict[str, Any] = {"weights": weights, "layer": layer, "rows": len(rows)}
            for name in ("rank", "bound", "stable_rank", "participation_ratio", "effective_rank", "largest"):
                mean, *ends = mean_and_interval(rows[name])
                if name in LEAST:
                    ends = [math.nan, math.nan] if name == "rank" and at_least else np.clip(ends, LEAST[name], max(most, mean)).tolist()
                line |= dict(zip((name, f"{name}_low", f"{name}_high"), (mean, *ends), strict=True))
            found.append(line | {"at_least": at_least})
        return pd.DataFrame(found)

    @property
    def settled_threshold(self) -> float | None:
        """The smallest of the reported thresholds at which no rank is only a lower bound; None where there is none."""
        ranks = self.tables["ranks"]
        open_there = set(ranks.loc[ranks["at_least"], "threshold"])
        return min(set(ranks["threshold"]) - open_there, default=None)

    def at(self, threshold: float) -> "TightPass":
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
        return TightPass({**self.config, "threshold": threshold}, {**self.tables, "jacobians": counted_there}, self.tensors)

    def against_control(self, measure: str = "rank") -> pd.DataFrame:
        """Trained minus random weights on the same rows, per layer, with the 95% interval of the mean over rows.

        Of the rank it is NaN where that of any row, trained or random, is only a lower bound: their difference would be one of how many
        directions were tried. `found.at(found.settled_threshold)` compares ranks that are known.

        Raises:
            ValueError: an unknown measure, or a study without control.
        """
        return self._differences(measure)

    def _differences(self, measure: str, intervals: int = 1) -> pd.DataFrame:
        """`against_control`, with as many intervals holding together (Bonferroni)."""
        if measure not in COLUMNS:
            raise unknown("measure", measure, COLUMNS)
        if not self.config["control"]:
            raise ValueError("there is no control: the study was made with control=False")
        table = self.tables["jacobians"].set_index(["weights", "layer", "row"]).sort_index()
        lines = table[measure].astype(float)
        if measure == "rank":
            lines = lines.mask(table["at_least"].astype(bool))
        names = ("difference", "low", "high")
        return pd.DataFrame(
            {"layer": layer, **dict(zip(names, mean_and_interval(lines[TRAINED, layer] - lines[RANDOM, layer], intervals), strict=True))}
            for layer in self.config["layer"]
        )

    def summary(self) -> list[str]:
        """The narrowest and the widest layer, and both against what is possible and against random weights; no interval of a layer that is
        picked for its value, `by_layer` has those of layers named beforehand.

        Ranks that are only lower bounds are said to be that, and not compared.
        """
        c = self.config
        said = [
            f"{'Attention' if c['part'] == 'attn' else 'Mlp'} blocks of {c['model']} at {counted(c['tokens'], 'token')}, "
            f"{counted(c['rows'], 'row')} of {c['task']}: the Jacobian without the residual connection has {c['size']:,} rows and "
            f"columns; a direction counts when its singular value is above {c['threshold']:g} of the largest."
        ]
        if not self.tables["jacobians"]["at_least"].to_numpy().any():
            return [*said, *self._compared(("rank", "stable_rank"))]
        said.append(self._unsettled())
        coarser = self.settled_threshold
        if coarser is None:
            return [*said, *self._compared(("stable_rank",))]
        said.append(f"At {coarser:g} of the largest every rank is settled; the ranks that follow are counted there.")
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
        """Which layers are lowest and highest by the first of the measures, and all of them against random weights."""
        first = measures[0]
        trained = [line for line in self.by_layer.to_dict("records") if line["weights"] == TRAINED]
        known = sorted((line for line in trained if not math.isnan(line[first])), key=lambda line: line[first])
        ends = [("only layer", trained[0])]
        if len(trained) > 1:
            ends = list(zip(ENDS[first], (known[0], known[-1]), strict=True)) if known else []
        if len(trained) > 1:  # a layer that is picked for its value has no interval of one that is named beforehand
            ends = [(how, line | {f"{name}_low": math.nan for name in measures}) for how, line in ends]
        said = [f"The {how} is {line['layer']}: {_of_layer(line, measures)}." for how, line in ends]
        return said + [self._against(measure) for measure in measures if self.config["control"]]

    def _against(self, measure: str) -> str:
        """One measure against random weights, in a sentence."""
        differences, name = self._differences(measure, len(self.config["layer"])), measure.replace("_", " ")
        table = self.by_layer.dropna(subset=[measure])
        trained, random = (table.loc[table["weights"] == weights, measure].to_numpy() for weights in (TRAINED, RANDOM))
        if not len(trained) or not len(random):
            return f"The {name} is not compared with random weights: there is none where nothing passes."
        said = f"With random weights the {name} is {random.mean():,.4g} on average over the layers; trained it is "
        if self.config["rows"] == 1:
            return f"{said}{trained.mean():,.4g} (one row of tokens gives no interval)."
        lower, higher = (differences["high"].to_numpy() < 0).sum(), (differences["low"].to_numpy() > 0).sum()
        return (
            f"{said}lower in {lower} and higher in {higher} of {counted(len(differences), 'layer')} (intervals of the difference over "
            "rows that hold together for all layers with 95%, Bonferroni, leave 0 out)."
        )


def _of_layer(line: Mapping[Any, Any], measures: tuple[str, ...]) -> str:
    """The measures of a layer; those that there are."""
    if line["largest"] == 0:
        return "nothing passes it"
    none = math.isnan(line["stable_rank"])
    stable = "no stable rank, as nothing passes at some rows" if none else f"stable rank {between(line, 'stable_rank')}"
    if "rank" not in measures:
        return stable
    return f"rank {between(line, 'rank')} of {line['bound']:,.4g} possible ({100 * line['rank'] / line['bound']:.0f}%); {stable}"


def between(line: Mapping[Any, Any], name: str) -> str:
    """A mean and its interval, where there is one, in a sentence."""
    low, high = line[f"{name}_low"], line[f"{name}_high"]
    return f"{line[name]:,.4g}" + ("" if math.isnan(low) else f" [{low:,.4g}, {high:,.4g}]")


def mean_and_interval(values: Any, intervals: int = 1) -> tuple[float, float, float]:
    """Mean with its 95% interval by Student's t, one of several that hold together; NaN where one value tells nothing about others."""
    x = np.asarray(values, dtype=np.float64)
    half = t_factor(len(x), intervals) * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


@checked()
def tight_pass(
    model: Any,
    layer: Any = "all",
    part: str = "attn",
    *,
    out: str | Path | None = None,
    say: Callable[[str], Any] = tell,
    **options: Any,
) -> TightPass:
    """Singular values of the Jacobian ∂output/∂input of attention or mlp blocks, without the residual connection.

    The input is the residual stream where it enters the part (after attention, for the mlp of a sequential block) at n tokens,
    flattened to n·d_model numbers; the norm in front of the part belongs to the function. The output is what the part adds to the
    stream at the same tokens, after any norm that stands behind it (Gemma). BOS before the tokens is held fixed and not counted.

    Args:
        model: what `load_model` returns.
        layer: number of a layer, several, or "all".
        part: "attn" or "mlp".
        out: folder that holds every Jacobian's spectrum as soon as it is there; the same call goes on in it.
        say: receives what is about to happen, and the memory and time it takes, before it does; also that "auto" takes the leading
            values only. `sepcap.plan_tight_pass(model, config).cost()` says the same without doing it.
        options: the other fields of `TightPassConfig`: tokens, task, rows, method, k, tolerance, threshold, norm, dtype, control, seed.

    Returns:
        TightPass with `.tables`, `.by_layer`, `.against_control()`, `.summary()` and `.figure("ranks" | "spectra")`.

    Raises:
        ValueError: an option out of its range, a threshold within rounding, an image classifier, too little text.
        IndexError: a layer that does not exist.
        NotImplementedError: a HookedTransformer, a mixture of experts in float64.
        MemoryError: method="exact" where the Jacobian would not fit into the memory that is free.
        FileExistsError: `out` holds something else.

    Source: [OPT]; METHODS section 13.

    Example:
        >>> sepcap.tight_pass(model, "all", "attn", tokens=4, rows=6).figure()  # doctest: +SKIP
    """
    return measure_tight_pass(plan_tight_pass(model, make_config(layer=layer, part=part, **options)), out, say)


def make_config(**options: Any) -> TightPassConfig:
    """The configuration, or an error that names the option that there is none of."""
    known = [field.name for field in dataclasses.fields(TightPassConfig)]
    for name in options:
        if name not in known:
            raise unknown("option", name, known)
    return TightPassConfig(**options)


def measure_tight_pass(prepared: TightPassPlan, out: str | Path | None = None, say: Callable[[str], Any] | None = None) -> TightPass:
    """Compute every spectrum of a plan; with `out`, each is written before the next is begun, and those there are read."""
    found: dict[str, list[Found]] = {}
    with open_study(out, TightPass.STUDY, prepared.resolved) if out is not None else nullcontext() as pieces:
        finished = pieces is not None and is_finished(pieces)
        if say is not None:
            say(f"{out} is finished; nothing is computed again" if finished else prepared.cost())
        if pieces is not None and finished:
            return TightPass.load(pieces.folder)
        total = prepared.jacobians * prepared.products
        with progress(total=total, desc="Jacobians", unit="product", unit_scale=True) as bar:
            for weights in (TRAINED, RANDOM) if prepared.config.control else (TRAINED,):
                found[weights] = list(_of_weights(prepared, weights, pieces, bar))
    result = _gather(prepared, found)
    if out is not None:
        result.save(out)
    return result


def _of_weights(prepared: TightPassPlan, weights: str, pieces: Pieces | None, bar: Any) -> Iterator[Found]:
    model = prepared.model if weights == TRAINED else None
    for layer in prepared.layers:
        for row in range(len(prepared.rows)):
            ends_at = bar.n + prepared.products
            name = f"{weights}-{layer}-{row}"
            done = None if pieces is None else pieces.get(name)
            if done is None:
                model = untrained(prepared.model)(prepared.config.seed) if model is None else model
                done = _spectrum(prepared, model, weights, layer, row, bar.update)
                if pieces is not None:
                    pieces.put(name, *done)
            bar.update(ends_at - bar.n)
            yield done


def _spectrum(prepared: TightPassPlan, model: Any, weights: str, layer: int, row: int, count: Count) -> Found:
    c, size = prepared.config, prepared.resolved["size"]
    ids, kept = prepared.rows[row]
    with block_part(model, layer, c.part, ids, kept, norm=c.norm, dtype=DTYPES[c.dtype]) as part:
        chunk = chunk_of(part.product_bytes, size)
        if prepared.method == "randomized":
            products = jacobian_products(part.function, part.at, chunk, count)
            # directions of its own for every Jacobian: intervals over rows then hold what the directions leave to chance
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


def _gather(prepared: TightPassPlan, found: Mapping[str, list[Found]]) -> TightPass:
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
    return TightPass(prepared.resolved, {"jacobians": lines, "ranks": ranks}, tensors)
