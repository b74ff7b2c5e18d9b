"""`sepcap geometry`: how activations of texts sit to each other, single residual dimensions, and how narrow blocks are."""

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sepcap.cli_options import Loading, OnDevice, config_in, show, write_figure
from sepcap.experiments.tight_pass_config import TightPassConfig

MOST_BYTES = 64 * 2**20
"""Of a table of `find-dims` that is read."""


@dataclass(frozen=True)
class _Texts(Loading):
    """Which model reads which texts."""

    random_weights: bool = False
    """The control: weights as they are before training."""
    tasks: tuple[str, ...] = ()
    """Categories: names of tasks (see `sepcap tasks`) or paths; default is prose, language reference, Python and C++ found offline."""
    per_category: int = 5
    """Texts per category."""
    context: int | None = None
    """Tokens that every text fills; default is the model's context, at most 512."""
    positions: tuple[int, ...] = ()
    """Token positions that are looked at; default is every fourth of the last 37 of the context."""
    skip: int = 0
    """Texts per category that are passed over first: with as many as --per-category, texts that another command did not see."""
    permutations: int = 20_000
    """Relabellings of the texts at most, for the test."""
    seed: int = 0
    """Of the relabellings, of the halves of the texts and of random weights."""

    def loaded(self, *, random_weights: bool = False) -> Any:
        """The model."""
        return self.load(random_weights=random_weights or self.random_weights, seed=self.seed)

    def texts(self, model: Any) -> Any:
        """Those of the tasks, or the offline ones."""
        import sepcap
        from sepcap.tasks.labelled import check_positions

        texts = {Path(task).stem: task for task in self.tasks}
        if len(texts) < len(self.tasks):
            raise ValueError(f"tasks={self.tasks}: two have the same name; give each once")
        _, length = check_positions(model, self.positions or None, self.context)
        chosen = {"per_category": self.per_category, "skip": self.skip, "context": self.context, "differ_within": length}
        return sepcap.labelled_texts(model, texts or None, **chosen)

    def options(self) -> dict[str, Any]:
        """What `similarity`, `streams` and `find_dims` take alike."""
        return {name: getattr(self, name) for name in ("context", "permutations", "seed", "batch_size")} | {
            "positions": self.positions or None
        }


@dataclass(frozen=True)
class Similarity(_Texts):
    """Are activations of texts of one kind more alike than those of different kinds, and in which layers?"""

    what: Literal["attn_out", "mlp_out", "block_out"] = "attn_out"
    """What attention or mlp adds to the residual stream, or the stream after the block."""
    head: int | None = None
    """What this head of every layer adds, instead."""
    layer: int | None = None
    """With --head: of this layer alone."""
    scaled: bool = False
    """Divide every vector by the largest norm among them instead of by its own: then lengths count."""
    control: bool = False
    """Do the same with random weights, say what training adds, paired over the texts, and draw both."""
    out: Path = Path("runs/geometry/similarity")
    """Folder of the result."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap

        if self.layer is not None and self.head is None:
            raise ValueError(f"layer={self.layer} goes with a head: give --head too; without both, all layers are compared")
        if self.control and self.random_weights:
            raise ValueError("--control compares with random weights, and --random-weights asks for nothing else: give one of them")
        head = self.head if self.layer is None else (self.layer, self.head)
        what = self.what if head is None else head
        model = self.loaded()
        texts = self.texts(model)
        found = sepcap.similarity(model, texts, what=what, scaled=self.scaled, **self.options())
        found.save(self.out)
        show(found, self.out)
        if self.control:
            other = sepcap.similarity(self.loaded(random_weights=True), texts, what=what, scaled=self.scaled, **self.options())
            other.save(self.out / "random-weights")
            print("\nMinus the same with random weights, with a 95% interval paired over the texts:")
            print(found.compared(other).to_string(index=False, float_format=lambda x: f"{x:.4f}"))
            write_figure(found.figure("profile", control=other), self.out / "figures" / "profile-control")


@dataclass(frozen=True)
class Streams(_Texts):
    """Which residual dimensions tell kinds of text apart, and how do they run through the layers?"""

    dims: tuple[int, ...] = ()
    """Dimensions to follow; default is those that separate the categories best in one half of the texts, shown on the other half."""
    found: Path | None = None
    """Follow the dimensions in this file of `find-dims` instead: of the same texts and seed, the half that was not searched is shown."""
    per_category: int = 10
    """Texts per category."""
    n: int = 4
    """How many are searched for, where none are given."""
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
            dims = sepcap.find_dims(model, texts, n=self.n, **self.options())
            _print_search(dims)
        found = sepcap.streams(model, texts, dims, **self.options())
        found.save(self.out)
        show(found, self.out)


@dataclass(frozen=True)
class FindDims(_Texts):
    """Which residual dimensions separate the categories best: searched in one half of the texts, tested on the other?"""

    per_category: int = 10
    """Texts per category."""
    n: int = 10
    """Dimensions to give back."""
    stages: tuple[int, ...] = ()
    """Stages to search: 0 is what enters the first block, l + 1 what leaves block l; default all."""
    out: Path = Path("runs/geometry/dims.csv")
    """File of the table, for `sepcap geometry streams --found`."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap
        from sepcap.storage import write_atomically

        if self.out.exists():
            raise FileExistsError(f"{self.out} is there already; give another --out. Nothing was changed.")
        model = self.loaded()
        table = sepcap.find_dims(model, self.texts(model), n=self.n, stages=self.stages or None, **self.options())
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.out, table.to_csv(index=False).encode())
        _print_search(table)
        print(f"\n  {self.out}  (sepcap geometry streams --found {self.out} follows them)")


