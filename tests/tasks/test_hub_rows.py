"""Every row of the table is read once, through the code that reads the hub, from a folder with files of the same schema.

Each row that is planted says which tasks it belongs to; what a task gives is compared with that.
"""

import dataclasses
import gzip
import hashlib
import json

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from encoders import dataset_of, file_of, noise, part_of_image

import sepcap
from sepcap.tasks import registry
from sepcap.tasks.images import ImageSource
from sepcap.tasks.registry import names
from sepcap.tasks.sources.hub_rows import HubRow
from sepcap.tasks.sources.pixels import WITH_TRAINING

SETS = {
    "ArXiv": "pile_arxiv",
    "DM Mathematics": "pile_dm_mathematics",
    "Enron Emails": "pile_enron_emails",
    "EuroParl": "pile_europarl",
    "FreeLaw": "pile_freelaw",
    "Github": "pile_github",
    "Gutenberg (PG-19)": "pile_gutenberg",
    "HackerNews": "pile_hackernews",
    "NIH ExPorter": "pile_nih_exporter",
    "PhilPapers": "pile_philpapers",
    "Pile-CC": "pile_cc",
    "PubMed Abstracts": "pile_pubmed_abstracts",
    "PubMed Central": "pile_pubmed_central",
    "StackExchange": "pile_stackexchange",
    "USPTO Backgrounds": "pile_uspto_backgrounds",
    "Ubuntu IRC": "pile_ubuntu_irc",
    "Wikipedia (en)": "pile_wikipedia",
}
COARSE = {
    0: "aquatic_mammals",
    1: "fish",
    9: "large_man-made_outdoor_things",
    13: "non-insect_invertebrates",
    14: "people",
    19: "vehicles_2",
}
"""A few of the superclasses, by their number in the data; the others are taken from the table."""
EACH = 6
PICTURES = noise(20 * EACH, (8, 8, 3))


def say(subject, i):
    return f"{subject}: sentence {i} about it, and a second one."


def pile():
    for i in range(EACH):
        for name, task in SETS.items():
            row = {"text": say(name, i), "meta": {"pile_set_name": name}}
            yield row, row["text"], {"pile", task} | ({"pile_codeless"} if name != "Github" else set())


def code():
    for i in range(4 * EACH):
        language = ("Python", "C", "Jupyter Notebook", "Java")[i % 4]
        text = f"x = {i}  # {language}\n"
        row = {"code": text, "repo_name": "a/b", "path": "c", "language": language, "license": "mit", "size": len(text)}
        yield row, text, {"code", "python"} if language == "Python" else {"code"}


def wikitext():
    for i in range(3 * EACH):
        text = ("", " = Heading = \n", f" Paragraph {i} . \n")[i % 3]
        yield {"text": text}, text, {"wikitext"} if i % 3 == 2 or i == 1 else set()  # empty, or said before


def civil():
    for i in range(7 * EACH):
        toxicity = (0.0, 0.2, 0.2000001, 0.5, 0.7999999, 0.8, 1.0)[i % 7]
        row = {"text": say("comment", i), "toxicity": toxicity, **dict.fromkeys(OTHER_TOXICITIES, 0.9)}
        yield row, row["text"], {"civil"} if i % 7 < 2 else {"toxic"} if i % 7 > 4 else set()


OTHER_TOXICITIES = ("severe_toxicity", "obscene", "threat", "insult", "identity_attack", "sexual_explicit")


def cifar():
    for i in range(20 * EACH):
        coarse = i % 20
        name = COARSE.get(coarse, registry.CIFAR_SUPERCLASSES[coarse])
        image = file_of(PICTURES[i])
        row = {"img": {"bytes": image, "path": None}, "fine_label": i % 100, "coarse_label": coarse}
        yield row, (image, i % 100), {"cifar100", f"cifar100-{name}"}


def imagenet():
    birds = {7, 24, 80, 100, 127, 146}  # the first and the last of each stretch; their neighbours are none
    for i, label in enumerate([6, 7, 24, 25, 79, 80, 100, 101, 126, 127, 146, 147, 999] * EACH):
        image = file_of(PICTURES[i], "JPEG")
        task = "imagenet-1k-birds" if label in birds else "imagenet-1k-birdless"
        yield {"image": {"bytes": image, "path": None}, "label": label}, (image, label), {"imagenet-1k", task}


