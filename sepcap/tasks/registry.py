"""The named tasks: a table of rows, not code."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from sepcap.checks import checked
from sepcap.errors import unknown
from sepcap.tasks.sources.hub_rows import HubRow
from sepcap.tasks.sources.local import Kind


@dataclass(frozen=True)
class LocalRow:
    """One offline task: the kinds of local text that it mixes in equal numbers of tokens, and their description."""

    kinds: tuple[Kind, ...]
    description: str
    content: Literal["text", "images"] = "text"


@dataclass(frozen=True)
class DigitsRow:
    """Some of the handwritten digits that ship with scikit-learn."""

    digits: tuple[int, ...]
    description: str
    content: Literal["text", "images"] = "images"


PILE = "monology/pile-uncopyrighted"
"""The Pile without Books3, BookCorpus2, OpenSubtitles, YTSubtitles and OpenWebText2, whose texts are under copyright."""

PILE_LICENCE = "the Pile's, without the subsets under copyright"

PILE_SUBSETS: dict[str, str] = {
    "arxiv": "ArXiv",
    "dm_mathematics": "DM Mathematics",
    "enron_emails": "Enron Emails",
    "europarl": "EuroParl",
    "freelaw": "FreeLaw",
    "github": "Github",
    "gutenberg": "Gutenberg (PG-19)",
    "hackernews": "HackerNews",
    "nih_exporter": "NIH ExPorter",
    "philpapers": "PhilPapers",
    "pile_cc": "Pile-CC",
    "pubmed_abstracts": "PubMed Abstracts",
    "pubmed_central": "PubMed Central",
    "stackexchange": "StackExchange",
    "ubuntu_irc": "Ubuntu IRC",
    "uspto_backgrounds": "USPTO Backgrounds",
    "wikipedia": "Wikipedia (en)",
}
"""Subset in the name of the task -> `meta.pile_set_name` in the data."""

CODE = "codeparrot/github-code-clean"
CODE_FILES = "data/train-*.parquet"
"""Read directly: the dataset has a loading script on the hub, and such scripts no longer run."""

CIFAR = "uoft-cs/cifar100"
CIFAR_SUPERCLASSES = (
    "aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables",
    "household_electrical_devices", "household_furniture", "insects", "large_carnivores", "large_man-made_outdoor_things",
    "large_natural_outdoor_scenes", "large_omnivores_and_herbivores", "medium_mammals", "non-insect_invertebrates", "people",
    "reptiles", "small_mammals", "trees", "vehicles_1", "vehicles_2",
)  # fmt: skip
"""In the order of their `coarse_label`."""

IMAGENET_LICENCE = "ImageNet terms of access, non-commercial research and education"
IMAGENET_GATE = "the page asks you to agree to the ImageNet terms of access"
BIRDS = (*range(7, 25), *range(80, 101), *range(127, 147))
"""The 59 classes of ImageNet that are birds: cock to great grey owl, black grouse to black swan, white stork to albatross."""

CAMEL_FILES, CAMEL_REVISION = "default/train/*.parquet", "refs/convert/parquet"
"""The hub's own conversion: the original files are archives of twenty thousand small files, which cannot be streamed."""

Row = LocalRow | DigitsRow | HubRow


def _pile(description: str, *conditions: tuple[str, str, Any]) -> HubRow:
    # the test split: no model was trained on it, and a rare subset is found in it without reading gigabytes
    return HubRow(PILE, description, split="test", filter=conditions, licence=PILE_LICENCE)


def _code(description: str, *conditions: tuple[str, str, Any]) -> HubRow:
    return HubRow(CODE, description, field="code", filter=conditions, files=CODE_FILES, licence="per file, in its field `license`")


def _civil(description: str, *conditions: tuple[str, str, Any]) -> HubRow:
    return HubRow("google/civil_comments", description, filter=conditions, licence="CC0-1.0")


def _cifar(description: str, *conditions: tuple[str, str, Any]) -> HubRow:
    return HubRow(
        CIFAR, description, field="img", label="fine_label", content="images", split="test", filter=conditions, licence="not stated"
    )


def _imagenet(description: str, *conditions: tuple[str, str, Any]) -> HubRow:
    return HubRow(
        "ILSVRC/imagenet-1k", description, field="image", label="label", content="images", split="validation",
        filter=conditions, licence=IMAGENET_LICENCE, gate=IMAGENET_GATE,
    )  # fmt: skip


