"""Methods compared: what is pruned, ranked how, in which basis, with which offset, against random neurons (METHODS 10, 11)."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from sepcap.checks import checked
from sepcap.errors import CorruptFile, unknown
from sepcap.experiments.check_run import is_left
from sepcap.experiments.comparison import tokens_per_second
from sepcap.experiments.config import PruningConfig
from sepcap.experiments.methods_config import DIRECTIONS, METHODS, PLAIN, Direction, MethodsConfig, random_like
from sepcap.experiments.planned import name_study, planned_runs
from sepcap.experiments.pruning import Plan, execute, plan
from sepcap.experiments.result import Figures, Shown
from sepcap.experiments.run import ROLES, Run
from sepcap.experiments.separability import ACCURACIES, Separability, costs_at, separability
from sepcap.experiments.step_files import identity_of
from sepcap.interventions.deletion import check_output_biases
from sepcap.interventions.rotation import check_rotation
from sepcap.progress import progress, tell
from sepcap.statistics.intervals import REPLICAS, Interval, bootstrap_interval
from sepcap.storage import make_folder, sole_writer
from sepcap.tasks.task import load_task

MEASURED = ("n_clusters", "separability", "low", "high", "seeds_sd", "minus_random", "minus_random_low", "minus_random_high")
MEASURED += ("minus_plain", "minus_plain_low", "minus_plain_high", "max_drop", "max_drop_low", "max_drop_high", "max_drop_seeds_sd")
MEASURED += ("max_drop_step", "retain_cost", "retain_cost_low", "retain_cost_high")
"""Columns of `Methods.table` that are measured."""


@dataclass(frozen=True, eq=False)
class Methods(Shown):
    """Runs of several methods, both directions and several seeds, over the same evaluation tokens.

    Attributes:
        folder: holds them, in `method/direction-seed`.
        runs: by method, direction and seed; random neurons without an offset have no direction, so that their forward runs serve both.
    """

    STUDY = "compare-methods"
    TITLE = "Which way of pruning separates the two tasks best?"
    FIGURES: ClassVar[Figures] = {"methods": ("Separability of every method", "methods")}

    folder: Path
    runs: dict[tuple[str, Direction, int], Run]

    @classmethod
    @checked()
    def load(cls, folder: str | Path) -> "Methods":
        """All runs that were planned in a folder.

        Raises:
            FileNotFoundError: there is no comparison of methods, or some run of it is not finished.
        """
        runs = planned_runs(Path(folder), cls.STUDY)
        return cls(Path(folder), {key: runs[_name(*key)] for key in sorted(map(_key, runs), key=lambda key: list(METHODS).index(key[0]))})

    @property
    def config(self) -> dict[str, Any]:
        """What all runs share, and what was compared."""
        own = ("importance", "fractions", "rotation", "offset", "aggregate", "seed", "samples", "documents", "n_documents", "tokens_found")
        shared = {name: value for name, value in next(iter(self.runs.values())).config.items() if name not in own}
        shared |= {"forget": self.task("forward"), "retain": self.task("reverse")}
        return {"methods": self.methods, "seeds": sorted({seed for _, _, seed in self.runs}), **shared}

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """`table()` by its name."""
        return {"methods": self.table()}

    def summary(self) -> list[str]:
        """The best method of each direction, and what selection gains over random neurons with the same offset or basis."""
        table = self.table()
        said = [
            f"{len(self.runs)} runs of {len(self.methods)} methods over {self.task('forward')} and {self.task('reverse')}. Separability is "
            "100·(A − 1) of top-1: 0% where both tasks go together, 100% where the other is whole until the task to forget is gone."
        ]
        if why := self.inseparable():
            return [*said, f"It is not known for any of them, because {why}."]
        for direction, rows in table.groupby("direction", sort=False):
            chosen = [row for row in rows.to_dict("records") if not METHODS[row["method"]].random]
            if not chosen:
                continue
            best = max(chosen, key=lambda row: row["separability"])
            words = (
                f"To {direction}, {best['method']} is highest of {len(chosen)} with {best['separability']:.1f}% (95% bootstrap "
                f"interval over texts {best['low']:.1f} to {best['high']:.1f}, mean of {best['seeds']} seeds{_between_seeds(best)})"
            )
            if np.isfinite(best["minus_random"]):
                words += f", {_gain(best)} from {best['random']}"
            said.append(f"{words}.")
            beside = [row for row in chosen if row["random"] != f"random-{row['site']}" and np.isfinite(row["minus_random"])]
            for row in beside:
                plain = next((r for r in chosen if r["method"] == PLAIN[row["site"]] and np.isfinite(r["minus_random"])), None)
                without = f"; of {plain['method']}, which has neither, {_gain(plain)} from {plain['random']}" if plain else ""
                said.append(f"To {direction}, the selection of {row['method']} itself gains {_gain(row)} from {row['random']}{without}.")
        return said

    @property
    def methods(self) -> list[str]:
        """Names of the methods that were run, in the order of `METHODS`."""
        return [name for name in METHODS if any(key[0] == name for key in self.runs)]

    def task(self, direction: Direction) -> str:
        """Name of the task that is forgotten."""
        run = next(iter(self.runs.values()))
        first = next(key for key in self.runs)[1]
        return run.config["forget" if first == direction else "retain"]

    def separabilities(self, method: str, direction: Direction, metric: str = "top1") -> list[Separability]:
        """Separability per seed, the task to forget of that direction on the x axis; runs that have no direction serve both."""
        found = []
        for (name, forward, _), run in self.runs.items():
            if name == method and (forward == direction or len(METHODS[method].directions) == 1):
                forget, retain = ROLES if forward == direction else ROLES[::-1]
                found.append(separability(run.per_cluster(forget), run.per_cluster(retain), metric))
        return found

    def inseparable(self, metric: str = "top1") -> str:
        """Why no run has an area: the unpruned model, which all of them share, has nothing to lose; empty where they have."""
        if metric not in ACCURACIES:
            raise unknown("metric", metric, ACCURACIES, "Areas are made of accuracies.")
        try:
            next(iter(self.runs.values())).separability(metric)
        except ValueError as error:
            return str(error)
        return ""

    def figure(self, kind: str | None = None, **options: Any) -> Any:
        """ "methods": the separability of every method.

        Raises:
            ValueError: the unpruned model has nothing to lose, so that there is none.
        """
        if why := self.inseparable(options.get("metric", "top1")):
            raise ValueError(f"there is no separability to show: {why}")
        return super().figure(kind, **options)

    def table(self, metric: str = "top1", *, forget_drop: float = 50.0) -> pd.DataFrame:
        """One row per method and direction.

        Every `low` and `high` are the ends of a 95% bootstrap interval over the documents of the evaluation, the same ones drawn for all
        methods and seeds: it covers the spread over texts for the seeds that were run. What other seeds would change is beside it: every
        `seeds_sd` is a standard deviation over seeds.

        Columns: `separability` is 100·(A − 1), mean over seeds: its sign is kept, negative where the task to be retained went first,
        because a mean of absolute values would not be zero where nothing separates; with `low`, `high` and `seeds_sd`. `minus_random` with
        its interval is the difference to random neurons of the same site with the same offset and in the same basis, on the same texts:
        what the selection itself gains. `random` names them; where they were not run, it is empty and there is no difference.
        `minus_plain` is the difference to the site's first method, which has neither: what an offset, a rotation or another importance
        changes, whether it does so for the neurons selected or for any.
        `max_drop` is the cross-fitted maximum differential drop in percentage points (`Separability.max_drop`) with its interval and
        `max_drop_seeds_sd`, and `max_drop_step` the mean over seeds. `retain_cost` with its interval is the relative drop of the retain
        task in percent where the forget task has dropped by `forget_drop` percent; missing where a seed never came so far, its upper end
        infinite where too many samples of the texts did not. `n_clusters` is the number of clusters of documents of the task that has
        fewer. Where the unpruned model has nothing to lose (`inseparable` says so), everything measured is missing.

        Args:
            metric: "top1", "top10", "skip50_top1" or "skip50_top10".
            forget_drop: in percent.
        """
        rows = []
        nothing_to_lose = bool(self.inseparable(metric))
        for name in self.methods:
            for direction in DIRECTIONS:
                site, is_random, both = METHODS[name].site, METHODS[name].random, len(METHODS[name].directions) == 1
                seeds = sum(key[0] == name and (key[1] == direction or both) for key in self.runs)
                what = {"method": name, "site": site, "direction": f"forget {self.task(direction)}", "seeds": seeds}
                if not seeds:
                    continue
                what["random"] = random_like(name) if not is_random and random_like(name) in self.methods else ""
                if nothing_to_lose:
                    rows.append(what | dict.fromkeys(MEASURED, np.nan))
                    continue
                found = self.separabilities(name, direction, metric)
                random = [] if is_random else self.separabilities(random_like(name), direction, metric)
                plain = [] if is_random or name == PLAIN[site] else self.separabilities(PLAIN[site], direction, metric)
                percent, random_percent, plain_percent = (_over_seeds(several, _percent) for several in (found, random, plain))
                drop, cost = _over_seeds(found, _drop), _over_seeds(found, partial(_cost, forget_drop=forget_drop))
                rows.append(
                    what
                    | {"n_clusters": min(found[0].n_clusters), "separability": percent.value, "low": percent.low, "high": percent.high}
                    | {"seeds_sd": percent.seeds_sd}
                    | percent.minus(random_percent).columns("minus_random")
                    | percent.minus(plain_percent).columns("minus_plain")
                    | drop.columns("max_drop")
                    | {"max_drop_seeds_sd": drop.seeds_sd, "max_drop_step": np.mean([s.max_drop_step for s in found])}
                    | cost.columns("retain_cost")
                )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return f"Methods({str(self.folder)!r}, {len(self.methods)} methods, {len(self.runs)} runs)"

    def _repr_html_(self) -> str:
        from sepcap.storage import html_card

        return html_card("Methods", {"folder": self.folder, "runs": len(self.runs)}, self.table())


Measure = Callable[[Separability], tuple[float, np.ndarray, int]]
"""Of one run: a value, its bootstrap replicas, and how many clusters of documents each of them drew."""


@dataclass(frozen=True)
class _Mean(Interval):
    """The mean over seeds of something measured, with its interval over texts and its spread over seeds."""

    replicas: np.ndarray
    clusters: int
    seeds_sd: float

    def minus(self, other: "_Mean") -> Interval:
        """The difference, sample by sample on the same documents."""
        difference = self.replicas - other.replicas
        return Interval(self.value - other.value, *bootstrap_interval(difference, min(self.clusters, other.clusters)))


def _over_seeds(found: list[Separability], measure: Measure) -> _Mean:
    if not found:
        return _Mean(np.nan, np.nan, np.nan, np.array([np.nan]), 0, np.nan)
    values, drawn, clusters = zip(*map(measure, found), strict=True)
    replicas = np.mean(drawn, axis=0)
    seeds_sd = float(np.std(values, ddof=1)) if len(values) > 1 else np.nan
    return _Mean(float(np.mean(values)), *bootstrap_interval(replicas, clusters[0]), replicas, clusters[0], seeds_sd)


def _percent(found: Separability) -> tuple[float, np.ndarray, int]:
    return 100 * (found.area - 1), 100 * (found.replicas.area - 1), found.replicas.clusters


def _drop(found: Separability) -> tuple[float, np.ndarray, int]:
    return found.max_drop, found.replicas.max_drop, found.replicas.clusters // 2


def _cost(found: Separability, forget_drop: float) -> tuple[float, np.ndarray, int]:
    value = float(costs_at(found.forget, found.retain, forget_drop))
    if not np.isfinite(value):
        return np.nan, np.full(REPLICAS, np.nan), 0
    return value, costs_at(found.replicas.forget, found.replicas.retain, forget_drop), found.replicas.clusters


def _gain(row: dict[str, Any]) -> str:
    return f"{row['minus_random']:+.1f} points ({row['minus_random_low']:+.1f} to {row['minus_random_high']:+.1f})"


def _between_seeds(row: dict[str, Any]) -> str:
    return f", whose standard deviation is {row['seeds_sd']:.1f}" if np.isfinite(row["seeds_sd"]) else ""


@checked()
def compare_methods(model: Any, config: MethodsConfig, out: str | Path, *, say: Callable[[str], None] = tell) -> Methods:
    """Prune by every method, in both directions and with every seed, and compare what is left.

    Every run is a folder of its own that an interrupted comparison takes up; finished runs are not computed again.

    Args:
        model: what `load_model` returns; it is given back unchanged.
        config: what is compared.
        out: folder that gets `method/direction-seed`.
        say: receives what is about to happen and cost, before it does.

    Returns:
        Methods with `.table()`, `.figure()` and `.report()`.

    Raises:
        ValueError: a method that this model does not allow, when it was asked for by name.
        FileExistsError: a run of another configuration is in the way.

    Source: [SEP] section 3.1.

    Example:
        >>> from sepcap.experiments.methods import MethodsConfig, compare_methods
        >>> compare_methods(model, MethodsConfig(methods=("mlp", "random-mlp")), "runs/methods").table()  # doctest: +SKIP
    """
    out = Path(out)
    # read once, not once for every run
    config = dataclasses.replace(config, forget=load_task(config.forget), retain=load_task(config.retain))
    plans: dict[tuple[str, Direction, int], Plan] = {}
    for name in config.methods or METHODS:
        method = METHODS[name]
        if not config.methods and (why := _refusal(model, config.pruning(name, "forward", config.seeds[0]))):
            say(f"{name} is left out: {why}")
            continue
        for direction in method.directions:
            for seed in config.seeds:
                plans[name, direction, seed] = plan(model, config.pruning(name, direction, seed))
    folders = {key: out / _name(*key) for key in plans}
    left = [key for key, folder in folders.items() if is_left(folder, plans[key].resolved)]
    total = sum(plans[key].tokens() for key in left)
    if left:
        speed = tokens_per_second(plans[left[0]])
        say(
            f"{len(plans)} runs in {out}, {len(left)} of them to do: {total / 1e6:.3g} M tokens through the model, about "
            f"{total / speed / 60:.0f} minutes at the {speed:,.0f} tokens per second just measured here"
        )
    make_folder(out)
    runs = {}
    with sole_writer(out), progress(total=total, desc="compare methods", unit="tok", unit_scale=True, leave=True, delay=0) as bar:
        name_study(out, Methods.STUDY, {_name(*key): identity_of(prepared.resolved) for key, prepared in plans.items()})
        for key, prepared in plans.items():
            bar.set_postfix_str(" ".join(map(str, key)))
            runs[key] = execute(prepared, folders[key])
            bar.update(prepared.tokens() if key in left else 0)
    return Methods(out, runs)


def _name(method: str, direction: str, seed: int) -> str:
    return f"{method}/{direction}-{seed}"


def _key(name: str) -> tuple[str, Direction, int]:
    found = re.fullmatch(rf"({'|'.join(METHODS)})/({'|'.join(DIRECTIONS)})-(\d+)", name)
    if found is None:
        raise CorruptFile(f"{name!r} is no run of a comparison of methods")
    return found[1], "forward" if found[2] == "forward" else "reverse", int(found[3])


def _refusal(model: Any, config: PruningConfig) -> str:
    """Why a model does not allow a method, or nothing."""
    try:
        if config.offset != "none":
            check_output_biases(model, config.sites)
        if config.rotation != "none":
            check_rotation(model, config.rotation)
    except (NotImplementedError, ValueError) as error:
        return str(error)
    return ""
