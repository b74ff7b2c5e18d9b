"""Reproductions of published studies: published values beside measured ones (METHODS 11, 12)."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd

from sepcap.checks import checked
from sepcap.errors import unknown
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.models.loading.load import load_model
from sepcap.storage import html_card, make_folder, sole_writer
from sepcap.studies.ablations.figures import ablation_sweep
from sepcap.studies.ablations.random_neurons import CELLS, AblationSweep, sweep_ablation
from sepcap.studies.base.folder import PIECES, identity_of, study_config
from sepcap.studies.base.result import Figures
from sepcap.studies.base.runner import study
from sepcap.studies.base.text import documents_in_words
from sepcap.studies.overlaps.figures import overlap_ratios
from sepcap.studies.overlaps.study import Overlap, OverlapPlan, run_overlap
from sepcap.studies.pruning.check_run import is_left
from sepcap.studies.pruning.figures.areas import areas
from sepcap.studies.pruning.figures.drops import drop_against_drop
from sepcap.studies.pruning.plan import plan
from sepcap.studies.pruning.planned import RunsResult, name_study
from sepcap.studies.pruning.prune import execute
from sepcap.studies.pruning.run import Run, whole_run
from sepcap.studies.pruning.separability import Separability, costs_at
from sepcap.studies.reproduce.config import ReproductionConfig, Study, studies
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import check_context, sample_task

METRIC = "top1"
"""All published values are of top-1 accuracy."""

MADE = ("model_fingerprint", "dtype", "device", "versions", "created")
"""Fields on the provenance of a run in the configuration of a study."""

NOTHING = float("nan")


class Measured(NamedTuple):
    """A value, its interval over texts and its standard deviation over seeds; NaN if there is none."""

    value: float = NOTHING
    low: float = NOTHING
    high: float = NOTHING
    seeds_sd: float = NOTHING


@dataclass(frozen=True, eq=False)
class Reproduction(RunsResult):
    """One study on one model.

    Attributes:
        asked: the requested configuration.
        folder: folder of the runs.
        results: name of a run -> Run, AblationSweep or Overlap.
    """

    STUDY = "reproduce"
    TITLE = "Can a published result be reproduced?"
    FIGURES: ClassVar[Figures] = {"study": ("The figure of the study", areas)}

    asked: ReproductionConfig
    folder: Path
    results: Mapping[str, Any]

    @property
    def study(self) -> Study:
        """The stored study: title, source, note, configurations, published values."""
        return studies()[self.asked.study]

    @property
    def table(self) -> pd.DataFrame:
        """One row per quantity of this model, then one per published value of the paper's other models.

        Columns: study, model, quantity, measured, low, high, seeds_sd, published, source. `low` and `high` are a 95% bootstrap interval
        over the documents of the evaluation, for the seeds that were run; for overlaps one of Student's t over seeds. `seeds_sd` is the
        standard deviation over seeds, if there are several. `published` is a number, or text if the paper gives a range; NaN if nothing
        is published.
        """
        return self._table

    @cached_property
    def _table(self) -> pd.DataFrame:
        rows = list(ROWS[self.study.kind](self))
        rows += [
            self._row(model, quantity["quantity"], Measured(), published) | {"n_documents": pd.NA}
            for model in self.study.models
            if model != self.asked.model
            for quantity in self.study.quantities
            if (published := quantity["published"].get(model)) is not None
        ]
        return pd.DataFrame(rows).astype({"published": object, "n_documents": "Int64"})

    @cached_property
    def measured(self) -> dict[str, Measured | str]:
        """Quantity of a run -> value and interval, or the reason why there is none (a model that is never right cannot drop)."""
        found: dict[str, Measured | str] = {}
        for quantity in self.study.quantities if self.study.kind != "overlap" else ():
            try:
                found[quantity["quantity"]] = MEASURES[quantity["measure"]](self.results[quantity["run"]], quantity)
            except ValueError as error:
                found[quantity["quantity"]] = str(error)
        return found

    def _row(self, model: str, quantity: str, measured: Measured, published: Any = NOTHING) -> dict[str, Any]:
        row = {"study": self.study.name, "model": model, "quantity": quantity, "measured": measured.value}
        row |= {"low": measured.low, "high": measured.high, "seeds_sd": measured.seeds_sd}
        row["n_documents"] = pd.NA if self.n_documents is None else min(self.n_documents)
        return row | {"published": published, "source": self.study.source}

    @property
    def config(self) -> dict[str, Any]:
        """The requested configuration, and the provenance of its first run."""
        first = next(iter(self.results.values())).config
        made = {name: first[name] for name in MADE if name in first}
        made["n_documents"] = {name: result.config.get("n_documents") for name, result in self.results.items()}
        return {**_as_stored(self.asked), "source": self.study.source, **made, "model": self.asked.model}

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The one table by its name, with published values as text, since some are ranges."""
        return {"published-and-measured": self.table.astype({"published": str}).replace({"published": {"nan": ""}})}

    def summary(self) -> list[str]:
        """Every quantity of this model, measured and published."""
        said = [f"{self.study.title} ({self.study.source}), on {self.asked.model}. {self.asked.protocol()} {self.study.note}"]
        for row in self.table.to_dict("records"):
            if row["model"] == self.asked.model and isinstance(why := self.measured.get(row["quantity"]), str):
                said.append(f"{row['quantity'][0].upper()}{row['quantity'][1:]}: not measured, because {why}.")
            elif np.isfinite(row["measured"]):
                over = "seeds" if self.study.kind == "overlap" else "texts"
                interval = f" (95% interval over {over} {row['low']:.1f} to {row['high']:.1f})" if np.isfinite(row["low"]) else ""
                interval += f" (standard deviation over seeds {row['seeds_sd']:.1f})" if np.isfinite(row["seeds_sd"]) else ""
                published = "" if row["published"] != row["published"] else f"; published {row['published']}"
                of = "" if row["model"] == self.asked.model else f" ({row['model']})"
                said.append(f"{row['quantity'][0].upper()}{row['quantity'][1:]}{of}: measured {row['measured']:.1f}{interval}{published}.")
        return said

    @classmethod
    def _load_run(cls, folder: Path) -> Any:
        kind = studies()[_asked(folder.parent).study].kind
        return {"prune": whole_run, "ablate": AblationSweep.load, "overlap": Overlap.load}[kind](folder)

    @classmethod
    def _from_runs(cls, folder: Path, runs: Mapping[str, Any]) -> "Reproduction":
        return cls(_asked(folder), folder, runs)

    @checked()
    def figure(self, kind: str | None = None, **options: Any) -> Any:
        """The study's figure: drop against drop, areas, the protocol, or overlaps."""
        if kind not in (None, *self.FIGURES):
            raise unknown("figure", kind, self.FIGURES)
        if self.study.name == "sep-areas":
            return areas(self.results, **options)
        if self.study.kind == "prune":
            return drop_against_drop(self.results, **options)
        if self.study.kind == "ablate":
            return ablation_sweep(self.results["protocol"], **options)
        return overlap_ratios(self.results["overlap"], **options)

    def __repr__(self) -> str:
        parts = (f"{self.study.name} {self.study.source}", self.asked.model, documents_in_words(self.n_documents))
        return f"Reproduction({', '.join(filter(None, parts))}, {len(self.results)} runs in {str(self.folder)!r})"

    def _repr_html_(self) -> str:
        how = {"source": self.study.source, "folder": self.folder, "documents": documents_in_words(self.n_documents)}
        how |= {"protocol": self.asked.protocol(), "note": self.study.note}
        return html_card(self.study.title, how, self.table)