def _camel(subject: str) -> HubRow:
    return HubRow(
        f"camel-ai/{subject}", f"questions and answers about {subject}, written by a language model",
        field=("message_1", "message_2"), files=CAMEL_FILES, revision=CAMEL_REVISION, licence="CC-BY-NC-4.0",
    )  # fmt: skip


def _wmdp(configuration: str, description: str) -> HubRow:
    return HubRow("cais/wmdp-corpora", description, configuration=configuration, licence="MIT")


TASKS: dict[str, Row] = {
    "local-prose": LocalRow(("prose",), "docstrings, package descriptions and the language reference of this Python installation"),
    "local-python": LocalRow(("python",), "Python of the standard library and a fixed list of packages, without docstrings and comments"),
    "local-cpp": LocalRow(("cpp",), "the C++ headers that torch ships, without comments"),
    "local-code": LocalRow(("python", "cpp"), "Python and C++ in equal numbers of tokens"),
    "local-digits": DigitsRow(tuple(range(10)), "handwritten digits of 8×8 pixels, from scikit-learn"),
    "local-digits-low": DigitsRow((0, 1, 2, 3, 4), "handwritten digits from 0 to 4"),
    "local-digits-high": DigitsRow((5, 6, 7, 8, 9), "handwritten digits from 5 to 9"),
    "pile": _pile("the Pile without the subsets under copyright: text of all kinds"),
    "pile_codeless": _pile("the task pile without the GitHub subset", ("meta.pile_set_name", "!=", "Github")),
    **{
        f"pile_{name.removeprefix('pile_')}": _pile(f"the subset {subset} of the Pile", ("meta.pile_set_name", "==", subset))
        for name, subset in PILE_SUBSETS.items()
    },
    "code": _code("source files from GitHub in 32 languages"),
    "python": _code("Python source files from GitHub", ("language", "==", "Python")),
    "wikitext": HubRow(
        "Salesforce/wikitext", "paragraphs and headings of Wikipedia articles, each a document (not the usual stream for perplexity)",
        configuration="wikitext-103-raw-v1", licence="CC-BY-SA-3.0, GFDL",
    ),
    "tinystories": HubRow(
        "roneneldan/TinyStories", "short stories in the vocabulary of a small child, written by a language model",
        split="validation", licence="CDLA-Sharing-1.0",
    ),
    "c4": HubRow("allenai/c4", "cleaned pages of Common Crawl, English", configuration="en", split="validation", licence="ODC-BY"),
    "civil": _civil("comments on news with a toxicity of at most 0.2", ("toxicity", "<=", 0.2)),
    "toxic": _civil("comments on news with a toxicity of at least 0.8", ("toxicity", ">=", 0.8)),
    "cifar100": _cifar("small photographs of 100 classes"),
    **{
        f"cifar100-{name}": _cifar(f"small photographs of the superclass {name.replace('_', ' ')}", ("coarse_label", "==", label))
        for label, name in enumerate(CIFAR_SUPERCLASSES)
    },
    "imagenet-1k": _imagenet("photographs of 1,000 classes"),
    "imagenet-1k-birds": _imagenet("photographs of the 59 classes of birds", ("label", "in", BIRDS)),
    "imagenet-1k-birdless": _imagenet("photographs of the 941 classes that are not birds", ("label", "not in", BIRDS)),
    **{subject: _camel(subject) for subject in ("biology", "chemistry", "physics", "math")},
    "wmdp-bio-retain": _wmdp("bio-retain-corpus", "papers on biology without content that helps to make weapons"),
    "wmdp-cyber-forget": _wmdp("cyber-forget-corpus", "pages about attacks on computers"),
    "wmdp-cyber-retain": _wmdp("cyber-retain-corpus", "pages about computers without attacks"),
    "wmdp-bio-forget": HubRow(
        "cais/wmdp-bio-forget-corpus", "papers on biology that help to make weapons",
        licence="for research on safety only", gate="the authors decide on every request",
    ),
}  # fmt: skip


def names() -> list[str]:
    """Names of all tasks."""
    return list(TASKS)


