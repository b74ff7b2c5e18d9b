"""What the documents of a task share, on texts whose overlap is planted."""

import json
import random
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

import sepcap
from sepcap.tasks.load import load_task
from sepcap.tasks.sources.local import cleaned

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
import overlap


def words(rng, n: int) -> str:
    return " ".join(f"w{rng.randrange(10**9)}" for _ in range(n))


def parts(texts):
    source = load_task(texts).sources[0]
    return {part: list(source.documents(part)["text"]) for part in ("collect", "evaluate")}


def test_texts_with_nothing_in_common_share_nothing(recwarn):
    rng = random.Random(0)
    found = sepcap.check_overlap([words(rng, 50) for _ in range(40)])
    assert found.shared == found.idiom == 0
    assert set(found.copies.values()) == {0}
    assert sum(found.documents.values()) == 40
    assert not recwarn.list


def test_texts_too_short_to_share_thirteen_words_are_said_to_be(recwarn):
    rng = random.Random(3)
    found = sepcap.check_overlap([words(rng, 6) for _ in range(40)])
    assert np.isnan(found.shared)
    assert np.isnan(found.idiom)
    (warning,) = recwarn.list
    assert "no evaluation document has 13 words, so the overlap of its parts is unknown" in str(warning.message)


def test_the_share_of_words_is_the_planted_one():
    """A tenth of the words of every evaluation document stands in a document to collect from."""
    rng = random.Random(1)
    texts = [words(rng, 200) for _ in range(40)]
    by_part = parts(texts)
    quoted = [text.split()[10:30] for text in by_part["collect"]]
    # words of its own keep a text in its part: only what is put between them changes, so the split is asked for again
    changed = [f"{text} {' '.join(quoted[i % len(quoted)])}" for i, text in enumerate(by_part["evaluate"])]
    again = parts([*by_part["collect"], *changed])
    with pytest.warns(UserWarning, match="of the evaluation words are in 13-grams of collection documents"):
        found = sepcap.check_overlap([*by_part["collect"], *changed])
    evaluated, collected = again["evaluate"], again["collect"]
    runs = {part: [{tuple(t.split()[i : i + 13]) for i in range(len(t.split()) - 12)} for t in again[part]] for part in again}
    held = set().union(*runs["collect"])
    inside = total = 0
    for text in evaluated:
        split = text.split()
        marked = [False] * len(split)
        for i in range(len(split) - 12):
            if tuple(split[i : i + 13]) in held:
                marked[i : i + 13] = [True] * 13
        inside, total = inside + sum(marked), total + len(split)
    assert found.documents == {"collect": len(collected), "evaluate": len(evaluated)}
    assert found.shared == pytest.approx(inside / total)
    assert found.shared > 0.05


def test_copies_within_a_part_count_and_are_warned_of():
    rng = random.Random(2)
    texts = [words(rng, 100) for _ in range(30)]
    copied = parts(texts)["evaluate"][0]
    variants, wanted = [], 6
    while len(variants) < wanted:  # the hash of a text decides about its part
        variant = f"{copied} {rng.random()}"
        if variant in parts([*texts, variant])["evaluate"]:
            variants.append(variant)
    with pytest.warns(UserWarning, match="of the documents to evaluate are copies of earlier ones"):
        found = sepcap.check_overlap([*texts, *variants])
    assert found.copies["evaluate"] == wanted
    assert found.table.set_index("part").loc["evaluate", "copies"] == wanted


def test_idiom_stands_apart_and_is_warned_of():
    rng = random.Random(3)
    licence = words(rng, 30)
    said = "30% of the evaluation words are in 13-grams that 20 or more documents contain"
    with pytest.warns(UserWarning, match=said) as warned:
        found = sepcap.check_overlap([f"{licence} {words(rng, 70)}" for _ in range(60)])
    assert len(warned) == 1
    assert found.shared == 0
    assert found.idiom == pytest.approx(0.3)
    assert set(found.copies.values()) == {0}


def test_a_text_that_most_documents_are_copied_from_is_no_idiom():
    """300 words that 60 documents have, of 312 each: one document of each part, and the words of one stand in the other."""
    rng = random.Random(4)
    body = words(rng, 300)
    with pytest.warns(UserWarning, match="96% of the evaluation words are in 13-grams of collection documents") as warned:
        found = sepcap.check_overlap([f"{body} {words(rng, 12)}" for _ in range(60)])
    assert found.copies == {part: n - 1 for part, n in found.documents.items()}
    assert min(found.documents.values()) >= 20
    assert found.idiom == 0
    assert found.shared == pytest.approx(300 / 312)
    assert len(warned) == 3  # copies in both parts, and what they share


@pytest.mark.parametrize(("shared", "left"), [(300, 1), (30, 60)])
def test_local_documents_with_what_many_have_are_one_or_keep_it(shared, left):
    """60 texts of which each has 100 words of its own: a licence of 30 words stays in all, 300 words make them one document."""
    rng = random.Random(5)
    body = words(rng, shared)
    texts = [f"{body}\n{words(rng, 100)}" for _ in range(60)]
    assert list(cleaned(texts, [])) == list(enumerate(texts))[:left]
    assert list(cleaned(texts[40:], texts[:40])) == ([] if left == 1 else list(enumerate(texts[40:])))


def test_images_are_refused():
    with pytest.raises(ValueError, match=r"local-digits.*images"):
        sepcap.check_overlap("local-digits")


def test_the_local_tasks_share_little_and_have_documents_enough():
    stored = json.loads((files("sepcap") / "assets" / "overlap.json").read_text(encoding="utf-8"))
    kinds = {kind: stored[kind] for kind in overlap.SHARES}
    assert not overlap.out_of_bounds(kinds)
    assert all(of["shared"] <= 0.05 and of["documents"]["evaluate"] >= 100 for of in kinds.values())


@pytest.mark.parametrize(
    ("shared", "evaluate", "says"),
    [(0.05, 100, []), (0.051, 100, ["5.1% of the words"]), (0.06, 99, ["6.0%", "99 evaluation documents"])],
)
def test_a_measurement_out_of_bounds_is_written_and_ends_with_1(monkeypatch, tmp_path, shared, evaluate, says):
    one = {"task": "local-one", "documents": {"collect": 5, "evaluate": evaluate}, "shared": shared}
    monkeypatch.setattr(overlap, "measure", lambda kind: one)
    config = overlap.OverlapConfig(tmp_path / "o.json")
    if says:
        with pytest.raises(SystemExit) as ended:
            overlap.main(config)
        assert all(word in str(ended.value) for word in ["local-one", *says])  # Python prints it and ends with 1
    else:
        overlap.main(config)
    assert json.loads(config.out.read_text())["cpp"] == one
