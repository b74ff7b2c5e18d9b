"""Neuron sets of several tasks and what they have in common, trained beside randomly initialised (METHODS 12)."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from sepcap.checks import checked
from sepcap.experiments.neuron_sets_config import OverlapConfig
from sepcap.experiments.result import Figures, Pieces, StudyResult, as_json, is_finished
from sepcap.experiments.several_tasks import NamedTasks, resolved, scores_of, statistics_of, study_folder
from sepcap.models.load import load_model
from sepcap.models.sites import site_shape
from sepcap.models.untrained import untrained
from sepcap.progress import tell
from sepcap.selection.neurons import NeuronSet, how_many
from sepcap.selection.overlap import overlap
from sepcap.selection.score import Scores
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.samples import check_context

TRAINED = "trained"
"""The model that was asked about, in the column `model`."""

HEADS_AT = "attn_pre_out"
"""Where heads are scored."""


class Overlaps(StudyResult):
    """Overlaps of the neuron sets of several tasks, of the trained model and of randomly initialised ones.

    Attributes:
        config: the resolved configuration.
        tables: "overlaps", one row per model, site, fraction, pair of tasks and layer, and one whose `layer` is missing: the total.
            Columns: model, site, fraction, first, second, layer, those of `sepcap.selection.overlap.overlap` (`share` is |A∩B|/|A|, A
            the set of `first`), `share_of_second` |A∩B|/|B|, `ratio_in_layers` (totals only: to what chance gives when each set keeps
            its numbers per layer, Σ |A_l|·|B_l|/N_l), and `log10_p_corrected`, Bonferroni over all pairs, sites, fractions and layers
            of a model. Of site "heads" the numbers are of heads.
        tensors: scores, from which `neurons` cuts sets of any size.

    Example:
        >>> found = sepcap.overlaps(model, sepcap.OverlapConfig(tokens=10_000), out="runs/overlaps")  # doctest: +SKIP
        >>> found.totals().query("fraction == 0.02")[["model", "site", "first", "second", "ratio"]]  # doctest: +SKIP
    """

    STUDY = "overlaps"
    TITLE = "What do the neuron sets of several tasks have in common?"
    FIGURES: ClassVar[Figures] = {
        "maps": ("Overlap of every two tasks", "overlaps"),
        "ratios": ("Overlap times chance", "overlap_ratios"),
        "layers": ("Overlap per layer", "overlap_layers"),
    }

    @property
    def table(self) -> pd.DataFrame:
        """The overlaps of all layers and in total."""
        return self.tables["overlaps"]

    @property
    def models(self) -> list[str]:
        """Names in the column `model`: "trained", then the controls."""
        return list(dict.fromkeys(self.table["model"]))

    def totals(self) -> pd.DataFrame:
        """The rows that are of all layers together."""
        return self.table.query("layer.isna()").reset_index(drop=True)

    def neurons(self, task: str, fractions: Mapping[str, float], model: str = TRAINED) -> NeuronSet:
        """The set of a task, cut from the scores of the study.

        Args:
            task: its name.
            fractions: site -> share; any share, of the sites of the study.
            model: a name of the column `model`.
        """
        keys = {site: tensor_name(model, task, site) for site in dict.fromkeys(_scored(fractions))}
        if missing := [key for key in keys.values() if key not in self.tensors]:
            held = ", ".join(sorted(self.tensors))
            raise ValueError(f"no scores {missing[0]!r} in this study; there are {held}")
        return Scores({site: self.tensors[key] for site, key in keys.items()}).top(fractions)

    def summary(self) -> list[str]:
        """Per site, at the smallest and the largest share: the pairs with most and least in common, against chance and the controls."""
        totals = self.totals()
        m = _tests(self.table.query("model == @TRAINED"))
        said = [
            f"{len(self.config['tasks'])} tasks scored against {self.config['retain']} by {self.config['importance']}; "
            f"p-values are Bonferroni-corrected for the {m:,} tests of a model."
        ]
        for site in self.config["sites"]:
            for fraction in sorted({min(self.config["fractions"]), max(self.config["fractions"])}):
                here = totals.query("site == @site and fraction == @fraction")
                trained = here.query("model == @TRAINED")
                most, least = (_of_pair(here, trained.loc[trained["ratio"].agg(pick)]) for pick in ("idxmax", "idxmin"))
                words = f"in common {most}" if len(trained) == 1 else f"most in common {most}; least {least}"
                said.append(f"{site}, the highest {100 * fraction:.3g}%: {words}.")
        return said


def _of_pair(here: pd.DataFrame, row: Any) -> str:
    control = here[(here["model"] != TRAINED) & (here["first"] == row["first"]) & (here["second"] == row["second"])]["ratio"]
    seeds = f"{len(control)} seed{'s' * (len(control) != 1)}"
    span = " to ".join(dict.fromkeys(f"{end:.2f}" for end in (control.min(), control.max())))
    beside = f"randomly initialised {span} times ({seeds})" if len(control) else "no control was made"
    return (
        f"{row['first']} and {row['second']}, {row['both']:,} of {row['a']:,} ({100 * row['share']:.0f}%), {row['ratio']:.2f} times chance "
        f"(corrected p {told_p(row['log10_p_corrected'])}; {beside})"
    )


def told_p(log10_p: float) -> str:
    """A p-value in words, from its logarithm.

    >>> told_p(0.0), told_p(-1.3), told_p(-412.25)
    ('= 1', '= 0.05', '= 10^−412.2')
    """
    if np.isnan(log10_p):
        return "undefined"
    return f"= {10**log10_p:.2g}" if log10_p > -3 else f"= 10^−{-log10_p:.1f}"


def tensor_name(model: str, task: str, site: str) -> str:
    """Name of the scores of one task at one site."""
    return f"{model} | {task} | {site}"


@dataclass(frozen=True, eq=False)
class OverlapPlan:
    """Everything the selection needs, sampled and checked; nothing is written yet, and no model is held.

    Attributes:
        config, tasks, samples: what is collected.
        resolved: the configuration as its folder keeps it.
        shapes: site -> shape over the whole model.
        control: makes the randomly initialised model of a seed.
    """

    config: OverlapConfig
    tasks: NamedTasks
    samples: dict[str, TokenSample]
    resolved: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    control: Callable[[int], Any]

    @property
    def labels(self) -> dict[str, int | None]:
        """Name of every model -> the seed of a control."""
        return {TRAINED: None} | {f"random weights, seed {seed}": seed for seed in self.config.control_seeds}

    def folder(self, out: Path, label: str) -> Path:
        """Where the statistics of one model lie."""
        return out / "statistics" / ("trained" if self.labels[label] is None else f"random-{self.labels[label]}")

    def left(self, out: Path) -> int:
        """Tokens that are still to go through models."""
        missing = [
            sample.tokens
            for label in self.labels
            for i, sample in enumerate(self.samples.values())
            if not (self.folder(out, label) / f"{i}.safetensors").exists()
        ]
        return sum(missing)

    def cost(self) -> str:
        """What will be done and cost, in one sentence."""
        c = self.config
        sites = ", ".join(f"{int(np.prod(shape)):,} {site} neurons" for site, shape in self.shapes.items())
        tokens = len(self.labels) * sum(sample.tokens for sample in self.samples.values())
        bytes_ = len(self.labels) * len(self.samples) * sum(int(np.prod(shape)) for shape in self.shapes.values()) * 56
        return (
            f"{self.resolved['model']}: select {', '.join(f'{f:.3g}' for f in c.fractions)} of {sites} for {', '.join(self.tasks.names)} "
            f"against {self.tasks.retain_name}, by {c.importance}, with {len(c.control_seeds)} randomly initialised controls; "
            f"{tokens / 1e6:.3g} M tokens through models, about {bytes_ / 1e6:.2g} MB on disk"
        )


def plan_overlaps(model: Any, config: OverlapConfig) -> OverlapPlan:
    """Load tasks and tokens, and check that every selection can be made."""
    if not isinstance(config, OverlapConfig):
        raise TypeError(f"config is a {type(config).__name__}; give a sepcap.OverlapConfig")
    tasks = NamedTasks.of(config.tasks, config.retain)
    shapes = {site: site_shape(model, site) for site in dict.fromkeys(_scored(config.sites))}
    for site in config.sites:
        units = shapes[HEADS_AT][:2] if site == "heads" else shapes[site]
        for fraction in config.fractions:
            how_many(fraction, int(np.prod(units)), site)
    samples = tasks.samples(model, "collect", config.tokens, check_context(model, config.context))
    names = {"tasks": tasks.names, "retain": tasks.retain_name}
    return OverlapPlan(config, tasks, samples, resolved(model, config, names, {"collect": samples}), shapes, untrained(model))


@checked()
def overlaps(
    model: Any = None, config: OverlapConfig | None = None, *, out: str | Path | None = None, say: Callable[[str], None] = tell
) -> Overlaps:
    """Select the neurons of several tasks and compare every two sets, in the trained model and in randomly initialised ones.

    One pass per task and model; sets of all sizes are cut from the same scores. With `out`, the statistics of every task are written
    before the next is collected: the same call goes on where an interrupted one stopped, and a finished study is read.

    Args:
        model: what `load_model` returns; default is to load `config.model`, which then goes before the control is made.
        config: what to do.
        out: folder of the study; without one, nothing is kept.
        say: receives what is about to happen and cost, before it does.

    Returns:
        Overlaps with `.table`, `.totals()`, `.neurons(task, fractions)`, `.summary()` and `.figure()`.

    Raises:
        ValueError: a share that selects nothing, tasks of the same data or name, too little text.
        FileExistsError: the folder holds another configuration (the differing fields are named).

    Source: METHODS section 12; [MOD].

    Example:
        >>> import sepcap
        >>> config = sepcap.OverlapConfig(tasks=("local-python", "local-cpp"), fractions=(0.02, 0.1), tokens=10_000)
        >>> sepcap.overlaps(model, config).figure("maps", measure="iou", fraction=0.1)  # doctest: +SKIP
    """
    config = config or OverlapConfig()
    load = partial(load_model, config.model) if model is None else lambda: model

    def announce(prepared: OverlapPlan, _model: Any, left: int) -> None:
        say(prepared.cost() if left else f"{out}: every task is collected; nothing goes through models again")

    return run_overlaps(load, config, out, announce)


def run_overlaps(
    load: Callable[[], Any], config: OverlapConfig, out: str | Path | None, announce: Callable[[OverlapPlan, Any, int], None]
) -> Overlaps:
    """`overlaps` of a model that is loaded here, so that it is gone when the control is made.

    Args:
        load: gives the model.
        config: what to do.
        out: folder of the study, or None.
        announce: receives the plan, the model and the number of tokens that are left, before the work begins.
    """
    model = load()
    prepared = plan_overlaps(model, config)
    with study_folder(out, Overlaps, prepared.resolved) as pieces:
        announce(prepared, model, 0 if is_finished(pieces) else prepared.left(pieces.folder))
        if is_finished(pieces):
            return Overlaps.load(pieces.folder)
        scores = {TRAINED: _scores(prepared, model, pieces, TRAINED)}
        del model
        for label, seed in prepared.labels.items():
            if seed is not None:
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                scores[label] = _scores(prepared, prepared.control(seed), pieces, label)
    table = pd.concat([_table(config, label, of_model) for label, of_model in scores.items()], ignore_index=True)
    tensors = {
        tensor_name(label, task, site): values
        for label, of_model in scores.items()
        for task, of_task in of_model.items()
        for site, values in of_task.items()
    }
    result = Overlaps(as_json({"study": Overlaps.STUDY, **prepared.resolved}), {"overlaps": table}, tensors)
    return result if out is None else Overlaps.load(result.save(out))


def _scores(prepared: OverlapPlan, model: Any, pieces: Pieces, label: str) -> dict[str, Scores]:
    folder = prepared.folder(pieces.folder, label)
    statistics = statistics_of(model, prepared.samples, tuple(prepared.shapes), folder, prepared.config.batch_size)
    return scores_of(statistics, prepared.tasks, prepared.config.importance)


def _scored(sites: Any) -> list[str]:
    return [HEADS_AT if site == "heads" else site for site in sites]


def selected(scores: Scores, site: str, fraction: float) -> Bool[Tensor, "layer unit"]:
    """Which neurons of a site, or heads, are among the highest; heads are one unit each."""
    if site == "heads":
        return scores.top({"heads": fraction}).masks[HEADS_AT][..., 0]
    return scores.top({site: fraction}).masks[site].flatten(1)


def _table(config: OverlapConfig, label: str, scores: Mapping[str, Scores]) -> pd.DataFrame:
    """All overlaps of one model."""
    parts = []
    for site in config.sites:
        for fraction in config.fractions:
            # heads and neurons alike: a set is a mask of units per layer, which is the form of a mask of mlp neurons
            sets = {task: NeuronSet({"mlp": selected(of_task, site, fraction)}) for task, of_task in scores.items()}
            for first, second in combinations(sets, 2):
                where = {"model": label, "site": site, "fraction": fraction, "first": first, "second": second}
                parts.append(overlap(sets[first], sets[second]).assign(**where))
    table = pd.concat(parts, ignore_index=True)
    return _corrected(_more_columns(table))


COLUMNS = (
    "model", "site", "fraction", "first", "second", "layer", "neurons", "a", "b", "both", "share", "share_of_second", "iou", "ratio",
    "ratio_in_layers", "log10_p", "log10_p_corrected",
)  # fmt: skip


def _more_columns(table: pd.DataFrame) -> pd.DataFrame:
    total = table["layer"].isna()
    by_chance = table["a"] * table["b"] / table["neurons"]
    pair = [table[name] for name in ("site", "fraction", "first", "second")]
    in_layers: Any = by_chance.where(~total, 0.0).groupby(pair).transform("sum")
    with np.errstate(divide="ignore", invalid="ignore"):
        return table.assign(
            share_of_second=(table["both"] / table["b"]).where(table["b"] > 0),
            ratio_in_layers=(table["both"] / in_layers).where(total & (in_layers > 0)),
        )


def _tests(table: pd.DataFrame) -> int:
    return int(np.isfinite(table["log10_p"]).sum())


def _corrected(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(log10_p_corrected=bonferroni(table["log10_p"])).reindex(columns=list(COLUMNS))


def bonferroni(log10_p: Any) -> Any:
    """log10 of p-values, corrected for as many tests as there are p-values among them.

    In logarithms, because the smallest are below what a double can hold. It holds under any dependence, which sets that share
    layers, tasks and neurons have.

    >>> bonferroni(pd.Series([-3.0, -0.5] + [float("nan")])).round(3).tolist()
    [-2.699, -0.199, nan]
    """
    return (log10_p + np.log10(max(1, int(np.isfinite(log10_p).sum())))).clip(upper=0.0)