@study(ReproductionConfig, loads=False)
@checked()
def reproduce(
    model: str | Path | None, config: ReproductionConfig, *, out: str | Path = "runs/reproduce", say: Callable[[str], Any]
) -> Reproduction:
    """Reproduce a study of a paper, as it is stored in assets/studies.json.

    Every run has its own folder in `out/study/model-budget`: the same call resumes an interrupted study, and finished runs are not
    recomputed. One model is in memory at a time.

    Args:
        model: "default" (with the offline tasks), a folder, or a hub name (with the paper's tasks); default is `config.model`.
        config: a `ReproductionConfig`; its fields can also be given as keywords.
        out: folder of all studies.
        progress: True announces the work and its cost and shows bars, False shows nothing; a function receives the announcements.

    Returns:
        Reproduction with `.table`, `.figure()`, `.save(folder)` and the runs in `.results`.

    Raises:
        ValueError: an unknown study, budget or task.
        FileExistsError: `out` contains runs of another configuration.

    Source: [SP] table 2 and figure 1; [SEP]; [PEAK]; [MOD].

    Example:
        >>> sepcap.reproduce(study="sp-table2").table  # doctest: +SKIP
    """
    stored = studies()[config.study]
    # read once, not once for every run
    roles = {role: load_task(task) for role, task in (stored.tasks_of(config.model) | dict(config.tasks)).items()}
    if stored.kind == "overlap":
        # pairs are named by the names of the tasks in the study
        roles = {role: replace(task, name=role) for role, task in roles.items()}
    configs = replace(config, tasks=roles).runs()
    named = replace(config, tasks={role: task if isinstance(task, str) else roles[role].name for role, task in config.tasks.items()})
    label = config.chosen_budget if isinstance(config.chosen_budget, str) else "own-budget"
    folder = Path(out) / config.study / f"{Path(config.model).name}-{label}"
    say(f"{stored.title} ({stored.source}), on {config.model}. {config.protocol()} {stored.note}")
    make_folder(folder)
    with sole_writer(folder):
        # the identity of a run is known once it is sampled
        name_study(folder, Reproduction.STUDY, dict.fromkeys(configs), _as_stored(named))
        load = partial(load_model, config.model, dtype=config.dtype, device=config.device)
        return Reproduction(config, folder, RUNNERS[stored.kind](load, configs, folder, say))


