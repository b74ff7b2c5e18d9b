"""Comparison of pruning methods: site, importance, basis and offset, against random neurons (METHODS 10, 11)."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from sepcap.checks import checked
from sepcap.errors import CorruptFile, unknown
from sepcap.interventions.deletion import check_output_biases
from sepcap.interventions.rotation import check_rotation
from sepcap.models.sites import populations
from sepcap.progress import progress
from sepcap.storage import html_card, make_folder, sole_writer
from sepcap.studies.base.folder import identity_of
from sepcap.studies.base.result import Figures
from sepcap.studies.base.runner import study
from sepcap.studies.base.text import documents_in_words
from sepcap.studies.methods import figures
from sepcap.studies.methods.config import METHODS, PLAIN, PUBLISHED, MethodComparisonConfig, shared_with_random
from sepcap.studies.methods.measured import Measured, cost_of, drop_of, over_seeds, percent_of, separabilities_of
from sepcap.studies.pruning.check_run import is_left
from sepcap.studies.pruning.config import DIRECTIONS, Direction, PruningConfig
from sepcap.studies.pruning.plan import Plan, plan, tokens_per_second
from sepcap.studies.pruning.planned import RunsResult, name_study
from sepcap.studies.pruning.prune import execute
from sepcap.studies.pruning.random_neurons.above_random import equal_steps, few_steps
from sepcap.studies.pruning.random_neurons.baselines import baseline_config
from sepcap.studies.pruning.run import Run
from sepcap.studies.pruning.separability import ACCURACIES, BASELINES, Separability
from sepcap.tasks.load import load_task

MEASURED = ("n_clusters", "separability", "low", "high", "seeds_sd", "random_separability", "random_low", "random_high")
MEASURED += ("random_seeds_sd", "minus_random", "minus_random_low", "minus_random_high")
MEASURED += ("minus_plain", "minus_plain_low", "minus_plain_high", "max_drop", "max_drop_low", "max_drop_high", "max_drop_seeds_sd")
MEASURED += ("max_drop_step", "retain_cost", "retain_cost_low", "retain_cost_high")
"""Columns of `MethodComparison.by_metric` that are measured."""

Key = tuple[str, Direction, int]
"""Method, direction and seed of a run."""

LIKE = {"per_layer": "layer as each run pruned", "activity": "layer and tenth of it by activity on the retain task as each run pruned"}
"""Units in which random neurons are as many as those of the runs, in words."""


@dataclass(frozen=True, eq=False)
class MethodComparison(RunsResult):
    """Runs of several methods, both directions and several seeds, on the same evaluation tokens.

    Attributes:
        folder: contains them, in `method/direction-seed` and `method/random-direction-seed`.
        runs: by method, direction and seed.
        baselines: their random neurons, by method, direction and the seed of the draw.
    """

    STUDY = "compare-methods"
    TITLE = "Which way of pruning separates the two tasks best?"
    FIGURES: ClassVar[Figures] = {"methods": ("Separability of every method", figures.methods)}

    folder: Path
    runs: dict[Key, Run]
    baselines: dict[Key, Run] = dataclasses.field(default_factory=dict)

    @classmethod
    def _from_runs(cls, folder: Path, runs: Mapping[str, Run]) -> "MethodComparison":
        found: dict[bool, dict[Key, Run]] = {False: {}, True: {}}
        for name, run in runs.items():
            key, is_random = _key(name)
            found[is_random][key] = run
        in_order = ({key: of[key] for key in sorted(of, key=lambda key: list(METHODS).index(key[0]))} for of in found.values())
        return cls(folder, *in_order)

    @property
    def config(self) -> dict[str, Any]:
        """What all runs share, and what was compared."""
        own = ("importance", "fractions", "rotation", "offset", "aggregate", "seed", "samples", "documents", "n_documents", "tokens_found")
        shared = {name: value for name, value in next(iter(self.runs.values())).config.items() if name not in own}
        shared |= {"forget": self.task("forward"), "retain": self.task("reverse")}
        shared["n_documents"] = {"evaluate": next(iter(self.runs.values())).config.get("n_documents", {}).get("evaluate")}
        drawn = {"baseline": self.baseline, "baseline_seeds": len({seed for _, _, seed in self.baselines})}
        return {"methods": self.methods, "seeds": sorted({seed for _, _, seed in self.runs}), **drawn, **shared}

    @property
    def baseline(self) -> str:
        """Kind of the random neurons; empty if there are none."""
        return next((run.config["baseline"] for run in self.baselines.values()), "")

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """`by_metric()` by its name."""
        return {"methods": self.by_metric()}

    def summary(self) -> list[str]:
        """The best method of each direction, chosen on one half of the documents and measured on the other, and what selection gains."""
        random = ""
        if self.baselines:
            matched = f"drawn {'over the whole model' if self.baseline == 'uniform' else f'as many per {LIKE[self.baseline]}'}"
            random = f" Every method and direction is compared with random neurons, {matched} ({len(self.baselines)} runs)."
        said = [
            f"{len(self.runs)} runs of {len(self.methods)} methods over {self.task('forward')} and {self.task('reverse')}. Separability is "
            "100·(A − 1) of top-1: 0% if both tasks drop together, 100% if the other keeps all until the task to forget has lost all."
            f"{random}"
        ]
        if why := self.inseparable():
            return [*said, f"It is not known for any of them, because {why}."]
        rows = self.by_metric().to_dict("records")
        best = {row["direction"]: row for row in self.best().to_dict("records")}
        few = "there are too few documents to choose a method on one half of them and measure it on the other."
        for what in (f"forget {self.task(direction)}" for direction in DIRECTIONS):
            said.append(self._best(best[what]) if what in best else f"To {what}, {few}")
            said += self._gains([row for row in rows if row["direction"] == what])
        return said

    def _best(self, row: dict[Any, Any]) -> str:
        """Best method of a direction, in words."""
        spread = f", whose standard deviation is {row['seeds_sd']:.1f}" if np.isfinite(row["seeds_sd"]) else ""
        words = (
            f"To {row['direction']}, {row['method']} is highest of {row['methods']} on one half of the documents; on the other half it has "
            f"{row['separability']:.1f}% (95% bootstrap interval over texts {row['separability_low']:.1f} to "
            f"{row['separability_high']:.1f}, mean of {row['seeds']} seeds{spread})"
        )
        if np.isfinite(row["minus_random"]):
            words += f", {_gain(row)} relative to {self._random_in_words(row['method'])}"
        return f"{words}."

    def _gains(self, rows: list[dict[str, Any]]) -> list[str]:
        """Gain from selection of every method with an offset or in another basis, and that of its site's first method."""
        said, known = [], {row["method"]: row for row in rows if np.isfinite(row["minus_random"])}
        for name, row in known.items():
            if shared_with_random(name):
                plain = known.get(PLAIN[row["site"]])
                without = f"; of {plain['method']}, which has neither, {_gain(plain)}" if plain else ""
                said.append(
                    f"To {row['direction']}, the selection of {name} itself gains {_gain(row)} over {self._random_in_words(name)}{without}."
                )
        return said

    def _random_in_words(self, method: str) -> str:
        matched = BASELINES[self.baseline]
        return f"random neurons{f' matched {matched}' if matched else ''}{shared_with_random(method)}"

    @property
    def methods(self) -> list[str]:
        """Names of the methods that were run, in the order of `METHODS`."""
        return [name for name in METHODS if any(key[0] == name for key in self.runs)]

    @checked()
    def task(self, direction: Direction) -> str:
        """Name of the task that is forgotten."""
        run = next(iter(self.runs.values()))
        first = next(key for key in self.runs)[1]
        return run.config["forget" if first == direction else "retain"]

    @checked()
    def separabilities(self, method: str, direction: Direction, metric: str = "top1") -> list[Separability]:
        """Separability per seed, with the forget task of that direction on the x axis."""
        return [run.separability(metric) for run in self._of(self.runs, method, direction)]

    def _of(self, runs: Mapping[Key, Run], method: str, direction: Direction) -> list[Run]:
        return [run for (name, way, _), run in runs.items() if (name, way) == (method, direction)]

    def _measured(self, method: str, direction: Direction, metric: str = "top1", half: int | None = None) -> "Measured":
        """Areas of a method, and of its random neurons at their steps; on all documents, or on one seeded half of them."""
        runs, random = (self._of(of, method, direction) for of in (self.runs, self.baselines))
        found = separabilities_of(runs, metric, half)
        percent, seeds = over_seeds(found, percent_of), len(runs)
        if not random:
            return Measured(found, percent, over_seeds([], percent_of), over_seeds([], percent_of), seeds)
        equal = equal_steps(runs[0], random[0])
        assert equal is not None  # their configurations are made for each other
        there, control = (separabilities_of(of, metric, half, steps) for of, steps in zip((runs, random), equal, strict=True))
        other = over_seeds(control, percent_of)
        return Measured(found, percent, other, over_seeds(there, percent_of).minus(other), seeds)

    @checked()
    def inseparable(self, metric: str = "top1") -> str:
        """Why no run has an area: the unpruned model, which all of them share, has an accuracy of 0; empty if they have areas."""
        if metric not in ACCURACIES:
            raise unknown("metric", metric, ACCURACIES, "Areas are made of accuracies.")
        try:
            next(iter(self.runs.values())).separability(metric)
        except ValueError as error:
            return str(error)
        return ""

    @checked()
    def figure(self, kind: str | None = None, **options: Any) -> Any:
        """ "methods": the separability of every method.

        Raises:
            ValueError: the unpruned model has an accuracy of 0, so that there is none.
        """
        if why := self.inseparable(options.get("metric", "top1")):
            raise ValueError(f"there is no separability to show: {why}")
        return super().figure(kind, **options)

    @checked()
    def best(self) -> pd.DataFrame:
        """One row per direction: the method with the highest separability on one half of the documents, measured on the other half.

        The highest of many is too high on the documents it was chosen on. Columns: `method`, the number of `methods` and of `seeds`,
        `separability` and `minus_random` with `_low` and `_high` (as in `by_metric`), `seeds_sd`. A direction with too few documents has
        no row.
        """
        rows = []
        for direction in DIRECTIONS:
            names = [name for name in self.methods if self._of(self.runs, name, direction)]
            try:
                first, second = ([self._measured(name, direction, half=half) for name in names] for half in (0, 1))
            except ValueError:  # no hit in a half
                continue
            if not first or not all(np.isfinite(found.percent.low) for found in (*first, *second)):
                continue
            at = max(range(len(names)), key=lambda i: first[i].percent.value)
            name, found = names[at], second[at]
            what = {"direction": f"forget {self.task(direction)}", "method": name, "methods": len(names), "seeds": found.seeds}
            measured = found.percent.columns("separability") | {"seeds_sd": found.percent.seeds_sd} | found.gain.columns("minus_random")
            rows.append(what | measured)
        return pd.DataFrame(rows, columns=None if rows else ["direction"])

    @checked()
    def by_metric(self, metric: str = "top1", *, forget_drop: float = 50.0) -> pd.DataFrame:
        """One row per method and direction.

        Every `low` and `high` are the ends of a 95% bootstrap interval over the documents of the evaluation, the same ones drawn for all
        methods and seeds: it covers the variation over texts for the seeds that were run. Variation over seeds is given separately: every
        `seeds_sd` is a standard deviation over seeds.

        Columns: `separability` is 100·(A − 1), mean over seeds: its sign is kept, negative if the retain task dropped first,
        because a mean of absolute values would not be zero without separability; with `low`, `high` and `seeds_sd`. `random` names the
        random neurons of the same site, with the same offset and in the same basis: "per_layer", "activity" or "uniform";
        `random_separability` is theirs, the mean over `random_seeds` draws, with its interval and spread. `minus_random` with its interval
        is the difference to them at the steps at which they were evaluated, on the same texts: the gain from selection itself.
        `minus_plain` is the difference to the site's first method, which has neither offset nor another basis: the effect of these or of
        another importance, whether on the selected neurons or on any.
        `max_drop` is the cross-fitted maximum differential drop in percentage points (`Separability.max_drop`) with its interval and
        `max_drop_seeds_sd`, and `max_drop_step` the mean over seeds. `retain_cost` with its interval is the relative drop of the retain
        task in percent where the forget task has dropped by `forget_drop` percent; NaN if a seed never dropped so far, its upper end
        infinite if too many samples of the texts did not. `n_documents` and `n_clusters` are the numbers of documents and of clusters of
        documents of the task that has fewer. If the unpruned model has an accuracy of 0 (see `inseparable`), everything measured is NaN.

        Args:
            metric: "top1", "top10", "skip50_top1" or "skip50_top10".
            forget_drop: in percent.
        """
        rows = []
        nothing_to_lose = bool(self.inseparable(metric))
        fewest = min(self.n_documents or [np.nan])
        for name in self.methods:
            for direction in DIRECTIONS:
                site, seeds = METHODS[name].site, len(self._of(self.runs, name, direction))
                if not seeds:
                    continue
                what = {"method": name, "site": site, "direction": f"forget {self.task(direction)}", "seeds": seeds}
                what["n_documents"] = fewest
                what |= {"random": self.baseline, "random_seeds": len(self._of(self.baselines, name, direction))}
                if nothing_to_lose:
                    rows.append(what | dict.fromkeys(MEASURED, np.nan))
                    continue
                measured = self._measured(name, direction, metric)
                found, percent, random = measured.found, measured.percent, measured.random
                plain = over_seeds([] if name == PLAIN[site] else self.separabilities(PLAIN[site], direction, metric), percent_of)
                drop, cost = over_seeds(found, drop_of), over_seeds(found, partial(cost_of, forget_drop=forget_drop))
                rows.append(
                    what
                    | {"n_clusters": min(found[0].n_clusters), "separability": percent.value, "low": percent.low, "high": percent.high}
                    | {"seeds_sd": percent.seeds_sd, "random_separability": random.value, "random_low": random.low}
                    | {"random_high": random.high, "random_seeds_sd": random.seeds_sd}
                    | measured.gain.columns("minus_random")
                    | percent.minus(plain).columns("minus_plain")
                    | drop.columns("max_drop")
                    | {"max_drop_seeds_sd": drop.seeds_sd, "max_drop_step": np.mean([s.max_drop_step for s in found])}
                    | cost.columns("retain_cost")
                )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        parts = (repr(str(self.folder)), documents_in_words(self.n_documents), f"{len(self.methods)} methods", f"{len(self.runs)} runs")
        return f"MethodComparison({', '.join(filter(None, parts))})"

    def _repr_html_(self) -> str:
        how = {"folder": self.folder, "runs": len(self.runs), "documents": documents_in_words(self.n_documents)}
        return html_card("MethodComparison", how, self.by_metric())


