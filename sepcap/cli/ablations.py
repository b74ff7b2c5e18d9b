"""`sepcap ablate` and `sepcap compare-ablations`: kinds of ablation, on random neurons and on heads."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from sepcap.cli.options import Loading, config_in, write_figure, write_figures, write_table
from sepcap.studies.ablations.config import AblationSweepConfig


@dataclass(frozen=True)
class Ablate(AblationSweepConfig, Loading):
    """Ablate increasing numbers of random neurons, up to all, and compare several kinds of ablation on the same neurons ([PEAK])."""

    RESUMES = True

    task: str = "local-code"
    """The reference set: a name (see `sepcap tasks`) or the path of a .txt, .jsonl or .parquet file or folder."""
    out: Path = Path("runs/ablate")
    """Folder of the results; repeat the command to resume after an interruption."""

    def run(self) -> None:
        """Carry out the command."""
        from sepcap import plots
        from sepcap.studies.ablations.random_neurons import sweep_ablation

        result = sweep_ablation(self.load(), config_in(AblationSweepConfig, self), out=self.out)
        print(result.by_kind.to_string(float_format=lambda x: f"{x:.4f}"))
        write_figure(plots.ablation_protocol(result), self.out / "figures" / "ablation-protocol")


@dataclass(frozen=True)
class CompareAblations(Loading):
    """Ablate a head, or every head of the model, by every kind of ablation: change of loss and top-1 with paired intervals."""

    task: str = "local-code"
    """Task on which loss and top-1 are measured."""
    layer: tuple[int, ...] = ()
    """Layer or layers of the heads; without --head, all their heads."""
    head: tuple[int, ...] = ()
    """Head or heads of each of these layers. Without --layer and --head, every head of the model."""
    together: bool = False
    """Ablate all these heads at once, as one set."""
    controls: int = 0
    """Number of random other heads (with --together, random sets of as many heads) that are ablated as controls."""
    kinds: tuple[Literal["zero", "mean", "median", "peak", "resample", "optimal"], ...] = (
        "zero", "mean", "median", "peak", "resample", "optimal",
    )  # fmt: skip
    """Kinds of ablation."""
    tokens: int = 15_000
    """Number of predictions on which every ablation is measured."""
    seed: int = 0
    """Seed of resampling."""
    out: Path | None = None
    """Folder for result, table (.csv) and figures; default is a folder in runs/compare-ablations named after task and heads."""

    def folder(self) -> Path:
        """Folder of the result, which must be empty or new."""
        heads = [f"layer-{layer}" for layer in self.layer] + [f"head-{head}" for head in self.head] or ["all-heads"]
        folder = self.out or Path("runs/compare-ablations") / "-".join([Path(self.task).stem, *heads])
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(
                f"{folder} is not empty: `sepcap report {folder}` shows an existing result; give another folder with --out for this one"
            )
        return folder

    def run(self) -> None:
        """Carry out the command."""
        import sepcap

        folder = self.folder()
        model = self.load()
        comparison = sepcap.compare_ablations(
            model,
            self.task,
            layer=self.layer or None,
            head=self.head or None,
            together=self.together,
            controls=self.controls,
            kinds=self.kinds,
            tokens=self.tokens,
            seed=self.seed,
            batch_size=self.batch_size,
        )
        comparison.save(folder)
        print(comparison.table.to_string(index=False, float_format=lambda x: f"{x:.4f}") + "\n")
        write_table(comparison.table, folder / "table.csv")
        write_figures({metric: partial(comparison.figure, metric) for metric in ("loss", "top1")}, folder / "figures")
