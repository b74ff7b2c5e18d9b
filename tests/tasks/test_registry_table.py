"""The table of tasks, and tasks that a user adds to it."""

import datasets
import pytest
from datasets import Dataset

import sepcap
from sepcap.tasks import registry
from sepcap.tasks.registry import described, listing, names, register_task, table
from sepcap.tasks.sources.hub import HubSource
from sepcap.tasks.sources.hub_rows import HubRow


@pytest.fixture(autouse=True)
def restored(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    before = dict(registry.TASKS)
    yield
    registry.TASKS.clear()
    registry.TASKS.update(before)


@pytest.fixture
def poems(tmp_path):
    rows = [{"poem": {"text": f"Rose number {i} is red."}, "form": "haiku" if i % 3 else "ode"} for i in range(30)]
    Dataset.from_list(rows).to_parquet(tmp_path / "poems" / "train.parquet")
    return str(tmp_path / "poems")


def test_a_task_of_ones_own(poems):
    register_task("haiku", repository=poems, field="poem.text", filter=(("form", "==", "haiku"),))
    task = sepcap.load_task("haiku")
    assert (task.name, task.content) == ("haiku", "text")
    rows = sorted(i for split in ("collect", "evaluate") for i in task.sources[0].indices(split, 99))
    assert rows == [i for i in range(30) if i % 3]
    register_task("ode", HubRow(poems, field="poem.text", filter=(("form", "==", "ode"),)))
    assert sepcap.load_task("ode").fingerprint != task.fingerprint
    assert {"haiku", "ode"} <= set(names())


def test_a_name_that_is_taken_is_refused(poems):
    for name in ("local-code", "pile", "toxic"):
        with pytest.raises(ValueError, match=f"name='{name}' is already the name of another task"):
            register_task(name, repository=poems)
    register_task("poems", repository=poems, field="poem.text")
    register_task("poems", repository=poems, field="poem.text")  # a notebook cell that is run again
    with pytest.raises(ValueError, match="name='poems'"):
        register_task("poems", repository=poems)


def test_rows_that_cannot_be_are_refused(poems):
    with pytest.raises(ValueError, match=r"field of a task='feild'.*Did you mean 'field'"):
        register_task("x", repository=poems, feild="text")
    with pytest.raises(TypeError, match="either a row or the fields of one"):
        register_task("x")
    with pytest.raises(TypeError, match="either a row or the fields of one"):
        register_task("x", HubRow(poems), field="text")
    with pytest.raises(ValueError, match="the operator one of ==, !=, <=, >=, in, not in"):
        register_task("x", repository=poems, filter=(("form", "=", "ode"),))
    with pytest.raises(ValueError, match="field with the image and one with its label"):
        register_task("x", repository=poems, content="images")
    with pytest.raises(ValueError, match="the pattern must end in one of"):
        register_task("x", repository=poems, files="data/*.arrow")
    assert "x" not in names()


def test_the_table_lists_every_task_with_where_it_comes_from():
    listed = table().set_index("task")
    assert list(listed.index) == names()
    assert listed.loc["toxic", "from"] == "google/civil_comments"
    assert listed.loc["toxic", ["split", "field", "filter"]].tolist() == ["train", "text", "toxicity >= 0.8"]
    assert listed.loc["wikitext", ["configuration", "split"]].tolist() == ["wikitext-103-raw-v1", "train"]
    assert listed.loc["imagenet-1k-birds", ["split", "field", "label", "filter"]].tolist() == [
        "validation", "image", "label", "label in 59 values",
    ]  # fmt: skip
    assert listed.loc["local-code", "filter"] == "python, cpp"
    assert (listed[["licence", "description"]] != "").all(axis=None)
    gated = set(listed.index[listed["gate"] != ""])
    assert gated == {"imagenet-1k", "imagenet-1k-birds", "imagenet-1k-birdless", "wmdp-bio-forget"}
    of_images = {name for name in names() if name.startswith(("cifar", "imagenet", "local-digits"))}
    assert set(listed.index[listed["content"] == "images"]) == of_images


def test_the_list_names_every_task_once_under_its_place_licence_and_gate():
    groups = [group.splitlines() for group in listing().split("\n\n")]
    assert sorted(line.split()[0] for _, *tasks in groups for line in tasks) == sorted(names())
    places = {line.split()[0]: place for place, *tasks in groups for line in tasks}
    assert places["toxic"] == places["civil"] == "google/civil_comments (CC0-1.0)"
    assert places["imagenet-1k-birds"].startswith("ILSVRC/imagenet-1k (ImageNet terms of access")
    assert "gated: the authors decide on every request" in places["wmdp-bio-forget"]


def test_one_task_is_shown_whole(poems):
    register_task("haiku", repository=poems, field=("poem.text", "form"), filter=(("form", "in", ("haiku", "ode")),), gate="ask first")
    lines = dict(line.split(maxsplit=1) for line in described("haiku").splitlines())
    assert lines["from"] == poems
    assert lines["field"] == "poem.text, form"
    assert lines["filter"] == "form in ('haiku', 'ode')"
    assert lines["gate"] == "ask first"
    assert lines["licence"] == "see the page of the dataset"
    assert {"configuration", "label", "files"}.isdisjoint(lines)
    with pytest.raises(ValueError, match=r"task='haikus' is not known. Did you mean 'haiku'"):
        described("haikus")


def test_every_task_has_a_fingerprint_of_its_own_without_a_network():
    sources = {name: HubSource(row) for name, row in registry.TASKS.items() if isinstance(row, HubRow)}
    assert len({source.fingerprint for source in sources.values()}) == len(sources)
