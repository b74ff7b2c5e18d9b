"""`sepcap geometry`: similarity of activations, single residual dimensions, and how narrow blocks are."""

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sepcap.cli.options import Loading, OnDevice, config_in, show, write_figure
from sepcap.studies.jacobian.config import JacobianSpectrumConfig

MOST_BYTES = 64 * 2**20
"""Maximum size of a table of `find-dimensions`."""


@dataclass(frozen=True)
class _Texts(Loading):
    """Options for the model and the texts."""

    random_weights: bool = False
    """The control: weights as initialised, before training."""
    tasks: tuple[str, ...] = ()
    """Categories: names of tasks (see `sepcap tasks`) or paths; default is prose, language reference, Python and C++ available offline."""
    per_category: int = 5
    """Texts per category."""
    context: int | None = None
    """Tokens that every text must fill; default is the model's context, at most 512."""
    positions: tuple[int, ...] = ()
    """Token positions to use; default is every fourth of the last 37 of the context."""
    skip: int = 0
    """Texts per category to skip first: the value of --per-category gives texts that another command did not use."""
    permutations: int = 20_000
    """Maximum number of relabellings of the texts in the permutation test."""
    seed: int = 0
    """Seed of the relabellings, of the halves of the texts and of random weights."""

    def loaded(self, *, random_weights: bool = False) -> Any:
        """Load the model."""
        return self.load(random_weights=random_weights or self.random_weights, seed=self.seed)

    def texts(self, model: Any) -> Any:
        """The texts of the tasks, or the offline ones."""
        import sepcap
        from sepcap.tasks.labelled import check_positions

        texts = {Path(task).stem: task for task in self.tasks}
        if len(texts) < len(self.tasks):
            raise ValueError(f"tasks={self.tasks}: two have the same name; give each once")
        _, length = check_positions(model, self.positions or None, self.context)
        chosen = {"per_category": self.per_category, "skip": self.skip, "context": self.context, "differ_within": length}
        return sepcap.load_labelled_texts(model, texts or None, **chosen)

    def options(self) -> dict[str, Any]:
        """Arguments shared by the functions of `similarity`, `dimensions` and `find-dimensions`."""
        return {name: getattr(self, name) for name in ("context", "permutations", "seed", "batch_size")} | {
            "positions": self.positions or None
        }


@dataclass(frozen=True)
class Similarity(_Texts):
    """Are activations of texts of one kind more similar than those of different kinds, and in which layers?"""

    what: Literal["attn_out", "mlp_out", "resid_post"] = "attn_out"
    """The output that attention or mlp adds to the residual stream, or the residual stream after the block."""
    head: int | None = None
    """The output of this head of every layer instead."""
    layer: int | None = None
    """With --head: only this layer."""
    scaled: bool = False
    """Divide every vector by the largest norm among them instead of its own, so that lengths count."""
    control: bool = False
    """Also measure with random weights, report the difference made by training, paired over the texts, and plot both."""
    out: Path = Path("runs/geometry/similarity")
    """Folder of the result."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap

        if self.layer is not None and self.head is None:
            raise ValueError(f"layer={self.layer} needs a head: give --head too; without both, all layers are compared")
        if self.control and self.random_weights:
            raise ValueError("--control compares with random weights, and --random-weights uses only those: give one of them")
        head = self.head if self.layer is None else (self.layer, self.head)
        what = self.what if head is None else head
        model = self.loaded()
        texts = self.texts(model)
        found = sepcap.compare_activations(model, texts, what=what, scaled=self.scaled, **self.options())
        found.save(self.out)
        show(found, self.out)
        if self.control:
            other = sepcap.compare_activations(self.loaded(random_weights=True), texts, what=what, scaled=self.scaled, **self.options())
            other.save(self.out / "random-weights")
            print("\nDifference from random weights, with a 95% confidence interval paired over the texts:")
            print(found.compared(other).to_string(index=False, float_format=lambda x: f"{x:.4f}"))
            write_figure(found.figure("profile", control=other), self.out / "figures" / "profile-control")


@dataclass(frozen=True)
class Streams(_Texts):
    """Which residual dimensions separate kinds of text, and how do they change across the layers?"""

    dims: tuple[int, ...] = ()
    """Dimensions to trace; default is those that separate the categories best in one half of the texts, shown on the other half."""
    found: Path | None = None
    """Trace the dimensions in this file of `find-dimensions` instead; with the same texts and seed, the half that was not searched is
    shown."""
    per_category: int = 10
    """Texts per category."""
    n: int = 4
    """Number of dimensions to search for, if none are given."""
    out: Path = Path("runs/geometry/streams")
    """Folder of the result."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap

        if self.dims and self.found:
            raise ValueError(f"dims={self.dims} and found={self.found}: give one of them")
        dims: Any = _read(self.found).head(self.n) if self.found else self.dims
        model = self.loaded()
        texts = self.texts(model)
        if not len(dims):
            dims = sepcap.find_dimensions(model, texts, n=self.n, **self.options())
            _print_search(dims)
        found = sepcap.trace_dimensions(model, texts, dims, **self.options())
        found.save(self.out)
        show(found, self.out)


