"""How far the area of a run is above that of random neurons, over documents and over seeds (METHODS 11)."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from sepcap.errors import unknown
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
        ValueError: baselines that are no random runs of one kind, or were evaluated on other tokens.
    """
    kinds = {baseline.config.get("baseline", "uniform") for baseline in baselines}
    if not baselines or len(kinds) > 1 or any(baseline.config["importance"] != "random" for baseline in baselines):
        raise ValueError(f"baseline: {len(baselines)} runs of the kinds {sorted(kinds)}; give random runs that differ in their seed alone")
    mine = run.config["samples"]["evaluate"]
    for baseline in baselines:
        # drawn uniformly, random neurons have no direction: one baseline serves a pair of tasks both ways round
        if set(baseline.config["samples"]["evaluate"].values()) != set(mine.values()):
            raise ValueError(f"baseline: {baseline.folder} was evaluated on other tokens than {run.folder}: areas cannot be compared")
    steps, theirs = equal_steps(run, baselines[0])
    how = {"metric": found.metric, "samples": mine, "specific": found.specific, "seed": seed, "cluster": cluster}
    selected, random = over_seeds([run], **how, steps=steps), over_seeds(baselines, **how, steps=theirs)
    return dataclasses.replace(
        found,
        above_random=selected.mean - random.mean,
        above_random_interval=bootstrap_interval(selected.replicas - random.replicas, min(found.n_clusters)),
        baseline=kinds.pop(),
        seeds=len(baselines),
        seeds_sd=random.sd,
    )


def equal_steps(run: Run, baseline: Run) -> tuple[slice, slice]:
    """Steps of a run and of its baseline at which as many neurons are gone; all of both, where they go at different rates."""
    c, b = run.config, baseline.config
    every = c["steps"] // b["steps"] if b["steps"] and c["steps"] % b["steps"] == 0 else 0
    shares, others = c["fractions"], b["fractions"]
    if not every or shares.keys() != others.keys() or not all(math.isclose(shares[s] * every, others[s]) for s in shares):
        return slice(None), slice(None)
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
    for path in sorted(run.folder.parent.glob("*/config.json")):
        other = Run(path.parent)
        if other.config["importance"] == "random" and other.config.get("baseline", "uniform") == kind and _is_of(other, run):
            found.setdefault(other.config["seed"], other)
    if not found:
        raise ValueError(
            f"baseline={kind!r}: {run.folder.parent} holds no finished random run of that kind for {run.folder.name}; `sepcap prune` "
            "without --out makes them, or give the runs"
        )
    return list(found.values())


def _is_of(baseline: Run, run: Run) -> bool:
    """Whether a random run is a baseline of a run: pruned as far and in the same way, and evaluated on the same tokens."""
    if not baseline.finished or set(baseline.config["samples"]["evaluate"].values()) != set(run.config["samples"]["evaluate"].values()):
        return False
    if "matched_neurons" in baseline.config:
        return matched_again(baseline, run) is not None
    same = all(baseline.config.get(name) == run.config.get(name) for name in ("rotation", "offset", "model_fingerprint"))
    return same and equal_steps(run, baseline)[0] != slice(None)


def folder_of(baseline: str, direction: str, seed: int) -> str:
    """Name of the folder of a baseline in a comparison; neurons drawn uniformly have no direction."""
    return f"random-{baseline}-{seed}" if baseline == "uniform" else f"random-{baseline}-{direction}-{seed}"


def few_steps(steps: int) -> int:
    """At how many steps baselines are evaluated: a divisor of the steps of a run, from 3 to 5 where there is one, else all steps."""
    return max((n for n in (3, 4, 5) if steps % n == 0), default=steps)
