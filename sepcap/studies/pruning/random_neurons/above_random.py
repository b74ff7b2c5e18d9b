"""Area of a run minus that of random neurons, with intervals over documents and spread over seeds (METHODS 11)."""

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
from sepcap.statistics.intervals import Cluster, Ends, bootstrap_interval
from sepcap.studies.base.fields import Schedule
from sepcap.studies.pruning.on_disk.run_folder import RunFolder
from sepcap.studies.pruning.on_disk.step_files import ROLES
from sepcap.studies.pruning.random_neurons.baselines import matched_again
from sepcap.studies.pruning.separability import BASELINES, Separability, separability


@dataclass(frozen=True)
class OverSeeds:
    """Areas of runs that differ in their seed.

    Attributes:
        areas: area of every seed.
        mean: mean of the areas.
        sd: their standard deviation over seeds; NaN for one seed.
        interval: 95% bootstrap interval of the mean over the documents of the evaluation, for the seeds that were run.
        n_clusters: number of clusters drawn of the forget and of the retain task, see `Separability`.
        replicas: the mean in every bootstrap sample of the documents.
    """

    areas: Float[np.ndarray, " seed"]
    mean: float
    sd: float
    interval: Ends
    n_clusters: tuple[int, int]
    replicas: Float[np.ndarray, " replica"]


def over_seeds(
    runs: Sequence[RunFolder],
    metric: str = "top1",
    *,
    samples: dict[str, str] | None = None,
    steps: slice = slice(None),
    specific: Literal["forget", "retain"] = "forget",
    seed: int = 0,
    cluster: Cluster = "document",
) -> OverSeeds:
    """Areas of runs on the same documents that differ in their seed.

    Args:
        runs: at least one.
        metric: an accuracy.
        samples: role -> tokens that it is evaluated on, if the roles are swapped relative to the runs.
        steps: steps to use; default all.
        specific: role on the x axis.
        seed: seed of the bootstrap; the same seed draws the same documents for all runs on the same tokens.
        cluster: unit that is drawn.
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
    found: Separability, run: RunFolder, baselines: Sequence[RunFolder], *, seed: int = 0, cluster: Cluster = "document"
) -> Separability:
    """Add the difference from random neurons to a separability.

    If one step of the baselines covers several steps of the run, the area of the run is also computed at their steps: the difference is
    at equal steps.

    Raises:
        ValueError: random runs are not baselines of this run, or differ in more than their seed.
    """
    check_baselines(run, baselines)
    mine = run.config["samples"]["evaluate"]
    equal = equal_steps(run, baselines[0])
    assert equal is not None  # checked above
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


def separability_above(run: RunFolder, baselines: Sequence[RunFolder], metric: str) -> Separability:
    """The separability of a run, with the difference from random neurons if there are any."""
    found = run.separability(metric)
    return with_above_random(found, run, baselines) if baselines else found


def check_baselines(run: RunFolder, baselines: Sequence[RunFolder]) -> None:
    """Check that random runs are baselines of a run and differ only in their seed.

    Raises:
        ValueError: what is wrong with the runs.
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
            raise ValueError(f"baseline: {len(baselines)} runs with the {what} {values}; give random runs that differ only in their seed")
    seeds = [baseline.config["seed"] for baseline in baselines]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"baseline: {len(seeds)} runs with the seeds {seeds}; each counts once, so give runs of different seeds")