Load = Callable[..., Any]
"""`load_model` with the requested model, precision and device."""


def _as_stored(asked: ReproductionConfig) -> dict[str, Any]:
    budget = asked.chosen_budget if isinstance(asked.chosen_budget, str) else dict(asked.chosen_budget)
    fields = {name: getattr(asked, name) for name in ("study", "model", "dtype", "batch_size")}
    return {"asked": fields | {"budget": budget, "tasks": {role: str(task) for role, task in asked.tasks.items()}}}


def _asked(folder: Path) -> ReproductionConfig:
    """The configuration in the folder of a reproduction."""
    return ReproductionConfig(**study_config(folder, Reproduction.STUDY)["asked"])


def _prune(load: Load, configs: Mapping[str, Any], folder: Path, say: Callable[[str], None]) -> dict[str, Run]:
    model = load()
    plans = {name: plan(model, config) for name, config in configs.items()}
    folders = {name: folder / name for name in plans}
    left = [name for name, path in folders.items() if is_left(path, plans[name].resolved)]
    name_study(folder, Reproduction.STUDY, {name: identity_of(prepared.resolved) for name, prepared in plans.items()}, whole=False)
    for name in left:
        say(f"{name}: {plans[name].cost()}")
    _say_minutes(say, model, [plans[name].work() for name in left], *(next(iter(plans[name].evaluate.values())) for name in left[:1]))
    return {name: execute(prepared, folders[name]) for name, prepared in plans.items()}


def _ablate(load: Load, configs: Mapping[str, Any], folder: Path, say: Callable[[str], None]) -> dict[str, AblationSweep]:
    model = load()
    results = {}
    for name, config in configs.items():
        sample = sample_task(model, load_task(config.task), "evaluate", config.tokens, check_context(model, config.context))
        sets = config.steps * len(config.seeds)
        left = sets - len(list((folder / name / PIECES / CELLS).glob("*.safetensors")))
        passes = left * len(config.kinds) + (left == sets)
        tokens = passes * sample.tokens + config.reference_tokens * (left == sets)
        if left:
            say(
                f"{name}: {model.cfg.model_name}, random {config.site} neurons in {config.steps} steps, {len(config.seeds)} seeds, "
                f"{', '.join(config.kinds)} on {sample.task}; {tokens / 1e6:.3g} M tokens through the model"
            )
        _say_minutes(say, model, [tokens] * bool(left), sample)
        results[name] = sweep_ablation(model, config, out=folder / name, progress=str)
    return results


