"""Random neurons matched with those of another run: as many of every layer, and of every layer and activity (METHODS 5)."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sepcap.experiments.config import PruningConfig
from sepcap.experiments.run import Run
from sepcap.selection.matching import quantile_bins
from sepcap.selection.neurons import NeuronSet
from sepcap.storage import digest_of


@dataclass(frozen=True)
class Matched:
    """A finished run, and how random neurons are drawn like those that it took.

    Attributes:
        run: whose neurons are matched.
        every: how many of its steps one step of the baseline takes together.
        by_activity: whether the numbers are the same in every bin of activity as well.
        heads: whether attention goes by whole heads.
    """

    run: Run
    every: int
    by_activity: bool
    heads: bool

    @property
    def digest(self) -> str:
        """Tells what the draws depend on from anything else: the masks at the steps of the baseline, and what the bins are made of."""
        folders = [f"steps/{step:04d}/neurons.safetensors" for step in range(0, self.run.config["steps"] + 1, self.every)]
        sealed = [self.run.record(int(name[6:10]))["files"][name]["sha256"] for name in folders]
        if self.by_activity:
            sealed.append(self.run.record(0)["files"]["statistics/retain.safetensors"]["sha256"])
        return digest_of({"run": self.run.identity, "files": sealed})

    def taken(self, step: int) -> NeuronSet:
        """What the matched run took in the steps that are one step of the baseline."""
        return self.run.neurons(step * self.every) - self.run.neurons((step - 1) * self.every)

    def bins(self, site: str, shape: tuple[int, ...]) -> Int[Tensor, "layer unit"]:
        """Bin of every neuron, or head, of a site."""
        if not self.by_activity:
            return torch.zeros(shape, dtype=torch.long)
        activity = self.run.statistics("retain")[site].abs
        return quantile_bins(activity.mean(dim=-1) if self._by_head(site) else activity.flatten(1))

    def draw(self, step: int, gone: NeuronSet, seed: int) -> NeuronSet:
        """Neurons of one step of a baseline.

        Args:
            step: of the baseline, from 1.
            gone: what the baseline has taken so far; none of it is drawn again.
            seed: with the step, the kind of baseline and the two tasks it decides the draw.

        Returns:
            As many as the matched run took, of every layer and bin.
        """
        # else both directions and kinds would draw the same neurons wherever their numbers are the same
        which = {"by_activity": self.by_activity, "tasks": self.run.config["task_fingerprints"]}
        rng = np.random.default_rng([seed, step, int(digest_of(which), 16)])
        masks = {}
        for site, taken in self.taken(step).masks.items():
            whole = self._units(site, taken)
            drawn = draw_like(whole, self._units(site, gone.masks[site]), self.bins(site, tuple(whole.shape)), rng)
            masks[site] = (drawn[..., None] if self._by_head(site) else drawn.view(taken.shape)).expand(taken.shape).clone()
        return NeuronSet(masks)

    def _by_head(self, site: str) -> bool:
        return self.heads and site == "attn_pre_out"

    def _units(self, site: str, mask: Bool[Tensor, "layer *unit"]) -> Bool[Tensor, "layer unit"]:
        """What is drawn: whole heads where heads go, else neurons."""
        return mask.all(dim=-1) if self._by_head(site) else mask.flatten(1)


def draw_like(
    taken: Bool[Tensor, "layer unit"],
    gone: Bool[Tensor, "layer unit"],
    bins: Int[Tensor, "layer unit"],
    rng: np.random.Generator,
) -> Bool[Tensor, "layer unit"]:
    """As many of every layer and bin as `taken` has, uniformly without replacement among those that are not gone.

    There are always enough where `gone` was drawn like what the same run had taken before: it has as many left of every layer and bin.

    >>> taken, gone = torch.tensor([[True, False, False]]), torch.tensor([[False, True, True]])
    >>> draw_like(taken, gone, torch.zeros(1, 3, dtype=torch.long), np.random.default_rng(0))
    tensor([[ True, False, False]])
    """
    drawn = torch.zeros_like(taken)
    for layer, of in enumerate(bins):
        for number in of.unique():
            here = of == number
            left = (here & ~gone[layer]).nonzero().flatten().numpy()
            drawn[layer, rng.choice(left, int((here & taken[layer]).sum()), replace=False)] = True
    return drawn


def matched_with(config: PruningConfig) -> Matched:
    """The run that a baseline is matched with.

    Raises:
        FileNotFoundError: there is none in the folder.
        ValueError: it is not finished, it is random itself, it takes other shares of other sites, in steps of which those of the baseline
            are no multiple, or it has another basis or offset.
    """
    assert config.matched is not None
    run = Run.load(Path(config.matched).expanduser())
    c = run.config
    if not run.finished:
        raise ValueError(f"matched={config.matched!r}: that run is not finished; finish it first")
    if c["importance"] == "random":
        raise ValueError(f"matched={config.matched!r}: that run takes random neurons itself; give one that selects")
    if c["steps"] % config.steps:
        divisors = [n for n in range(1, c["steps"] + 1) if c["steps"] % n == 0]
        raise ValueError(
            f"steps={config.steps}: the run in {run.folder} has {c['steps']} steps, and every step of a baseline stands for as many of "
            f"them; give one of {divisors}"
        )
    every = c["steps"] // config.steps
    want = {site: amount * every for site, amount in c["fractions"].items()}
    if want.keys() != config.fractions.keys() or not all(math.isclose(want[site], config.fractions[site]) for site in want):
        raise ValueError(
            f"fractions={config.fractions}: the run in {run.folder} takes {c['fractions']} in {c['steps']} steps, "
            f"which is {want} in {config.steps}; give these"
        )
    if c["rotation"] != config.rotation:
        raise ValueError(
            f"rotation={config.rotation!r}: the run in {run.folder} takes its neurons in the basis {c['rotation']!r}; give that one"
        )
    if c["offset"] != config.offset:
        raise ValueError(
            f"offset={config.offset!r}: the run in {run.folder} has {c['offset']!r}, which alone moves accuracies; give that one"
        )
    return Matched(run, every, config.baseline == "activity", "heads" in c["fractions"])


def found_again(run: Run) -> Matched | None:
    """The run that a baseline is matched with, where it still lies there or beside the baseline; else nothing."""
    there = Path(run.config["matched"]).expanduser()
    for folder in (there, run.folder.parent / there.name):
        if (folder / "config.json").exists() and (found := matched_again(run, Run.load(folder))) is not None:
            return found
    return None


def matched_again(baseline: Run, run: Run) -> Matched | None:
    """How a baseline is matched with a run; nothing where it is matched with another one."""
    b, c = baseline.config, run.config
    if not run.finished or c["steps"] % b["steps"]:
        return None
    found = Matched(run, c["steps"] // b["steps"], b["baseline"] == "activity", "heads" in c["fractions"])
    return found if found.digest == b["matched_neurons"] else None


def counts_differ(run: Run, step: int, matched: Matched) -> list[str]:
    """Where what a step of a baseline has taken so far differs in number from what the matched run had taken, in sentences."""
    wrong = []
    for site, mask in run.neurons(step).masks.items():
        theirs = matched.run.neurons(step * matched.every).masks[site]
        mine, other = (matched._units(site, m) for m in (mask, theirs))
        bins = matched.bins(site, tuple(mine.shape))
        if any(not torch.equal((mine & (bins == n)).sum(1), (other & (bins == n)).sum(1)) for n in bins.unique()):
            what = "layer and bin of activity" if matched.by_activity else "layer"
            wrong.append(f"neurons.safetensors has other numbers of {site} per {what} than {matched.run.folder}, with which it is matched")
    return wrong


def baseline_config(config: PruningConfig, baseline: str, seed: int, steps: int, folder: Path | None = None) -> PruningConfig:
    """The configuration of a random baseline of a run.

    Args:
        config: of the run.
        baseline: "uniform", "per_layer" or "activity".
        seed: of the draws.
        steps: of the baseline, a divisor of those of the run.
        folder: where the run lies, for the two that are matched.
    """
    fractions = {site: amount * (config.steps // steps) for site, amount in config.fractions.items()}
    how = {"importance": "random", "baseline": baseline, "matched": None if folder is None else str(folder)}
    return replace(config, fractions=fractions, steps=steps, seed=seed, **how)
