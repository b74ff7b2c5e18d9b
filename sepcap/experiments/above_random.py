"""How far the area of a run is above that of random neurons, over documents and over seeds (METHODS 11)."""

import contextlib
import dataclasses
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from sepcap.errors import CorruptFile, unknown
from sepcap.experiments.baselines import matched_again
from sepcap.experiments.run import ROLES, Run
from sepcap.experiments.separability import BASELINES, Separability, separability
from sepcap.statistics.intervals import Cluster, Ends, bootstrap_interval


@dataclass(frozen=True)
class OverSeeds:
    """Areas of runs that differ in their seed.

    Attributes:
        areas: of every seed.
        mean: of the areas.
        sd: their standard deviation over seeds; not a number for one seed.
        interval: 95% bootstrap interval of the mean over the documents of the evaluation, for the seeds that were run.
        n_clusters: what is drawn of the forget and of the retain task, see `Separability`.
        replicas: the mean in every bootstrap sample of the documents.
    """

    areas: Float[np.ndarray, " seed"]
    mean: float
    sd: float
    interval: Ends
    n_clusters: tuple[int, int]
    replicas: Float[np.ndarray, " replica"]


def over_seeds(
    runs: Sequence[Run],
    metric: str = "top1",
    *,
    samples: dict[str, str] | None = None,
    steps: slice = slice(None),
    specific: Literal["forget", "retain"] = "forget",
    seed: int = 0,
    cluster: Cluster = "document",
) -> OverSeeds:
    """Areas of runs over the same documents, which differ in their seed.

    Args:
        runs: at least one.
        metric: an accuracy.
        samples: role -> tokens that it is evaluated on, where that is the other way round than in the runs.
        steps: which steps count; default all.
        specific: role on the x axis.
        seed: of the bootstrap; the same one draws the same documents for all runs over the same tokens.
        cluster: what is drawn.
    """
    found = []
    for run in runs:
        theirs = run.config["samples"].get("evaluate", {})
        role_of = {sample: role for role, sample in theirs.items()}
        roles = ROLES if samples is None else tuple(role_of[samples[role]] for role in ROLES)
        forget, retain = (run.per_cluster(role, cluster)[steps] for role in roles)
        found.append(separability(forget, retain, metric, specific=specific, seed=seed))
    areas = np.array([s.area for s in found])
    replicas, clusters = np.mean([s.replicas.area for s in found], axis=0), found[0].replicas.clusters
    sd = float(areas.std(ddof=1)) if len(areas) > 1 else math.nan
    return OverSeeds(areas, float(areas.mean()), sd, bootstrap_interval(replicas, clusters), found[0].n_clusters, replicas)


def with_above_random(
    found: Separability, run: Run, baselines: Sequence[Run], *, seed: int = 0, cluster: Cluster = "document"
) -> Separability:
    """A separability with what it is above random neurons.

    Where a step of the baselines stands for several of the run, the area of the run is taken at their steps too: it is the difference at
    equal steps.

    Raises:
        ValueError: random runs that are no baselines of this run, or do not differ in their seed alone.
    """
    check_baselines(run, baselines)
    mine = run.config["samples"]["evaluate"]
    equal = equal_steps(run, baselines[0])
    assert equal is not None  # looked at just now
    steps, theirs = equal
    how = {"metric": found.metric, "samples": mine, "specific": found.specific, "seed": seed, "cluster": cluster}
    selected, random = over_seeds([run], **how, steps=steps), over_seeds(baselines, **how, steps=theirs)
    return dataclasses.replace(
        found,
        above_random=selected.mean - random.mean,
        above_random_interval=bootstrap_interval(selected.replicas - random.replicas, min(found.n_clusters)),
        baseline=_kind(baselines[0]),
        seeds=len(baselines),
        seeds_sd=random.sd,
    )


def check_baselines(run: Run, baselines: Sequence[Run]) -> None:
    """Refuse random runs that are no baselines of a run, or do not differ in their seed alone.

    Raises:
        ValueError: what is wrong with which of them.
    """
    if not baselines:
        raise ValueError("baseline is empty; give at least one random run")
    for baseline in baselines:
        if why := why_not(run, baseline):
            raise ValueError(f"baseline: the run in {baseline.folder} {why}")
    alike = {
        "kinds": [_kind(baseline) for baseline in baselines],
        "numbers of steps": [baseline.config["steps"] for baseline in baselines],
        "numbers of finished steps": [baseline.steps_done for baseline in baselines],
    }
    for what, values in alike.items():
        if len(set(values)) > 1:
            raise ValueError(f"baseline: {len(baselines)} runs with the {what} {values}; give random runs that differ in their seed alone")
    seeds = [baseline.config["seed"] for baseline in baselines]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"baseline: {len(seeds)} runs with the seeds {seeds}; each counts once, so give runs of different seeds")


