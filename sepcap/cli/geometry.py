"""`sepcap geometry`: similarity of activations, single residual dimensions, and how narrow blocks are."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from sepcap.cli.options import Group, Study, Untrained, study_command, write_figure
from sepcap.studies.dimensions.config import DimensionSearchConfig, DimensionTracesConfig
from sepcap.studies.jacobian.config import JacobianSpectrumConfig
from sepcap.studies.similarity.config import ActivationSimilarityConfig

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
    """Trace the first n dimensions in this folder of `find-dimensions` instead; with the same texts and seed, the half that was not
    searched is shown."""

    def run(self) -> None:
        """Carry out the command."""
        if self.found is not None:
            if self.dims is not None:
                raise ValueError(f"dims={self.dims} and found={self.found}: give one of them")
            import sepcap

            object.__setattr__(self, "dims", sepcap.DimensionSearch.load(self.found).table.head(self.n))
        super().run()


@study_command("find_dimensions", out="runs/geometry/found", texts=HIDDEN)
class FindDimensions(DimensionSearchConfig, Untrained):
    """Which residual dimensions separate the categories best? They are searched in one half of the texts and tested on the other."""


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

