"""Commands about single neurons: what they do, what their ablation changes, and how importances agree with that."""

import dataclasses
from pathlib import Path
from typing import Any

from sepcap.cli.options import Study, show, study_command
from sepcap.studies.ablations.config import AblationComparisonConfig, AblationSweepConfig
from sepcap.studies.importances.config import ImportanceComparisonConfig
from sepcap.studies.neuron_profiles.config import NeuronProfilesConfig
from sepcap.studies.single_ablations.config import SingleAblationsConfig


@study_command("ablate_each", out="runs/ablate-each", layers=tuple[int, ...] | None, heads=tuple[int, ...] | None, pairs=int | None)
class AblateEach(SingleAblationsConfig, Study):
    """Ablate every neuron, or head, alone: the exact change of loss and accuracy on two tasks, with paired intervals."""


@study_command("examine", out="runs/examine")
class Examine(NeuronProfilesConfig, Study):
    """Look at neurons: the texts on which they are active, the tokens they prefer, what they write to the logits; on one page.

    The neurons are the n highest scores, or with --run-folder those that a step of a run pruned.
    """

    run_folder: Path | None = None
    """Folder of a run: its tasks, and the neurons that it pruned in a step, the n highest scores among them."""
    step: int | None = None
    """Step of the run; default is the first."""

    def compute(self, model: Any = None, **more: Any) -> Any:
        """The profiles of the neurons of the run, or of those with the highest scores."""
        import sepcap

        if self.run_folder is None:
            if self.step is not None:
                raise ValueError(f"step={self.step}: a step is of a run; give --run-folder too")
            return super().compute(model, **more)
        run = sepcap.Run.load(self.run_folder)
        how = run.examined(1 if self.step is None else self.step, self.n)
        of_run = how.pop("tasks")
        named = self if self.tasks != NeuronProfilesConfig().tasks else dataclasses.replace(self, tasks=of_run)
        model = self.load() if model is None else model
        run.check_model(model)
        return super(Examine, named).compute(model, **how, **more)

    def load(self, **options: Any) -> Any:
        """Load the model of the run in its precision, unless others are named."""
        if self.run_folder is None:
            return super().load(**options)
        from sepcap.studies.pruning.on_disk.run_folder import RunFolder

        made = RunFolder.load(self.run_folder).config
        model = made["model"] if self.model == "default" else self.model
        dtype = made["dtype"].removeprefix("torch.") if self.dtype == "float32" else self.dtype
        return super(Examine, dataclasses.replace(self, model=model, dtype=dtype)).load(**options)

    def run(self) -> None:
        """Carry out the command."""
        result = self.compute()
        show(result, result.folder)
        print(f"  {result.report()}")


@study_command("sweep_ablation", out="runs/ablate")
class Ablate(AblationSweepConfig, Study):
    """Ablate increasing numbers of random neurons, up to all, and compare several kinds of ablation on the same neurons ([PEAK])."""


@study_command("compare_ablations", out="runs/compare-ablations", layer=tuple[int, ...] | None, head=tuple[int, ...] | None)
class CompareAblations(AblationComparisonConfig, Study):
    """Ablate a head, or every head of the model, by every kind of ablation: change of loss and top-1 with paired intervals."""


@study_command("compare_importances", out="runs/compare-importances")
class CompareImportances(ImportanceComparisonConfig, Study):
    """Compare every importance with the exact effect of every neuron ablated alone, and by how well pruning by it separates two tasks."""

    def load(self, **options: Any) -> Any:
        """Load the model of the command; a compiled one is loaded with its tasks and labels by the study."""
        return None if self.compiled is not None else super().load(**options)