def _read(path: Path) -> Any:
    import pandas as pd

    from sepcap.storage import open_regular

    made = f"`sepcap geometry find-dims --out {path}` makes one"
    if not path.exists():
        raise FileNotFoundError(f"found={path} does not exist; {made}")
    if path.is_file() and path.stat().st_size > MOST_BYTES:
        raise ValueError(f"found={path} has {path.stat().st_size:,} bytes, too many for a table of find-dims; {made}")
    with open_regular(path, "table of find-dims") as file:
        try:
            table = pd.read_csv(file)
        except ValueError as error:  # also what pandas and the decoder of its text raise
            raise ValueError(f"found={path} is no table ({' '.join(str(error).split())}); {made}") from error
    if not {"dim", "stage", "p"} <= set(table) or not len(table) or not pd.api.types.is_integer_dtype(table["dim"]):
        raise ValueError(f"found={path} is no table of find-dims, with whole numbers in the column dim; {made}")
    return table


def _print_search(table: Any) -> None:
    shown = table[["dim", "stage", "eta2_searched", "eta2", "p", "p_uncorrected"]]
    print(shown.to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    print("Ranked on one half of the texts (eta2_searched); eta2 and p are of the other half, p corrected for these.\n", flush=True)


@dataclass(frozen=True)
class TightPass(TightPassConfig, OnDevice):
    """How many directions pass through attention or an mlp: spectrum and rank of its Jacobian, without the residual connection."""

    RESUMES = True

    layer: tuple[int, ...] = ()
    """Layers; default all."""
    task: str = TightPassConfig.task
    """Where the tokens come from: a name (see `sepcap tasks`) or a path."""
    out: Path = Path("runs/geometry/tight-pass")
    """Folder of the study; the same command goes on where an interrupted one stopped."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap

        config = dataclasses.replace(config_in(TightPassConfig, self), layer=self.layer or "all")
        model = self.load()
        show(sepcap.tight_pass(model, out=self.out, say=partial(print, flush=True), **dataclasses.asdict(config)), self.out)


@dataclass(frozen=True)
class Geometry:
    """How do activations of different texts sit to each other, and how narrow is a block? One of four studies."""

    study: (
        Annotated[Similarity, tyro.conf.subcommand("similarity")]
        | Annotated[Streams, tyro.conf.subcommand("streams")]
        | Annotated[FindDims, tyro.conf.subcommand("find-dims")]
        | Annotated[TightPass, tyro.conf.subcommand("tight-pass")]
    ) = field(default_factory=Similarity)
    """Which study."""

    def run(self) -> None:
        """Carry out the command."""
        self.study.run()