def why_not(run: Run, baseline: Run) -> str:
    """Why one run is no random baseline of another, as the end of a sentence; empty where it is one.

    It took as many random neurons of the same model in the same way, and was evaluated on the same tokens. Random neurons have a direction
    where they are matched with a run or have an offset: else one baseline serves a pair of tasks both ways round.
    """
    c, b = run.config, baseline.config
    if b["importance"] != "random":
        return f"selects by {b['importance']!r}; give random runs that differ in their seed alone"
    mine, theirs = c["samples"].get("evaluate", {}), b["samples"].get("evaluate", {})
    if set(theirs.values()) != set(mine.values()):
        return f"was evaluated on other tokens than {run.folder}: areas cannot be compared"
    for name, default in (("model_fingerprint", ""), ("rotation", "none"), ("offset", "none")):
        if c.get(name, default) != b.get(name, default):
            return f"has {name}={b.get(name, default)!r}, and {run.folder} has {c.get(name, default)!r}; give random runs with the same"
    if equal_steps(run, baseline) is None:
        return (
            f"takes {b['fractions']} in {b['steps']} steps, and {run.folder} {c['fractions']} in {c['steps']}; give random runs "
            "whose steps take as much, or as several steps of that run together"
        )
    if baseline.steps_done < 1:
        return "has no pruning step yet"
    kind = _kind(baseline)
    if (kind != "uniform" or b.get("offset", "none") != "none") and theirs != mine:
        return f"forgets {b['forget']}, and {run.folder} {c['forget']}; {'an offset' if kind == 'uniform' else repr(kind)} has a direction"
    if kind != "uniform" and matched_again(baseline, run) is None:
        return f"is matched with another run than {run.folder}; give {kind!r} runs that were made with matched={str(run.folder)!r}"
    return ""


def _kind(baseline: Run) -> str:
    return baseline.config.get("baseline", "uniform")


def equal_steps(run: Run, baseline: Run) -> tuple[slice, slice] | None:
    """Steps of a run and of its baseline at which as many neurons are gone; nothing where the steps of the baseline are not made of those
    of the run."""
    c, b = run.config, baseline.config
    every = c["steps"] // b["steps"] if b["steps"] and c["steps"] % b["steps"] == 0 else 0
    shares, others = c["fractions"], b["fractions"]
    if not every or shares.keys() != others.keys() or not all(math.isclose(shares[s] * every, others[s]) for s in shares):
        return None
    last = min(run.steps_done // every, baseline.steps_done)
    return slice(0, last * every + 1, every), slice(0, last + 1)


def baselines_of(run: Run, baseline: Run | Sequence[Run] | str) -> list[Run]:
    """Random runs as they were given, or those of a kind beside the run."""
    if isinstance(baseline, str):
        return baselines_beside(run, baseline)
    return [baseline] if isinstance(baseline, Run) else list(baseline)


def baselines_beside(run: Run, kind: str) -> list[Run]:
    """The finished random runs of a kind beside a run, as a comparison leaves them.

    Raises:
        ValueError: no such kind, or there are none.
    """
    if kind not in BASELINES:
        raise unknown("baseline", kind, BASELINES)
    found = {}
    for other in _beside(run):
        if _kind(other) == kind:
            found.setdefault(other.config["seed"], other)
    if not found:
        raise ValueError(
            f"baseline={kind!r}: {run.folder.parent} holds no finished random run of that kind for {run.folder.name}; `sepcap prune` "
            "without --out makes them, or give the runs"
        )
    return list(found.values())


def folder_of(baseline: str, direction: str | None, seed: int) -> str:
    """Name of the folder of a baseline in a comparison, which has no direction where it serves both."""
    return "-".join(["random", baseline, *([direction] if direction else []), str(seed)])


def few_steps(steps: int) -> int:
    """At how many steps baselines are evaluated: a divisor of the steps of a run, from 3 to 5 where there is one, else all steps."""
    return max((n for n in (3, 4, 5) if steps % n == 0), default=steps)


def _beside(run: Run) -> Iterator[Run]:
    """Finished random runs that are baselines of a run, in the folder in which it lies itself, among whatever else is there."""
    for path in sorted(run.folder.parent.glob("*/config.json")):
        with contextlib.suppress(CorruptFile):  # another study, a model, or a run that is damaged: none is a baseline
            other = Run(path.parent)
            if other.config.get("importance") == "random" and other.finished and not why_not(run, other):
                yield other


def no_baseline(run: Run) -> str:
    """That a finished run stands alone, and what puts random neurons beside it; empty where it is random itself or they are there."""
    if not run.finished or run.config["importance"] == "random" or any(True for _ in _beside(run)):
        return ""
    there, out = str(run.folder), f"{run.folder}-random-0"
    words = shlex.join(["--importance", "random", "--baseline", "per_layer", "--matched", there, "--seed", "0", "--out", out])
    return (
        "No random neurons stand beside this run, so what the selection itself gains is not known. They need no collection, and five seeds "
        f"are a fair number. The same command with `{words}` makes one; in Python, sepcap.prune(model, dataclasses.replace(config, "
        f"importance='random', baseline='per_layer', matched={there!r}, seed=0), out={out!r}). Then `sepcap report {shlex.quote(there)} "
        "--baseline per_layer` says what the selection gains."
    )
