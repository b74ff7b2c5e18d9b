"""`sepcap geometry`: similarity of activations, single residual dimensions, and how narrow blocks are."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from sepcap.cli.options import Group, Study, Untrained, study_command, write_figure
from sepcap.studies.dimensions.config import DimensionSearchConfig, DimensionTracesConfig
from sepcap.studies.jacobian.config import JacobianSpectrumConfig
from sepcap.studies.similarity.config import ActivationSimilarityConfig

MOST_BYTES = 64 * 2**20
"""Maximum size of a table of `find-dimensions`."""

HIDDEN = tyro.conf.Suppress[None]
"""A field that cannot be typed."""


@study_command("compare_activations", out="runs/geometry/similarity", texts=HIDDEN)
class Similarity(ActivationSimilarityConfig, Untrained):
    """Are activations of texts of one kind more similar than those of different kinds, and in which layers?"""

    control: bool = False
    """Also measure with random weights, report the difference made by training, paired over the texts, and plot both."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap

        if self.control and self.random_weights:
            raise ValueError("--control compares with random weights, and --random-weights uses only those: give one of them")
        super().run()
        if self.control:
            found = sepcap.load_result(self.out)
            other = self.compute(self.load(random_weights=True), out=self.out / "random-weights")
            print("\nDifference from random weights, with a 95% confidence interval paired over the texts:")
            print(found.compared(other).to_string(index=False, float_format=lambda x: f"{x:.4f}"))
            write_figure(found.figure("profile", control=other), self.out / "figures" / "profile-control")


@study_command("trace_dimensions", out="runs/geometry/dimensions", texts=HIDDEN, dims=tuple[int, ...] | None)
class Dimensions(DimensionTracesConfig, Untrained):
    """Which residual dimensions separate kinds of text, and how do they change across the layers?"""

    found: Path | None = None
    """Trace the first n dimensions in this file of `find-dimensions` instead; with the same texts and seed, the half that was not searched
    is shown."""

    def run(self) -> None:
        """Carry out the command."""
        if self.found is not None:
            if self.dims is not None:
                raise ValueError(f"dims={self.dims} and found={self.found}: give one of them")
            object.__setattr__(self, "dims", _read(self.found).head(self.n))
        super().run()


@study_command("find_dimensions", out="runs/geometry/found.csv", texts=HIDDEN)
class FindDimensions(DimensionSearchConfig, Untrained):
    """Which residual dimensions separate the categories best? They are searched in one half of the texts and tested on the other."""

    RESUMES = False

    out: Path
    """File of the table, for `sepcap geometry dimensions --found`."""

    def run(self) -> None:
        """Carry out the command."""
        table = self.compute()
        shown = table[["dim", "location", "eta2_searched", "eta2", "p", "p_uncorrected"]]
        print(shown.to_string(index=False, float_format=lambda x: f"{x:.4g}"))
        print("Ranked on one half of the texts (eta2_searched); eta2 and p are of the other half, p corrected for these dims.")
        print(f"\n  {self.out}  (sepcap geometry dimensions --found {self.out} traces them)")


@study_command("jacobian_spectrum", out="runs/geometry/jacobian")
class Jacobian(JacobianSpectrumConfig, Study):
    """How many directions pass through attention or an mlp: spectrum and rank of its Jacobian, without the residual connection."""


@dataclass(frozen=True)
class Geometry(Group):
    """How similar are activations of different texts, and how narrow is a block? One of four studies; without a name, the similarity."""

    study: (
        Annotated[Similarity, tyro.conf.subcommand("similarity")]
        | Annotated[Dimensions, tyro.conf.subcommand("dimensions")]
        | Annotated[FindDimensions, tyro.conf.subcommand("find-dimensions")]
        | Annotated[Jacobian, tyro.conf.subcommand("jacobian")]
    ) = field(default_factory=Similarity)
    """Which study."""


def _read(path: Path) -> Any:
    import pandas as pd

    from sepcap.storage import open_regular

    made = f"`sepcap geometry find-dimensions --out {path}` creates one"
    if not path.exists():
        raise FileNotFoundError(f"found={path} does not exist; {made}")
    if path.is_file() and path.stat().st_size > MOST_BYTES:
        raise ValueError(f"found={path} has {path.stat().st_size:,} bytes, too many for a table of find-dimensions; {made}")
    with open_regular(path, "table of find-dimensions") as file:
        try:
            table = pd.read_csv(file)
        except ValueError as error:  # also what pandas and the decoder of its text raise
            raise ValueError(f"found={path} is not a table ({' '.join(str(error).split())}); {made}") from error
    if not {"dim", "location", "p"} <= set(table) or not len(table) or not pd.api.types.is_integer_dtype(table["dim"]):
        raise ValueError(f"found={path} is not a table of find-dimensions, with whole numbers in the column dim; {made}")
    return table