def camel(subject):
    for i in range(2 * EACH):
        row = {"role_1": "user", "topic;": "a", "sub_topic": "b", "message_1": f"What is {subject} {i}?", "message_2": f"It is {i}."}
        yield row, f"What is {subject} {i}?\n\nIt is {i}.", {subject}


def plain(task, **others):
    for i in range(2 * EACH):
        yield {"text": say(task, i), **others}, say(task, i), {task}


text = Value("string")
toxicities = dict.fromkeys(("toxicity", *OTHER_TOXICITIES), Value("float32"))  # in which 0.2 is 0.200000003
labels = {"fine_label": ClassLabel(num_classes=100), "coarse_label": ClassLabel(num_classes=20)}
files = [  # repository, where in it, configuration and split as its page declares them, schema where the rows do not tell, rows
    ("monology/pile-uncopyrighted", "test.parquet", ("default", "test"), None, pile),
    ("codeparrot/github-code-clean", "data/train-00000-of-00880.parquet", None, None, code),
    ("Salesforce/wikitext", "wikitext-103-raw-v1/train-0.parquet", ("wikitext-103-raw-v1", "train"), None, wikitext),
    ("roneneldan/TinyStories", "data/validation-0.parquet", ("default", "validation"), None, lambda: plain("tinystories")),
    ("allenai/c4", "en/c4-validation.0.json.gz", ("en", "validation"), None, lambda: plain("c4", timestamp="2019", url="u")),
    ("google/civil_comments", "data/train-0.parquet", ("default", "train"), Features({"text": text, **toxicities}), civil),
    ("uoft-cs/cifar100", "cifar100/test-0.parquet", ("cifar100", "test"), Features({"img": Image(), **labels}), cifar),
    (
        "ILSVRC/imagenet-1k", "data/validation-0.parquet", ("default", "validation"),
        Features({"image": Image(), "label": ClassLabel(num_classes=1000)}), imagenet,
    ),
    *(
        (f"camel-ai/{subject}", "default/train/0000.parquet", None, None, lambda subject=subject: camel(subject))
        for subject in ("biology", "chemistry", "physics", "math")
    ),
    *(
        ("cais/wmdp-corpora", f"{name}-corpus/train-0.parquet", (f"{name}-corpus", "train"), None, lambda name=name: plain(f"wmdp-{name}"))
        for name in ("bio-retain", "cyber-forget", "cyber-retain")
    ),
    (
        "cais/wmdp-bio-forget-corpus", "data/train-0.parquet", ("default", "train"), None,
        lambda: plain("wmdp-bio-forget", title="t", abstract="a", doi="d"),
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder with a copy, a few dozen rows each, of every repository in the table; and the rows, by repository and file."""
    root = tmp_path_factory.mktemp("hub")
    planted, pages = {}, {}
    for repository, path, declared, features, rows in files:
        planted[repository, path] = list(rows())
        target = root / repository / path
        target.parent.mkdir(parents=True, exist_ok=True)
        records = [row for row, _, _ in planted[repository, path]]
        if path.endswith(".gz"):
            target.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in records).encode()))
        else:
            Dataset.from_list(records, features=features).to_parquet(target)
        if declared:
            pages.setdefault(repository, []).append((*declared, path))
    for repository, configurations in pages.items():
        lines = ["---", "configs:"]
        for configuration, split, path in configurations:
            lines += [f"- config_name: {configuration}", "  data_files:", f"  - split: {split}", f"    path: {path}"]
        (root / repository / "README.md").write_text("\n".join([*lines, "---", ""]))
    return root, planted


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def content(part):
    if "text" in part.column_names:
        return list(part["text"])
    images = part.cast_column("image", Image(decode=False))
    return [(image["bytes"], label) for image, label in zip(images["image"], images["label"], strict=True)]


def part_of(document):
    """METHODS 9 by hand."""
    if isinstance(document, tuple):
        return part_of_image(document[0])
    return ("collect", "evaluate")[int(hashlib.sha256(" ".join(document.split()).encode()).hexdigest(), 16) % 2]


@pytest.mark.parametrize("name", [name for name in names() if isinstance(registry.TASKS[name], HubRow)])
def test_every_row_of_the_table_gives_its_documents_and_no_others(hub, monkeypatch, name):
    root, planted = hub
    row = registry.TASKS[name]
    monkeypatch.setitem(registry.TASKS, name, dataclasses.replace(row, repository=str(root / row.repository), revision=None))
    task = sepcap.load_task(name)
    assert task.content == row.content
    mine = next(rows for rows in planted.values() if any(name in tasks for _, _, tasks in rows))
    wanted = {i: document for i, (_, document, tasks) in enumerate(mine) if name in tasks}
    assert len(wanted) >= EACH
    seen = {}
    for split in ("collect", "evaluate"):
        parts = list(task.sources[0].slices(split))
        rows = [i for part in parts for i in part["row"]]
        documents = [document for part in parts for document in content(part)]
        assert rows == sorted(rows)
        assert documents == [wanted[i] for i in rows]
        assert {part_of(document) for document in documents} <= {split}
        assert task.sources[0].indices(split, 3) == rows[:3]
        seen |= dict(zip(rows, documents, strict=True))
    assert seen == wanted


def test_every_hub_task_has_rows_here():
    planted = {task for *_, rows in files for _, _, tasks in rows() for task in tasks}
    assert planted | {"local-prose", "local-python", "local-cpp", "local-code"} <= set(names())
    assert planted == {name for name in names() if isinstance(registry.TASKS[name], HubRow)}


def test_the_birds_of_imagenet_and_the_superclasses_of_cifar():
    assert len(registry.BIRDS) == len(set(registry.BIRDS)) == 59
    assert len(registry.CIFAR_SUPERCLASSES) == 20
    assert {i: registry.CIFAR_SUPERCLASSES[i] for i in COARSE} == COARSE
    assert list(registry.CIFAR_SUPERCLASSES) == sorted(registry.CIFAR_SUPERCLASSES)  # the data numbers them alphabetically


def test_a_text_is_in_the_same_part_of_a_hub_task_and_of_a_list(hub, monkeypatch):
    root, planted = hub
    row = registry.TASKS["civil"]
    monkeypatch.setitem(registry.TASKS, "civil", dataclasses.replace(row, repository=str(root / row.repository)))
    texts = [document for _, document, tasks in planted["google/civil_comments", "data/train-0.parquet"] if "civil" in tasks]
    mine, hubs = (sepcap.load_task(given).sources[0] for given in (texts, "civil"))
    for split in ("collect", "evaluate"):
        assert set(mine.documents(split)["text"]) == set(hubs.documents(split)["text"])


def test_an_image_is_in_the_same_part_of_a_hub_task_and_of_a_dataset(tmp_path, monkeypatch):
    """Also where one has it as a PNG and the other as a BMP, and of a task that has a part for training."""
    arrays = noise(120)
    rows = [{"image": {"bytes": file_of(array, "BMP"), "path": None}, "label": i % 3} for i, array in enumerate(arrays)]
    features = Features({"image": Image(), "label": Value("int64")})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "images" / "train.parquet")
    monkeypatch.setitem(registry.TASKS, "same-images", HubRow(str(tmp_path / "images"), field="image", label="label", content="images"))
    mine = dataset_of(arrays, [i % 3 for i in range(120)])
    hub, own, trained = (
        sepcap.load_task("same-images").sources[0],
        sepcap.load_task(mine).sources[0],
        ImageSource(mine, shares=WITH_TRAINING),
    )
    for split in ("collect", "evaluate"):
        assert sorted(hub.indices(split, 999)) == sorted(own.indices(split, 999))
        assert {part_of_image(file_of(arrays[i])) for i in own.indices(split, 999)} == {split}
        assert trained.indices(split, 999)
        assert set(trained.indices(split, 999)) < set(own.indices(split, 999))
