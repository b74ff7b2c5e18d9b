"""The command about paragraphs: `sepcap paragraphs`."""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from sepcap.cli.options import Loading, config_in, write_figures
from sepcap.studies.paragraphs.config import ParagraphTransferConfig

ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


def typed(text: str) -> str:
    """Decode a text typed in a shell: the two characters \\n are a line end, \\t a tab, two backslashes one.

    >>> typed(r"\\n\\n") == "\\n" * 2
    True
    """
    return re.sub(r"\\([nt\\])", lambda found: ESCAPES[found[1]], text)


def as_typed(text: str) -> str:
    """The inverse of `typed`."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")


Typed = Annotated[
    str,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="TEXT",
        instance_from_str=lambda args: typed(args[0]),
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [as_typed(value)],
    ),
]


@dataclass(frozen=True)
class Transfer(ParagraphTransferConfig, Loading):
    """Patch activations at a paragraph break into the break alone: what do they carry of the next paragraph ([PAR])?

    Measures likelihoods of the true paragraph and generated texts, compared with the whole context, the break alone, the break of
    another text (the control) and the first tokens of the paragraph; and which layers carry the information.
    """

    RESUMES = True

    at: Typed = "\n\n"
    """The break in the source whose activations are taken; default is two line ends. \\n is a line end and \\t a tab. Line ends directly
    after it belong to it."""
    into: Typed = "\n\n"
    """The neutral prompt; default is two line ends. If it ends with the break, the break has the same tokens as in the source; otherwise
    the last tokens are patched, as many as both have."""
    tasks: tuple[str, ...] = ("local-prose", "local-python", "local-cpp")
    """Tasks from whose evaluation part texts are taken (see `sepcap tasks`), or paths of .txt, .jsonl or .parquet files or folders."""
    n: int = 24
    """Texts per task."""
    context: int = 128
    """Tokens before the break."""
    following: int = 48
    """Tokens of the paragraph after it."""
    embedder: str = "auto"
    """Embedder for distances: "auto" (all-mpnet-base-v2 if it is on this machine, else TF-IDF), "tf-idf", or the folder or name of a
    sentence-transformers model."""
    which: tyro.conf.Suppress[int] = -1
    """In texts from tasks the first break with enough tokens on both sides is used, so there is no choice."""
    random_weights: bool = False
    """The control: the same configuration with weights as initialised, before training."""
    out: Path = Path("runs/transfer")
    """Folder of the study; repeat the command to resume after an interruption."""

    def run(self) -> None:
        """Carry out the command."""
        from sepcap.studies.paragraphs.study import execute, plan_paragraph_transfer
        from sepcap.tasks.passages import sample_passages

        model = self.load(random_weights=self.random_weights)
        texts = sample_passages(model.tokenizer, self.tasks, self.n, context=self.context, following=self.following, at=self.at)
        plan = plan_paragraph_transfer(model, texts, config_in(ParagraphTransferConfig, self), self.embedder)
        print(plan.cost(), flush=True)
        result = execute(plan, self.out)
        for name in ("differences", "values", "layers", "positions"):
            result.tables[name].to_csv(self.out / f"{name}.csv", index=False)
        table = result.tables["differences"]
        shown = table[table["kind"] == "all"].drop(columns="kind").round(3)
        print(shown.to_string(index=False, na_rep=""))
        print()
        print(*result.summary(), sep="\n")
        print(f"\n  {self.out / 'differences.csv'}")
        kinds = [kind for kind in result.FIGURES if (kind != "distances" or self.generate) and (kind != "layers" or self.profile != "none")]
        write_figures({kind: partial(result.figure, kind) for kind in kinds}, self.out / "figures")
