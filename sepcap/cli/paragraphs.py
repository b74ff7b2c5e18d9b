"""The command about paragraphs: `sepcap paragraphs`."""

import re
from typing import Annotated

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from sepcap.cli.options import Untrained, study_command
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


@study_command(
    "transfer_paragraphs",
    out="runs/paragraphs",
    at=Typed,
    into=Typed,
    texts=tyro.conf.Suppress[str | None],
    which=tyro.conf.Suppress[int],
)
class Paragraphs(ParagraphTransferConfig, Untrained):
    """Patch activations at a paragraph break into the break alone: what do they carry of the next paragraph ([PAR])?

    Measures likelihoods of the true paragraph and generated texts, compared with the whole context, the break alone, the break of
    another text (the control) and the first tokens of the paragraph; and which layers carry the information.
    """
