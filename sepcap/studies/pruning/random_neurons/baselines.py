"""Random neurons matched with those of another run: as many per layer, or per layer and activity (METHODS 5)."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sepcap.selection.matching import quantile_bins
from sepcap.selection.neurons import NeuronSet
from sepcap.storage import digest_of
from sepcap.studies.base.fields import Schedule
from sepcap.studies.pruning.config import PruningConfig
from sepcap.studies.pruning.on_disk.run_folder import RunFolder


@dataclass(frozen=True)
class Matched:
    """A finished run, and how random neurons are matched with those that it pruned.

    Attributes:
        run: the run whose neurons are matched.
        every: number of its steps that one step of the baseline covers.
        by_activity: whether the numbers are also equal in every bin of activity.
        heads: whether attention is pruned by whole heads.
    """

    run: RunFolder
    every: int
    by_activity: bool
    heads: bool

    @property
    def digest(self) -> str:
        """Digest of what the draws depend on: the masks at the steps of the baseline, and the statistics that define the bins."""
        folders = [f"steps/{step:04d}/neurons.safetensors" for step in range(0, self.run.config["steps"] + 1, self.every)]
        sealed = [self.run.record(int(name[6:10]))["files"][name]["sha256"] for name in folders]
        if self.by_activity:
            sealed.append(self.run.record(0)["files"]["statistics/retain.safetensors"]["sha256"])
        return digest_of({"run": self.run.identity, "files": sealed})

    def taken(self, step: int) -> NeuronSet:
        """Neurons that the matched run pruned in the steps covered by one step of the baseline."""
        return self.run.neurons(step * self.every) - self.run.neurons((step - 1) * self.every)

    def bins(self, site: str, shape: tuple[int, ...]) -> Int[Tensor, "layer unit"]:
        """Bin of every neuron, or head, of a site."""
        if not self.by_activity:
            return torch.zeros(shape, dtype=torch.long)
        activity = self.run.statistics("retain")[site].abs
        return quantile_bins(activity.mean(dim=-1) if self._by_head(site) else activity.flatten(1))

    def draw(self, step: int, pruned: NeuronSet, seed: int) -> NeuronSet:
        """Draw the neurons of one step of a baseline.

        Args:
            step: step of the baseline, from 1.
            pruned: neurons that the baseline has pruned so far; none is drawn again.
            seed: determines the draw together with the step, the kind of baseline and the two tasks.

        Returns:
            As many per layer and bin as the matched run pruned.
        """
        # otherwise both directions and kinds would draw the same neurons if their numbers are equal
        which = {"by_activity": self.by_activity, "tasks": self.run.config["task_fingerprints"]}
        rng = np.random.default_rng([seed, step, int(digest_of(which), 16)])
        masks = {}
        for site, taken in self.taken(step).masks.items():
            whole = self._units(site, taken)
            drawn = draw_like(whole, self._units(site, pruned.masks[site]), self.bins(site, tuple(whole.shape)), rng)
            masks[site] = (drawn[..., None] if self._by_head(site) else drawn.view(taken.shape)).expand(taken.shape).clone()
        return NeuronSet(masks)

    def _by_head(self, site: str) -> bool:
        return self.heads and site == "attn_pre_out"

    def _units(self, site: str, mask: Bool[Tensor, "layer *unit"]) -> Bool[Tensor, "layer unit"]:
        """Units that are drawn: whole heads if heads are pruned, else neurons."""
        return mask.all(dim=-1) if self._by_head(site) else mask.flatten(1)


def draw_like(
    taken: Bool[Tensor, "layer unit"],
    pruned: Bool[Tensor, "layer unit"],
    bins: Int[Tensor, "layer unit"],
    rng: np.random.Generator,
) -> Bool[Tensor, "layer unit"]:
    """Draw as many per layer and bin as `taken` has, uniformly without replacement among those that are not in `pruned`.

    There are always enough if `pruned` was matched with earlier steps of the same run: as many are left per layer and bin.

    >>> taken, pruned = torch.tensor([[True, False, False]]), torch.tensor([[False, True, True]])
    >>> draw_like(taken, pruned, torch.zeros(1, 3, dtype=torch.long), np.random.default_rng(0))
    tensor([[ True, False, False]])
    """
    drawn = torch.zeros_like(taken)
    for layer, of in enumerate(bins):
        for number in of.unique():
            here = of == number
            left = (here & ~pruned[layer]).nonzero().flatten().numpy()
            drawn[layer, rng.choice(left, int((here & taken[layer]).sum()), replace=False)] = True
    return drawn


def matched_with(config: PruningConfig) -> Matched:
    """The run that a baseline is matched with.

    Raises:
        FileNotFoundError: there is none in the folder.
        ValueError: it is not finished, it is random itself, it prunes other shares or sites, the number of steps of the baseline does not
            divide its own, or it has another basis or offset.
    """
    assert config.matched is not None
    run = RunFolder.load(Path(config.matched).expanduser())
    c = run.config
    if not run.finished:
        raise ValueError(f"matched={config.matched!r}: that run is not finished; finish it first")
    if c["importance"] == "random":
        raise ValueError(f"matched={config.matched!r}: that run prunes random neurons itself; give one that selects")
    if c["steps"] % config.steps:
        divisors = [n for n in range(1, c["steps"] + 1) if c["steps"] % n == 0]
        raise ValueError(
            f"steps={config.steps}: the run in {run.folder} has {c['steps']} steps, and every step of a baseline covers as many of "
            f"them; give one of {divisors}"
        )
    every = c["steps"] // config.steps
    want = Schedule.of(c).joined(every)
    if not want.as_much(config.pace):
        wanted = f"schedule={want.given}" if want.given else f"{want.fractions} in {config.steps}"
        raise ValueError(
            f"fractions={config.fractions}: the run in {run.folder} prunes {c['fractions']} in {c['steps']} steps, "
            f"which is {wanted}; give these"
        )
    if c["rotation"] != config.rotation:
        raise ValueError(f"rotation={config.rotation!r}: the run in {run.folder} prunes in the basis {c['rotation']!r}; give that one")
    if c["offset"] != config.offset:
        raise ValueError(
            f"offset={config.offset!r}: the run in {run.folder} has {c['offset']!r}, which by itself changes accuracies; give that one"
        )
    return Matched(run, every, config.baseline == "activity", "heads" in c["fractions"])


def found_again(run: RunFolder) -> Matched | None:
    """The run that a baseline is matched with, if it is still in its folder or next to the baseline; else None."""
    there = Path(run.config["matched"]).expanduser()
    for folder in (there, run.folder.parent / there.name):
        if (folder / "config.json").exists() and (found := matched_again(run, RunFolder.load(folder))) is not None:
            return found
    return None


def matched_again(baseline: RunFolder, run: RunFolder) -> Matched | None:
    """How a baseline is matched with a run; None if it is matched with another one."""
    b, c = baseline.config, run.config
    if not run.finished or c["steps"] % b["steps"]:
        return None
    found = Matched(run, c["steps"] // b["steps"], b["baseline"] == "activity", "heads" in c["fractions"])
    return found if found.digest == b["matched_neurons"] else None


def counts_differ(run: RunFolder, step: int, matched: Matched) -> list[str]:
    """Differences in number between the neurons pruned so far by a baseline and by the matched run, in sentences."""
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
        config: configuration of the run.
        baseline: "uniform", "per_layer" or "activity".
        seed: seed of the draws.
        steps: number of steps of the baseline, a divisor of that of the run.
        folder: folder of the run, for the two matched kinds.
    """
    pace = config.pace.joined(config.steps // steps)
    how = {"fractions": pace.total if pace.given else pace.fractions, "steps": steps, "schedule": pace.given}
    how |= {"importance": "random", "baseline": baseline, "matched": None if folder is None else str(folder)}
    return replace(config, seed=seed, **how)