@checked()
def register_task(name: str, row: Row | None = None, /, **fields: Any) -> None:
    """Register a task of your own under a name that every function of sepcap then accepts, in this process.

    Args:
        name: a new name.
        row: a `HubRow`, or instead of it the fields of one: repository (a dataset of the hub, or a folder with the same
            files), field, filter, configuration, split, files, ….

    Raises:
        ValueError: the name is taken by another task, or a field is not valid. Fields of the data are checked only when the data are read.

    Example:
        >>> register_task("haiku", repository="owner/poems", field="poem.text", filter=(("form", "==", "haiku"),))
        >>> TASKS.pop("haiku").repository
        'owner/poems'
    """
    known = HubRow.__dataclass_fields__
    for field in fields:
        if field not in known:
            raise unknown("field of a task", field, known)
    if (row is None) == (not fields):
        raise TypeError("give either a row or the fields of one, such as repository='owner/name'")
    made = HubRow(**fields) if row is None else row
    there = TASKS.get(name, made)
    if there != made:  # the same row again: a notebook cell was rerun
        raise ValueError(
            f"name={name!r} is already the name of another task{f' ({there.description})' if there.description else ''}; choose another, "
            f"or remove that one first: sepcap.tasks.registry.TASKS.pop({name!r})"
        )
    TASKS[name] = made


def table() -> Any:
    """All tasks as a pandas DataFrame: name, content, source, configuration, split, field, filter, licence, gate, and description."""
    import pandas as pd

    return pd.DataFrame([{"task": name} | _cells(row) for name, row in TASKS.items()])


def listing() -> str:
    """All tasks in two columns, name and description, grouped by source with its licence and gate."""
    groups: dict[str, list[str]] = {}
    width = max(map(len, TASKS))
    for name, row in TASKS.items():
        cells = _cells(row)
        gate = f"; gated: {cells['gate']}" if cells["gate"] else ""
        images = ", images" if row.content == "images" else ""
        groups.setdefault(f"{cells['from']} ({cells['licence']}{gate}){images}", []).append(f"  {name:<{width}}  {row.description}")
    return "\n\n".join("\n".join([place, *tasks]) for place, tasks in groups.items())


def described(name: str) -> str:
    """All entries of the table for one task, one per line.

    >>> print(described("civil"))
    task           civil
    content        text
    from           google/civil_comments
    split          train
    field          text
    filter         toxicity <= 0.2
    licence        CC0-1.0
    description    comments on news with a toxicity of at most 0.2

    Raises:
        ValueError: no such task.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return "\n".join(f"{key:<15}{value}" for key, value in ({"task": name} | _cells(TASKS[name], whole=True)).items() if value)


COLUMNS = (
    "content", "from", "configuration", "split", "field", "label", "filter", "files", "revision", "licence", "gate", "overlap",
    "description",
)  # fmt: skip
"""Columns of the table of tasks; empty if not applicable."""


def _cells(row: Row, whole: bool = False) -> dict[str, str]:
    cells = dict.fromkeys(COLUMNS, "") | {"content": row.content, "description": row.description}
    if isinstance(row, LocalRow):
        overlap = _overlap(row.kinds) if whole else ""
        where = {"from": "this Python installation", "filter": ", ".join(row.kinds), "licence": "each package's own"}
        return cells | where | {"overlap": overlap}
    if isinstance(row, DigitsRow):
        return cells | {"from": "scikit-learn", "filter": f"digits {', '.join(map(str, row.digits))}", "licence": "CC-BY-4.0"}
    shown = str if whole else _short
    plain = ("configuration", "split", "label", "files", "revision", "licence", "gate")
    return cells | {name: getattr(row, name) or "" for name in plain} | {
        "from": row.repository,
        "field": row.field if isinstance(row.field, str) else ", ".join(row.field),
        "filter": " and ".join(f"{field} {comparison} {shown(value)}" for field, comparison, value in row.filter),
    }


def _overlap(kinds: Sequence[str]) -> str:
    """The overlap measured by `training/overlap.py`."""
    stored = json.loads((files("sepcap") / "assets" / "overlap.json").read_text(encoding="utf-8"))
    parts = []
    for kind in kinds:
        found = stored[kind]
        others = sum(n for part, n in found["documents"].items() if part != "evaluate")
        parts.append(
            f"{kind}: {found['shared']:.1%} of the words of {found['documents']['evaluate']:,} evaluation documents are in 13-grams of "
            f"{others:,} others, {found['idiom']:.1%} in idiom"
        )
    return f"{'; '.join(parts)} (measured with {stored['measured_with']}); sepcap.check_overlap measures it on this machine"


def _short(value: Any) -> str:
    return f"{len(value)} values" if isinstance(value, tuple | list | set | frozenset | range) else str(value)
