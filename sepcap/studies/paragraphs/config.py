"""Configuration of a paragraph transfer; imports nothing heavy."""

from dataclasses import dataclass
from typing import Any, Literal

from sepcap.checks import ANY, FROM_0, check_fields, distinct

Sites = Literal["mlp", "attn_pre_out", "resid"]
SITES: tuple[Sites, ...] = ("mlp", "attn_pre_out", "resid")
TRANSFERRED = ("mlp", "attn_pre_out")
GIVEN = (0, 1, 2, 5, 10, 20)


@dataclass(frozen=True)
class ParagraphTransferConfig:
    """How activations at a paragraph break are transferred, and what is measured ([PAR], METHODS 14)."""

    model: str = "default"
    """"default", a folder, or a hub name; a causal language model."""
    texts: Any = None
    """A text or several, each with a paragraph break; or passages, as `sepcap.sample_passages` takes them from tasks. Default is to take
    passages from `tasks`."""
    tasks: tuple[Any, ...] = ("local-prose", "local-python", "local-cpp")
    """Tasks from whose evaluation part texts are taken: names (see `sepcap tasks`), or paths of .txt, .jsonl or .parquet files or
    folders."""
    n: int = 24
    """Texts per task."""
    context: int = 128
    """Tokens before the break, in texts from tasks."""
    following: int = 48
    """Tokens of the paragraph after it, in texts from tasks."""
    at: str = "\n\n"
    """The break in the source whose activations are taken; default is two line ends. \\n is a line end and \\t a tab. Line ends directly
    after it belong to it."""
    into: str = "\n\n"
    """The neutral prompt; default is two line ends. If it ends with the break, its break has the tokens of the source's own break, which
    can be two line ends or include an indentation; otherwise its last tokens are patched, as many as both have."""
    which: int = -1
    """Which of the breaks of a text that a paragraph follows: 0 the first, -1 the last. In texts from tasks the first break with enough
    tokens on both sides is used."""
    layers: tuple[int, ...] | Literal["all"] = "all"
    """Patched layers, "all" or their numbers. With learned positions, the first layers carry the position of the break."""
    sites: tuple[Sites, ...] = TRANSFERRED
    """What is patched: mlp and attn_pre_out, one of them, or resid alone: the residual stream after each block."""
    scale: float = 1.0
    """Factor on the patched activations."""
    paragraph_tokens: int = 100
    """Most tokens of the next paragraph that are used."""
    generate: bool = True
    """Whether texts are generated; if not, only likelihoods are measured."""
    tokens: int = 100
    """Most tokens of a generated text."""
    temperature: float = 0.3
    """Temperature of generation; 0 always takes the most likely token."""
    samples: int = 1
    """Generated texts per source and condition."""
    given: tuple[int, ...] = GIVEN
    """Numbers of tokens of the next paragraph that baselines are given; 0 is the neutral prompt itself, which is always measured."""
    profile: Literal["likelihood", "generation", "none"] = "likelihood"
    """Profile over layers (each layer alone, the first, the last ones patched): by likelihood, also by generated texts, or none."""
    embedder: Any = "auto"
    """Embedder for distances: "auto" (all-mpnet-base-v2 if it is on this machine, else TF-IDF), "tf-idf", or the folder or name of a
    sentence-transformers model; in Python also a function from texts to vectors, or None."""
    seed: int = 0
    """Seed of sampling and of the choice of control texts."""
    batch_size: int = 32
    """Texts per forward pass, and per resumable part of a run."""

    def __post_init__(self) -> None:
        check_fields(self, which=ANY, given=FROM_0, layers=FROM_0)
        for name in ("at", "into"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give a text, such as a paragraph break")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"samples={self.samples}: at temperature=0 all samples are the same; give samples=1")
        distinct("given", self.given, fewest=0)
        if self.texts is None:
            distinct("tasks", self.tasks)
        if self.profile == "generation" and not self.generate:
            raise ValueError("profile='generation' needs generate=True")
