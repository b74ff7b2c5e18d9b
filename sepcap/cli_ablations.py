"""`sepcap ablate` and `sepcap compare-ablations`: kinds of ablation, on random neurons and on heads."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from sepcap.cli_options import Loading, config_in, write_figure, write_figures, write_table
from sepcap.experiments.ablation_config import AblationProtocol


@dataclass(frozen=True)
class Ablate(AblationProtocol, Loading):
    """Ablate random neurons, more and more up to all of them, by several kinds on the same neurons, and compare ([PEAK])."""

    RESUMES = True

    task: str = "local-code"
    """The reference set: a name (see `sepcap tasks`) or the path of a .txt, .jsonl or .parquet file or folder."""
    out: Path = Path("runs/ablate")
    """Folder of the results; the same command goes on where an interrupted one stopped."""

    def run(self) -> None:
        """Carry out the command."""
        from sepcap import plots
        from sepcap.experiments.ablation_protocol import ablation_protocol

        result = ablation_protocol(self.load(), config_in(AblationProtocol, self), out=self.out)
        print(result.by_kind.to_string(float_format=lambda x: f"{x:.4f}"))
        write_figure(plots.ablation_protocol(result), self.out / "figures" / "ablation-protocol")


@dataclass(frozen=True)
class CompareAblations(Loading):
    """Ablate a head, or every head of the model, in every way: change of loss and top-1 with paired intervals."""

    task: str = "local-code"
    """Task on which loss and top-1 are measured."""
    layer: tuple[int, ...] = ()
    """Layer or layers of the heads; without --head, all heads of them."""
    head: tuple[int, ...] = ()
    """Head or heads of each of these layers. Without --layer and --head, every head of the model."""
    together: bool = False
    """Ablate all these heads at once, as one set."""
    controls: int = 0
    """So many random other heads (with --together, random sets of as many heads) are ablated beside them."""
    kinds: tuple[Literal["zero", "mean", "median", "peak", "resample", "optimal"], ...] = (
        "zero", "mean", "median", "peak", "resample", "optimal",
    )  # fmt: skip
    """Kinds of ablation."""
    tokens: int = 15_000
    """Predictions on which every ablation is measured."""
    seed: int = 0
    """Seed of resampling."""
    out: Path | None = None
    """Folder for result, table (.csv) and figures; default is named after task and heads, in runs/compare-ablations."""

    def folder(self) -> Path:
        """Where the result goes: a folder that holds nothing yet."""
        heads = [f"layer-{layer}" for layer in self.layer] + [f"head-{head}" for head in self.head] or ["all-heads"]
        folder = self.out or Path("runs/compare-ablations") / "-".join([Path(self.task).stem, *heads])
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(
                f"{folder} is not empty: `sepcap report {folder}` shows a result that is there; give another folder with --out for this one"
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
