"""Methods compared: what is pruned, ranked how, in which basis, with which offset, against random neurons (METHODS 10, 11)."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from sepcap.checks import checked
from sepcap.errors import CorruptFile, unknown
from sepcap.experiments.check_run import is_left
from sepcap.experiments.comparison import tokens_per_second
from sepcap.experiments.config import PruningConfig
from sepcap.experiments.methods_config import DIRECTIONS, METHODS, PLAIN, Direction, MethodsConfig
from sepcap.experiments.planned import name_study, planned_runs
from sepcap.experiments.pruning import Plan, execute, plan
from sepcap.experiments.result import Figures, Shown
from sepcap.experiments.run import ROLES, Run
from sepcap.experiments.separability import ACCURACIES, Separability, area_replicas, separability
from sepcap.experiments.step_files import identity_of
from sepcap.interventions.deletion import check_output_biases
from sepcap.interventions.rotation import check_rotation
from sepcap.progress import progress, tell
from sepcap.storage import make_folder, sole_writer
from sepcap.tasks.task import load_task

MEASURED = ("separability", "sd", "low", "high", "minus_random", "minus_random_low", "minus_random_high")
MEASURED += ("minus_plain", "minus_plain_low", "minus_plain_high", "max_drop", "max_drop_sd", "max_drop_step", "retain_cost")
"""Columns of `Methods.table` that are measured."""


@dataclass(frozen=True, eq=False)
class Methods(Shown):
    """Runs of several methods, both directions and several seeds, over the same evaluation tokens.

    Attributes:
        folder: holds them, in `method/direction-seed`.
        runs: by method, direction and seed; random neurons have no direction, so that their forward runs serve both.
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
        own = ("importance", "fractions", "rotation", "offset", "aggregate", "seed", "samples", "documents", "tokens_found")
        shared = {name: value for name, value in next(iter(self.runs.values())).config.items() if name not in own}
        shared |= {"forget": self.task("forward"), "retain": self.task("reverse")}
        return {"methods": self.methods, "seeds": sorted({seed for _, _, seed in self.runs}), **shared}

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """`table()` by its name."""
        return {"methods": self.table()}

    def summary(self) -> list[str]:
        """The best method of each direction, against random neurons of its site."""
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
                f"interval over texts {best['low']:.1f} to {best['high']:.1f}, mean of {best['seeds']} seeds)"
            )
            if np.isfinite(best["minus_random"]):
                words += (
                    f", {best['minus_random']:+.1f} points from random {best['site']} neurons "
                    f"({best['minus_random_low']:+.1f} to {best['minus_random_high']:+.1f})"
                )
            said.append(f"{words}.")
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

    def _rows(self, method: str, direction: Direction) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Evaluation rows of the task to forget and of the one to retain, per seed."""
        for (name, forward, _), run in self.runs.items():
            if name == method and (forward == direction or METHODS[method].random):
                rows = [run.rows(role) for role in ROLES]
                forget, retain = rows if forward == direction else rows[::-1]
                yield forget, retain

    def separabilities(self, method: str, direction: Direction, metric: str = "top1") -> list[Separability]:
        """Separability per seed."""
        return [separability(forget, retain, metric) for forget, retain in self._rows(method, direction)]

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

    def replicas(self, method: str, direction: Direction, metric: str = "top1") -> np.ndarray:
        """100·(A − 1) of bootstrap samples of the evaluation rows, mean over seeds; sample by sample the same rows for every method."""
        by_seed = [area_replicas(forget, retain, metric) for forget, retain in self._rows(method, direction)]
        return 100 * (np.mean(by_seed, axis=0) - 1) if by_seed else np.array([])

    def table(self, metric: str = "top1", *, forget_drop: float = 50.0) -> pd.DataFrame:
        """One row per method and direction.

        Columns: `separability` is 100·(A − 1), mean over seeds: its sign is kept, negative where the task to be retained went first,
        because a mean of absolute values would not be zero where nothing separates. `sd` is its standard deviation over seeds, `low` and
        `high` its 95% bootstrap interval over the texts of the evaluation. `minus_random` with its interval is the difference to random
        neurons of the same site on the same texts (pruned without offset or rotation); `minus_plain` that to the site's first method,
        which has neither: what an offset, a rotation or another importance changes. `max_drop` is the maximum differential drop in
        percentage points with its `max_drop_sd` over seeds and the mean `max_drop_step`. `retain_cost` is the relative drop of the retain
        task in percent where the forget task has dropped by `forget_drop` percent; missing where a seed never came so far. Where the
        unpruned model has nothing to lose (`inseparable` says so), everything measured is missing.

        Args:
            metric: "top1", "top10", "skip50_top1" or "skip50_top10".
            forget_drop: in percent.
        """
        rows = []
        nothing_to_lose = bool(self.inseparable(metric))
        for name in self.methods:
            for direction in DIRECTIONS:
                seeds = len(list(self._rows(name, direction)))
                what = {"method": name, "site": METHODS[name].site, "direction": f"forget {self.task(direction)}", "seeds": seeds}
                if not seeds or nothing_to_lose:
                    rows += [what | dict.fromkeys(MEASURED, np.nan)] if seeds else []
                    continue
                found = self.separabilities(name, direction, metric)
                percents, drops = np.array([100 * (s.area - 1) for s in found]), np.array([s.max_drop for s in found])
                replicas = self.replicas(name, direction, metric)
                site, is_random = METHODS[name].site, METHODS[name].random
                random = self.replicas(f"random-{site}", direction, metric) if not is_random else np.array([])
                baseline = [100 * (s.area - 1) for s in self.separabilities(f"random-{site}", direction, metric)] if len(random) else []
                low, high = _interval(replicas)
                below, above = _interval(replicas - random) if baseline else (np.nan, np.nan)
                plain = [100 * (s.area - 1) for s in self.separabilities(PLAIN[site], direction, metric)]
                other = name != PLAIN[site] and not is_random and bool(plain)
                worse, better = _interval(replicas - self.replicas(PLAIN[site], direction, metric)) if other else (np.nan, np.nan)
                rows.append(
                    what
                    | {
                        "separability": percents.mean(),
                        "sd": _spread(percents),
                        "low": low,
                        "high": high,
                        "minus_random": percents.mean() - np.mean(baseline) if baseline else np.nan,
                        "minus_random_low": below,
                        "minus_random_high": above,
                        "minus_plain": percents.mean() - np.mean(plain) if other else np.nan,
                        "minus_plain_low": worse,
                        "minus_plain_high": better,
                        "max_drop": drops.mean(),
                        "max_drop_sd": _spread(drops),
                        "max_drop_step": np.mean([s.max_drop_step for s in found]),
                        "retain_cost": np.mean([_cost(s, forget_drop) for s in found]),
                    }
                )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return f"Methods({str(self.folder)!r}, {len(self.methods)} methods, {len(self.runs)} runs)"

    def _repr_html_(self) -> str:
        from sepcap.storage import html_card

        return html_card("Methods", {"folder": self.folder, "runs": len(self.runs)}, self.table())


def _spread(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def _interval(replicas: np.ndarray) -> tuple[float, float]:
    finite = replicas[np.isfinite(replicas)]
    low, high = np.percentile(finite, [2.5, 97.5]) if len(finite) else (np.nan, np.nan)
    return float(low), float(high)


def _cost(found: Separability, forget_drop: float) -> float:
    if 100 * (1 - found.forget / found.forget[0]).max() < forget_drop:
        return float("nan")
    return found.retain_cost(forget_drop)


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
        for direction in DIRECTIONS[: 1 if method.random else 2]:
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