def _gain(row: Mapping[Any, Any]) -> str:
    return f"{row['minus_random']:+.1f} points ({row['minus_random_low']:+.1f} to {row['minus_random_high']:+.1f})"


@study(MethodComparisonConfig)
@checked()
def compare_methods(model: Any, config: MethodComparisonConfig, *, out: str | Path, say: Callable[[str], Any]) -> MethodComparison:
    """Prune with every method, in both directions and with every seed, and compare what remains.

    Every run has its own folder, from which an interrupted comparison is resumed; finished runs are not recomputed.

    Args:
        model: what `load_model` returns, and is left unchanged; default is to load `config.model`.
        config: a `MethodComparisonConfig`; its fields can also be given as keywords.
        out: folder for `method/direction-seed`, and for random neurons in `method/random-direction-seed`.
        progress: True announces the work and its cost and shows bars, False shows nothing; a function receives the announcements.

    Returns:
        MethodComparison with `.table`, `.figure()` and `.report()`.

    Raises:
        ValueError: a method given by name is not possible for this model.
        FileExistsError: the folder holds a run of another configuration.

    Source: [SEP] section 3.1.

    Example:
        >>> import sepcap
        >>> sepcap.compare_methods(model, methods=("mlp", "attention-abs"), out="runs/methods").table  # doctest: +SKIP
    """
    out = Path(out)
    # read once, not once for every run
    config = dataclasses.replace(config, forget=load_task(config.forget), retain=load_task(config.retain))
    known: dict[str, dict[Any, Any]] = {name: {} for name in METHODS}  # measurements on the unpruned model, in the basis of a method
    plans: dict[Key, Plan] = {}
    for name in config.methods or PUBLISHED:
        if not config.methods and (why := _refusal(model, config.pruning(name, "forward", config.seeds[0]))):
            say(f"{name} is left out: {why}")
            continue
        for direction in DIRECTIONS:
            for seed in config.seeds:
                plans[name, direction, seed] = plan(model, config.pruning(name, direction, seed), known[name])
    kept = dict.fromkeys(name for name, _, _ in plans)
    drawn: list[Key] = [(name, way, seed) for name in kept for way in DIRECTIONS for seed in range(config.baseline_seeds)]
    left = [key for key, prepared in plans.items() if is_left(out / _name(key), prepared.resolved)]
    left_random = [key for key in drawn if not (out / _name(key, True) / "config.json").exists()]
    steps = few_steps(config.steps) if config.baseline_steps is None else config.baseline_steps
    first = next(iter(plans.values()))
    total = sum(plans[key].tokens() for key in left)
    total += sum(_tokens_of_random(plans[name, way, config.seeds[0]], steps) for name, way, _ in left_random)
    if left or left_random:
        speed = tokens_per_second(first)
        say(
            f"{len(plans)} runs in {out}, {len(left)} of them to do, and {len(drawn)} of random neurons ({config.baseline}, "
            f"{config.baseline_seeds} seeds, {steps} steps), {len(left_random)} to do: at most {total / 1e6:.3g} M tokens through the "
            f"model, about {total / speed / 60:.0f} minutes at the {speed:,.0f} tokens per second just measured here"
        )
    make_folder(out)
    runs: dict[str, Run] = {}
    with sole_writer(out), progress(total=total, desc="compare methods", unit="tok", unit_scale=True, leave=True, delay=0) as bar:
        # the identity of a matched baseline is known when the run that it is matched with is finished
        planned = {_name(key): identity_of(prepared.resolved) for key, prepared in plans.items()}
        name_study(out, MethodComparison.STUDY, {**planned, **dict.fromkeys(_name(key, True) for key in drawn)})
        for key, prepared in plans.items():
            bar.set_postfix_str(" ".join(map(str, key)))
            runs[_name(key)] = execute(prepared, out / _name(key))
            bar.update(prepared.tokens() if key in left else 0)
        for key in drawn:
            bar.set_postfix_str(" ".join(map(str, ("random", *key))))
            name, way, seed = key
            like: Key = (name, way, config.seeds[seed % len(config.seeds)])
            at = None if config.baseline == "uniform" else out / _name(like)
            prepared = plan(model, baseline_config(plans[like].config, config.baseline, seed, steps, at), known[name])
            where = _name(key, True)
            name_study(out, MethodComparison.STUDY, {where: identity_of(prepared.resolved)}, whole=False)
            runs[where] = execute(prepared, out / where)
            bar.update(_tokens_of_random(plans[like], steps) if key in left_random else 0)
    return MethodComparison._from_runs(out, runs)