def why_not(run: RunFolder, baseline: RunFolder) -> str:
    """Why one run is not a random baseline of another, as the end of a sentence; empty if it is one.

    A baseline prunes as many random neurons of the same model in the same way, and is evaluated on the same tokens. Random neurons have
    a direction if they are matched with a run or have an offset; otherwise one baseline is valid for both directions of a pair of tasks.
    """
    c, b = run.config, baseline.config
    if b["importance"] != "random":
        return f"selects by {b['importance']!r}; give random runs that differ only in their seed"
    mine, theirs = c["samples"].get("evaluate", {}), b["samples"].get("evaluate", {})
    if set(theirs.values()) != set(mine.values()):
        return f"was evaluated on other tokens than {run.folder}: areas cannot be compared"
    for name, default in (("model_fingerprint", ""), ("rotation", "none"), ("offset", "none")):
        if c.get(name, default) != b.get(name, default):
            return f"has {name}={b.get(name, default)!r}, and {run.folder} has {c.get(name, default)!r}; give random runs with the same"
    if equal_steps(run, baseline) is None:
        return (
            f"prunes {b['fractions']} in {b['steps']} steps, and {run.folder} {c['fractions']} in {c['steps']}; give random runs "
            "whose steps prune as much as one or several steps of that run"
        )
    if baseline.steps_done < 1:
        return "has no pruning step yet"
    kind = _kind(baseline)
    if (kind != "uniform" or b.get("offset", "none") != "none") and theirs != mine:
        return f"forgets {b['forget']}, and {run.folder} {c['forget']}; {'an offset' if kind == 'uniform' else repr(kind)} has a direction"
    if kind != "uniform" and matched_again(baseline, run) is None:
        return f"is matched with another run than {run.folder}; give {kind!r} runs that were made with matched={str(run.folder)!r}"
    return ""


def _kind(baseline: RunFolder) -> str:
    return baseline.config.get("baseline", "uniform")


def equal_steps(run: RunFolder, baseline: RunFolder) -> tuple[slice, slice] | None:
    """Steps of a run and of its baseline with equal numbers of pruned neurons; None if a step of the baseline is not a multiple of those
    of the run."""
    c, b = run.config, baseline.config
    every = c["steps"] // b["steps"] if b["steps"] and c["steps"] % b["steps"] == 0 else 0
    if not every or not Schedule.of(c).joined(every).as_much(Schedule.of(b)):
        return None
    last = min(run.steps_done // every, baseline.steps_done)
    return slice(0, last * every + 1, every), slice(0, last + 1)


def baselines_of(run: RunFolder, baseline: RunFolder | Sequence[RunFolder] | str) -> list[RunFolder]:
    """Random runs as given, or those of a kind next to the run."""
    if isinstance(baseline, str):
        return baselines_beside(run, baseline)
    return [baseline] if isinstance(baseline, RunFolder) else list(baseline)


def baselines_beside(run: RunFolder, kind: str) -> list[RunFolder]:
    """The finished random runs of a kind next to a run, as a comparison writes them.

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
            f"baseline={kind!r}: {run.folder.parent} holds no finished random run of that kind for {run.folder.name}; `sepcap demo` "
            "makes them, or give the runs"
        )
    return list(found.values())


def folder_of(baseline: str, direction: str | None, seed: int) -> str:
    """Name of the folder of a baseline in a comparison, without a direction if the baseline is valid for both."""
    return "-".join(["random", baseline, *([direction] if direction else []), str(seed)])


def few_steps(steps: int) -> int:
    """Number of steps at which baselines are evaluated: a divisor of the steps of a run, from 3 to 5 if there is one, else all steps."""
    return max((n for n in (3, 4, 5) if steps % n == 0), default=steps)


def _beside(run: RunFolder) -> Iterator[RunFolder]:
    """Finished random runs that are baselines of a run, in the parent folder of the run."""
    for path in sorted(run.folder.parent.glob("*/config.json")):
        with contextlib.suppress(CorruptFile):  # another study, a model, or a damaged run is not a baseline
            other = RunFolder(path.parent)
            if other.config.get("importance") == "random" and other.finished and not why_not(run, other):
                yield other


def no_baseline(run: RunFolder) -> str:
    """That a finished run has no random baseline, and how to make one; empty if it is random itself or has one."""
    if not run.finished or run.config["importance"] == "random" or any(True for _ in _beside(run)):
        return ""
    there, out = str(run.folder), f"{run.folder}-random-0"
    words = shlex.join(["--importance", "random", "--baseline", "per_layer", "--matched", there, "--seed", "0", "--out", out])
    return (
        "This run has no random baseline, so the gain from selection is unknown. Baselines need no collection, and five seeds are a "
        f"reasonable number. The same command with `{words}` makes one; in Python, sepcap.prune(model, dataclasses.replace(config, "
        f"importance='random', baseline='per_layer', matched={there!r}, seed=0), out={out!r}). Then `sepcap report {shlex.quote(there)} "
        "--baseline per_layer` reports the gain from selection."
    )