@dataclass(frozen=True)
class FindDims(_Texts):
    """Which residual dimensions separate the categories best? They are searched in one half of the texts and tested on the other."""

    per_category: int = 10
    """Texts per category."""
    n: int = 10
    """Number of dimensions to return."""
    stages: tuple[int, ...] = ()
    """Stages to search: 0 is the input of the first block, l + 1 the output of block l; default all."""
    out: Path = Path("runs/geometry/dims.csv")
    """File of the table, for `sepcap geometry dimensions --found`."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap
        from sepcap.storage import write_atomically

        if self.out.exists():
            raise FileExistsError(f"{self.out} already exists; give another --out. Nothing was changed.")
        model = self.loaded()
        table = sepcap.find_dimensions(model, self.texts(model), n=self.n, stages=self.stages or None, **self.options())
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.out, table.to_csv(index=False).encode())
        _print_search(table)
        print(f"\n  {self.out}  (sepcap geometry dimensions --found {self.out} traces them)")


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
    if not {"dim", "stage", "p"} <= set(table) or not len(table) or not pd.api.types.is_integer_dtype(table["dim"]):
        raise ValueError(f"found={path} is not a table of find-dimensions, with whole numbers in the column dim; {made}")
    return table


def _print_search(table: Any) -> None:
    shown = table[["dim", "stage", "eta2_searched", "eta2", "p", "p_uncorrected"]]
    print(shown.to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    print("Ranked on one half of the texts (eta2_searched); eta2 and p are of the other half, p corrected for these dims.\n", flush=True)


@dataclass(frozen=True)
class TightPass(JacobianSpectrumConfig, OnDevice):
    """How many directions pass through attention or an mlp: spectrum and rank of its Jacobian, without the residual connection."""

    RESUMES = True

    layer: tuple[int, ...] = ()
    """Layers; default all."""
    task: str = JacobianSpectrumConfig.task
    """Task from which the tokens are taken: a name (see `sepcap tasks`) or a path."""
    out: Path = Path("runs/geometry/tight-pass")
    """Folder of the study; repeat the command to resume after an interruption."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap

        config = dataclasses.replace(config_in(JacobianSpectrumConfig, self), layer=self.layer or "all")
        model = self.load()
        show(sepcap.jacobian_spectrum(model, out=self.out, say=partial(print, flush=True), **dataclasses.asdict(config)), self.out)


@dataclass(frozen=True)
class Geometry:
    """How similar are activations of different texts, and how narrow is a block? One of four studies."""

    study: (
        Annotated[Similarity, tyro.conf.subcommand("similarity")]
        | Annotated[Streams, tyro.conf.subcommand("dimensions")]
        | Annotated[FindDims, tyro.conf.subcommand("find-dimensions")]
        | Annotated[TightPass, tyro.conf.subcommand("jacobian")]
    ) = field(default_factory=Similarity)
    """Which study."""

    def run(self) -> None:
        """Carry out the command."""
        self.study.run()