def _tokens_of_random(beside: Plan, steps: int) -> int:
    """Tokens through the model for the random neurons of a run: their evaluation, and the retain task if they have an offset."""
    collected = 0 if beside.config.offset == "none" else beside.collect["retain"].tokens
    return steps * (sum(sample.tokens for sample in beside.evaluate.values()) + collected)


def _name(key: Key, is_random: bool = False) -> str:
    method, direction, seed = key
    return f"{method}/{'random-' * is_random}{direction}-{seed}"


def _key(name: str) -> tuple[Key, bool]:
    """Method, direction and seed of a run from its name, and whether it is of random neurons."""
    found = re.fullmatch(rf"({'|'.join(METHODS)})/(random-)?({'|'.join(DIRECTIONS)})-(\d+)", name)
    if found is None:
        raise CorruptFile(f"{name!r} is not a run of a comparison of methods")
    return (found[1], "forward" if found[3] == "forward" else "reverse", int(found[4])), found[2] is not None


def _refusal(model: Any, config: PruningConfig) -> str:
    """Why a method is not possible for a model; empty if it is."""
    try:
        if config.offset != "none":
            check_output_biases(populations(model, config.sites).values())
        if config.rotation != "none":
            check_rotation(model, config.rotation)
    except (NotImplementedError, ValueError) as error:
        return str(error)
    return ""