def _overlap(load: Load, configs: Mapping[str, Any], folder: Path, say: Callable[[str], None]) -> dict[str, Overlap]:
    def announce(prepared: OverlapPlan, model: Any, left: int) -> None:
        say(prepared.cost())
        first = next(iter(prepared.samples.values()))
        _say_minutes(say, model, [left] * (left > 0), next(iter(first.values())))

    return {name: run_overlap(load, config, folder / name, announce) for name, config in configs.items()}


def _say_minutes(say: Callable[[str], None], model: Any, tokens: list[int], sample: Any = None) -> None:
    if not tokens:
        say("Everything is finished; nothing is recomputed.")
        return
    few = sample.take(range(min(len(sample.rows), 16)))
    seconds = []
    for _ in range(2):  # the first warms up
        started = time.perf_counter()
        evaluate_sample(model, few, quiet=True)
        seconds.append(time.perf_counter() - started)
    speed = few.tokens / seconds[-1]
    say(f"About {sum(tokens) / speed / 60:.1f} minutes at the {speed:,.0f} tokens per second just measured here.")


RUNNERS: dict[str, Callable[..., dict[str, Any]]] = {"prune": _prune, "ablate": _ablate, "overlap": _overlap}


def _max_drop(run: Run, quantity: Mapping[str, Any]) -> Measured:
    found = run.separability(METRIC)
    return Measured(found.max_drop, *found.max_drop_interval)


def _retain_cost(run: Run, quantity: Mapping[str, Any]) -> Measured:
    found = run.separability(METRIC)
    if not np.isfinite(costs_at(found.forget, found.retain, quantity["at"])):
        return Measured()
    return Measured(found.retain_cost(quantity["at"]), *found.retain_cost_interval(quantity["at"]))


def _percent(run: Run, quantity: Mapping[str, Any]) -> Measured:
    found = _separability(run, quantity)
    return Measured(found.percent, *found.percent_interval)


def _area(run: Run, quantity: Mapping[str, Any]) -> Measured:
    found = _separability(run, quantity)
    return Measured(found.area, *found.interval)


def _separability(run: Run, quantity: Mapping[str, Any]) -> Separability:
    return run.separability(METRIC, specific=quantity.get("specific", "forget"))


def _top1_at_half(result: AblationSweep, quantity: Mapping[str, Any]) -> Measured:
    of_kind = result.by_kind.query("kind == @quantity['of']").to_dict("records")
    # a kind that the budget leaves out has no row
    return Measured(*(100 * of_kind[0][f"top1_at_50{end}"] for end in ("", "_low", "_high", "_seeds_sd"))) if of_kind else Measured()


MEASURES: dict[str, Callable[[Any, Mapping[str, Any]], Measured]] = {
    "max_drop": _max_drop,
    "retain_cost": _retain_cost,
    "percent": _percent,
    "area": _area,
    "top1_at_half": _top1_at_half,
}
"""Measures of one run, by their names in the stored study."""


def _of_runs(result: Reproduction) -> Iterator[dict[str, Any]]:
    for quantity in result.study.quantities:
        name = quantity["quantity"]
        measured = Measured() if isinstance(found := result.measured[name], str) else found
        yield result._row(result.asked.model, name, measured, quantity["published"].get(result.asked.model, NOTHING))


PERCENT = {"share": 100.0, "iou": 100.0}
"""Columns of an overlap that the table gives in percent."""


def _of_pairs(result: Reproduction) -> Iterator[dict[str, Any]]:
    for overlaps in result.results.values():
        for pair in overlaps.estimates().to_dict("records"):
            model = result.asked.model if pair["weights"] == "trained" else f"{result.asked.model}, random weights"
            for quantity in result.study.quantities:
                measure, unit = quantity["measure"], PERCENT.get(quantity["measure"], 1.0)
                value, low, high = (unit * float(pair.get(name, NOTHING)) for name in (measure, f"{measure}_low", f"{measure}_high"))
                words = f"{quantity['quantity']}, {pair['fraction']:.3g} of {pair['site']}, {pair['first']} and {pair['second']}"
                yield result._row(model, words, Measured(value, low, high))


ROWS: dict[str, Callable[[Reproduction], Iterator[dict[str, Any]]]] = {"prune": _of_runs, "ablate": _of_runs, "overlap": _of_pairs}
