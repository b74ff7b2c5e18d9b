"""Through how many directions attention or an mlp passes anything: the spectrum of its Jacobian (METHODS 13, "Tight pass")."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from sepcap.errors import unknown
from sepcap.experiments.result import Figures, Pieces, StudyResult, open_study
from sepcap.experiments.tight_pass_config import TightPassConfig
from sepcap.experiments.tight_pass_plan import TightPassPlan, chunk_of, plan_tight_pass
from sepcap.models.load import DTYPES
from sepcap.models.parts import block_part, widest
from sepcap.models.untrained import untrained
from sepcap.statistics.spectrum import Count, Spectrum, all_values, jacobian, jacobian_blocks, jacobian_products, leading_values

TRAINED, RANDOM = "trained", "random"

Found = tuple[dict[str, Tensor], dict[str, Any]]
"""Values and errors of one Jacobian, and its lines in the tables."""

COLUMNS = ("largest", "rank", "at_least", "bound", "stable_rank", "participation_ratio", "effective_rank", "remainder", "products")


@dataclass(frozen=True, eq=False, repr=False)
class TightPass(StudyResult):
    """Singular values of the Jacobians of one part of the blocks, over layers and rows of tokens.

    Attributes:
        tables: "jacobians" has one row per weights ("trained", "random"), layer and row of tokens: the largest singular value; the
            rank at the threshold and whether it is only a lower bound (`at_least`); the largest rank that the sizes allow (`bound`);
            stable rank, participation ratio of the squares, effective rank (exponential of the entropy); the bound on what a
            randomised basis misses; products made. "ranks" has the rank at every threshold.
        tensors: for each weights, values [layer, row, value], and `_errors` of the same shape.

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
        """One row per weights and layer: means over rows, with the ends `_low` and `_high` of 95% intervals (Student's t over rows)."""
        table, found = self.tables["jacobians"], []
        for weights, layer in dict.fromkeys(zip(table["weights"], table["layer"], strict=True)):
            rows = table[(table["weights"] == weights) & (table["layer"] == layer)]
            line: dict[str, Any] = {"weights": weights, "layer": layer, "rows": len(rows)}
            for name in ("rank", "bound", "stable_rank", "participation_ratio", "effective_rank", "largest"):
                line |= dict(zip((name, f"{name}_low", f"{name}_high"), mean_and_interval(rows[name]), strict=True))
            found.append(line | {"at_least": bool(rows["at_least"].any())})
        return pd.DataFrame(found)

    def against_control(self, measure: str = "rank") -> pd.DataFrame:
        """Trained minus random weights on the same rows, per layer, with the 95% interval of the mean over rows.

        Raises:
            ValueError: an unknown measure, or a study without control.
        """
        if measure not in COLUMNS:
            raise unknown("measure", measure, COLUMNS)
        if not self.config["control"]:
            raise ValueError("there is no control: the study was made with control=False")
        lines = self.tables["jacobians"].set_index(["weights", "layer", "row"]).sort_index()[measure].astype(float)
        names = ("difference", "low", "high")
        return pd.DataFrame(
            {"layer": layer, **dict(zip(names, mean_and_interval(lines[TRAINED, layer] - lines[RANDOM, layer]), strict=True))}
            for layer in self.config["layer"]
        )

    def summary(self) -> list[str]:
        """The narrowest and the widest layer, and both against what is possible and against random weights."""
        c, table = self.config, self.by_layer
        said = [
            f"{'Attention' if c['part'] == 'attn' else 'Mlp'} blocks of {c['model']} at {c['tokens']} tokens, {c['rows']} rows of "
            f"{c['task']}: the Jacobian without the residual connection has {c['size']:,} rows and columns; a direction counts when its "
            f"singular value is above {c['threshold']:g} of the largest."
        ]
        trained = [line for line in table.to_dict("records") if line["weights"] == TRAINED]
        ends = {"narrowest": min(trained, key=_rank), "widest": max(trained, key=_rank)} if len(trained) > 1 else {"only": trained[0]}
        for how, line in ends.items():
            more = "at least " if line["at_least"] else ""
            said.append(
                f"The {how} layer is {line['layer']}: rank {more}{between(line, 'rank')} of {line['bound']:,.4g} possible "
                f"({more}{100 * line['rank'] / line['bound']:.0f}%); stable rank {between(line, 'stable_rank')}."
            )
        for measure in ("rank", "stable_rank") if c["control"] else ():
            differences = self.against_control(measure)
            lower, higher = (differences["high"].to_numpy() < 0).sum(), (differences["low"].to_numpy() > 0).sum()
            mean = table.loc[table["weights"] == RANDOM, measure].to_numpy().mean()
            said.append(
                f"With random weights the {measure.replace('_', ' ')} is {mean:,.4g} on average over the layers; trained it is lower in "
                f"{lower} and higher in {higher} of {len(differences)} layers (the 95% interval of the difference over rows leaves 0 out)."
            )
        return said


def _rank(line: Mapping[Any, Any]) -> float:
    return line["rank"]


def between(line: Mapping[Any, Any], name: str) -> str:
    """A mean and its interval in a sentence."""
    return f"{line[name]:,.4g} [{line[f'{name}_low']:,.4g}, {line[f'{name}_high']:,.4g}]"


def mean_and_interval(values: Any) -> tuple[float, float, float]:
    """Mean with its 95% interval by Student's t; NaN where one value tells nothing about others."""
    x = np.asarray(values, dtype=np.float64)
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def tight_pass(model: Any, layer: Any = "all", part: str = "attn", *, out: str | Path | None = None, **options: Any) -> TightPass:
    """Singular values of the Jacobian ∂output/∂input of attention or mlp blocks, without the residual connection.

    The input is the residual stream where it enters the part (after attention, for the mlp of a sequential block) at n tokens,
    flattened to n·d_model numbers; the norm in front of the part belongs to the function. The output is what the part adds to the
    stream at the same tokens, after any norm that stands behind it (Gemma). BOS before the tokens is held fixed and not counted.

    Args:
        model: what `load_model` returns.
        layer: number of a layer, several, or "all".
        part: "attn" or "mlp".
        out: folder that holds every Jacobian's spectrum as soon as it is there; the same call goes on in it.
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
    return measure_tight_pass(plan_tight_pass(model, make_config(layer=layer, part=part, **options)), out)


def make_config(**options: Any) -> TightPassConfig:
    """The configuration, or an error that names the option that there is none of."""
    known = [field.name for field in dataclasses.fields(TightPassConfig)]
    for name in options:
        if name not in known:
            raise unknown("option", name, known)
    return TightPassConfig(**options)


def measure_tight_pass(prepared: TightPassPlan, out: str | Path | None = None) -> TightPass:
    """Compute every spectrum of a plan; with `out`, each is written before the next is begun, and those there are read."""
    found: dict[str, list[Found]] = {}
    with open_study(out, TightPass.STUDY, prepared.resolved) if out is not None else nullcontext() as pieces:
        total = prepared.jacobians * prepared.products
        with tqdm(total=total, desc="Jacobians", unit="product", unit_scale=True, leave=False, delay=2, disable=None) as bar:
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
            spectrum = leading_values(products, min(c.k, size), tolerance=c.tolerance, seed=c.seed)
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
