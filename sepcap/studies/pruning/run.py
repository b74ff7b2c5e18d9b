"""A pruning run with comparison to random neurons, figures and a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pandas as pd
import torch

import sepcap
from sepcap.checks import checked
from sepcap.errors import unknown
from sepcap.models.loading.load import load_model
from sepcap.selection.figures import score_histograms
from sepcap.selection.neurons import top_of
from sepcap.statistics.intervals import Cluster
from sepcap.studies.base.folder import copy_folder
from sepcap.studies.base.result import Figures
from sepcap.studies.pruning.check_run import check_run
from sepcap.studies.pruning.figures.drops import drop_against_drop, perplexity_against_perplexity
from sepcap.studies.pruning.figures.pruned_neurons import pruned_neurons
from sepcap.studies.pruning.figures.steps import metric_over_steps, thresholds
from sepcap.studies.pruning.figures.trajectory import trajectory
from sepcap.studies.pruning.jumps.find import Jumps, find_jumps
from sepcap.studies.pruning.on_disk.run_folder import RunFolder
from sepcap.studies.pruning.random_neurons.above_random import baselines_of, with_above_random
from sepcap.studies.pruning.report import report, summary_of
from sepcap.studies.pruning.separability import Separability


class Run(RunFolder):
    """A pruning run on disk, finished or not.

    Attributes:
        folder: folder of the run.
        config: the resolved configuration, with versions, seeds and fingerprints.
        trajectory: one row per step and task: step, task, role, n, n_documents, every metric with its standard error, perplexity,
            perplexity_ratio (relative to the unpruned model's), pruned neurons and threshold per site, seconds and tokens of the step.

    Example:
        >>> run = sepcap.Run.load("runs/opt")  # doctest: +SKIP
        >>> run.separability("top1").percent  # doctest: +SKIP
    """

    TITLE: ClassVar[str] = "Can one task be pruned from the model, and the other kept?"
    FIGURES: ClassVar[Figures] = {
        "trajectory": ("Trajectory: accuracy on both tasks", trajectory),
        "drops": ("Drop of accuracy on both tasks", drop_against_drop),
        "perplexity": ("Perplexity on both tasks", perplexity_against_perplexity),
        "metric": ("Top-1 accuracy during pruning", metric_over_steps),
        "pruned": ("Share of pruned neurons of every layer", pruned_neurons),
        "threshold": ("The lowest score that was selected", thresholds),
        "scores": ("Scores of the unpruned model", lambda run, **options: score_histograms(run.scores(), **options)),
    }

    @checked()
    def separability(
        self,
        metric: str = "top1",
        *,
        specific: Literal["forget", "retain"] = "forget",
        baseline: RunFolder | Sequence[RunFolder] | str | None = None,
        seed: int = 0,
        cluster: Cluster = "document",
    ) -> Separability:
        """How separable the two tasks are along this run (METHODS 11).

        Args:
            metric: "top1", "top10", "skip50_top1" or "skip50_top10".
            specific: the role on the x axis; "forget" makes 2 the perfect area, "retain" makes it 0.
            baseline: random neurons to compare the area with: random runs that differ in their seed, or "uniform",
                "per_layer" or "activity" for those of the comparison that this run belongs to.
            seed: seed of the bootstrap.
            cluster: unit that is drawn for intervals, "document" or "package" with all its documents.

        Raises:
            ValueError: no step yet, an unpruned accuracy of 0, random runs that are not baselines of this run, or unknown packages.

        Example:
            >>> run.separability("top1", baseline="per_layer").above_random  # doctest: +SKIP
        """
        found = super().separability(metric, specific=specific, seed=seed, cluster=cluster)
        if baseline is None:
            return found
        return with_above_random(found, self, baselines_of(self, baseline), seed=seed, cluster=cluster)

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """`trajectory` by its name, as every result has its tables."""
        return {"trajectory": self.trajectory}

    @property
    def table(self) -> pd.DataFrame:
        """`trajectory`."""
        return self.trajectory

    @checked()
    def summary(self, baseline: RunFolder | Sequence[RunFolder] | str | None = None) -> list[str]:
        """What was pruned, what remains, and how separable the tasks are, in sentences.

        Args:
            baseline: random runs to compare with, as for `separability`.
        """
        return summary_of(self, [] if baseline is None else baselines_of(self, baseline))

    @checked()
    def jumps(
        self,
        model: Any = None,
        *,
        steps: Sequence[int] | Literal["all"] | None = None,
        top: int = 10,
        tasks: Mapping[str, Any] | None = None,
        device: str | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> Jumps:
        """Attribute jumps of accuracy after pruning steps to target tokens, and to predictions right by the bigram path (METHODS 11).

        The predictions of both tasks are made again from the stored neurons, two passes per step and task.

        Args:
            model: the unpruned model of the run, as `load_model` takes or returns it; it is left unchanged. Default is to load it.
            steps: pruning steps to compare with the ones before them, or "all"; default is the three after which the top-1 accuracy of
                a task changed most. These were chosen by their change, which chance makes larger.
            top: number of targets per step and task that gained most, and that lost most.
            tasks: role -> texts, for tasks that cannot be found by their names, such as lists of texts.
            device: where the model is loaded, if none is given or by its name.
            batch_size: rows per forward pass; default is that of the run.
            seed: seed of the bootstrap over documents.

        Returns:
            Jumps with tables "jumps" and "tokens", and figures of the same names.

        Raises:
            ValueError: another model or other texts than those of the run, a model that predicts no next tokens, steps that the run does
                not have.

        Source: [SEP] sections 3.5.3 and 4.3.13.

        Example:
            >>> jumps = run.jumps()  # doctest: +SKIP
            >>> jumps.table[["step", "task", "change", "bigram", "share"]]  # doctest: +SKIP
        """
        return find_jumps(self, model, steps=steps, top=top, tasks=tasks, device=device, batch_size=batch_size, seed=seed)

    @checked()
    def examined(self, step: int, n: int) -> dict[str, Any]:
        """What `sepcap.examine` takes for the neurons that a step pruned: the n highest by the scores of the unpruned model, and the tasks.

        Of a random run n are drawn by its seed.

        Raises:
            ValueError: step 0, or a run in a rotated basis.
            IndexError: a step that the run does not have.
        """
        if step < 1:
            raise ValueError(f"step={step}: no neuron is pruned before step 1; give 1 to {self.steps_done}")
        if self.config.get("rotation", "none") != "none":
            raise ValueError("this run prunes in a rotated basis; apply run.rotation() to a model, and examine run.neurons(step) on that")
        neurons = self.neurons(step) - self.neurons(step - 1)
        scores = None if self.config["importance"] == "random" else self.scores()
        drawn = torch.Generator().manual_seed(self.config["seed"])
        ranks = {site: torch.rand(mask.shape, generator=drawn) for site, mask in neurons.masks.items()} if scores is None else scores
        ranked = {site: ranks[site].cpu().masked_fill(~mask, -torch.inf) for site, mask in neurons.masks.items()}
        few = {site: min(n, neurons.count(site)) for site in neurons.masks if neurons.count(site)}
        neurons, _ = top_of(ranked, few)
        return {"neurons": neurons, "scores": scores, "tasks": (self.config["forget"], self.config["retain"])}

    @checked()
    def examine(self, step: int = 1, model: Any = None, n: int = 50, **how: Any) -> Any:
        """Profiles of the neurons that a step pruned, in the unpruned model; see `sepcap.examine` (METHODS 23).

        Args:
            step: a pruning step.
            model: the unpruned model; default is to load it.
            n: the n highest scores per site among the neurons of the step; of a random run n are drawn.
            how: other arguments of `sepcap.examine`, such as tasks that cannot be loaded by their names.

        Example:
            >>> run.examine(1, model, n=20).report("first-step.html")  # doctest: +SKIP
        """
        found = self.examined(step, n) | how
        of = load_model(self.config["model"] if model is None else model, dtype=self.config["dtype"].removeprefix("torch."))
        self.check_model(of)
        return sepcap.examine(of, **found)

    @checked()
    def figure(self, kind: str | None = None, **options: Any) -> Any:
        """A figure of the run, by its name in `FIGURES`; default is the trajectory."""
        kind = next(iter(self.FIGURES)) if kind is None else kind
        if kind not in self.FIGURES:
            raise unknown("figure", kind, self.FIGURES)
        return self.FIGURES[kind][1](self, **options)

    @checked()
    def save(self, folder: str | Path) -> Path:
        """Copy the folder of the run, finished or not; `sepcap.Run.load` opens the copy.

        Raises:
            FileExistsError: the folder exists and is not empty.
        """
        return copy_folder(self.folder, folder)

    @checked()
    def report(
        self,
        path: str | Path | None = None,
        *,
        model: Any = None,
        baseline: RunFolder | Sequence[RunFolder] | str | None = None,
        device: str | None = None,
    ) -> Path:
        """Write one self-contained HTML page about the run; see `sepcap.studies.pruning.report.report`."""
        return report(self, path, model=model, baseline=baseline, device=device)


def whole_run(folder: str | Path) -> Run:
    """Load the run in a folder and compare all of its files with what was recorded when they were written.

    Raises:
        FileNotFoundError: there is none.
        CorruptFile: a file differs from what was written; it is named.
    """
    run = Run.load(folder)
    check_run(run)
    return run
