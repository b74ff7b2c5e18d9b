"""`sepcap geometry`: how activations of texts sit to each other, single residual dimensions, and how narrow blocks are."""

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sepcap.cli_options import config_in, show
from sepcap.experiments.tight_pass_config import TightPassConfig


@dataclass(frozen=True)
class _Texts:
    """Which model reads which texts."""

    model: str = "default"
    """"default", a folder, or a hub name."""
    random_weights: bool = False
    """The control: weights as they are before training."""
    tasks: tuple[str, ...] = ()
    """Categories: names of tasks (see `sepcap tasks`) or paths; default is prose, language reference, Python and C++ found offline."""
    per_category: int = 5
    """Texts per category."""
    context: int | None = None
    """Tokens that every text fills; default is the model's context, at most 512. Compared are every fourth of its last 37 positions."""
    permutations: int = 20_000
    """Relabellings of the texts at most, for the test."""
    seed: int = 0
    """Of the relabellings and of random weights."""

    def loaded(self) -> Any:
        """The model."""
        import sepcap

        return sepcap.load_model(self.model, random_weights=self.random_weights, seed=self.seed)

    def texts(self) -> dict[str, str] | None:
        """Category -> task; None for the offline texts."""
        texts = {Path(task).stem: task for task in self.tasks}
        if len(texts) < len(self.tasks):
            raise ValueError(f"tasks={self.tasks}: two have the same name; give each once")
        return texts or None

    def options(self) -> dict[str, Any]:
        """What `similarity` and `streams` take alike."""
        return {name: getattr(self, name) for name in ("per_category", "context", "permutations", "seed")}


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
    out: Path = Path("runs/geometry/similarity")
    """Folder of the result."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap

        if self.layer is not None and self.head is None:
            raise ValueError(f"layer={self.layer} goes with a head: give --head too; without both, all layers are compared")
        head = self.head if self.layer is None else (self.layer, self.head)
        what = self.what if head is None else head
        found = sepcap.similarity(self.loaded(), self.texts(), what=what, scaled=self.scaled, **self.options())
        found.save(self.out)
        show(found, self.out)


@dataclass(frozen=True)
class Streams(_Texts):
    """Which residual dimensions tell kinds of text apart, and how do they run through the layers?"""

    dims: tuple[int, ...] = ()
    """Dimensions to follow; default is the four that separate the categories best."""
    out: Path = Path("runs/geometry/streams")
    """Folder of the result."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap

        found = sepcap.streams(self.loaded(), self.texts(), self.dims or None, **self.options())
        found.save(self.out)
        show(found, self.out)


@dataclass(frozen=True)
class TightPass(TightPassConfig):
    """How many directions pass through attention or an mlp: spectrum and rank of its Jacobian, without the residual connection."""

    model: str = "default"
    """"default", a folder, or a hub name."""
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
        model = sepcap.load_model(self.model)
        show(sepcap.tight_pass(model, out=self.out, say=partial(print, flush=True), **dataclasses.asdict(config)), self.out)


@dataclass(frozen=True)
class Geometry:
    """How do activations of different texts sit to each other, and how narrow is a block? One of three studies."""

    study: (
        Annotated[Similarity, tyro.conf.subcommand("similarity")]
        | Annotated[Streams, tyro.conf.subcommand("streams")]
        | Annotated[TightPass, tyro.conf.subcommand("tight-pass")]
    ) = field(default_factory=Similarity)
    """Which study."""

    def run(self) -> None:
        """Carry out the command."""
        self.study.run()
