"""Labelled texts: taken from lists, tasks or the running installation, each long enough, none twice."""

import numpy as np
import pandas as pd
import pytest
from conftest import words

import sepcap
from sepcap.tasks import labelled
from sepcap.tasks.labelled import LabelledTexts, last_positions
from sepcap.tasks.load import load_task
from sepcap.tasks.sources import local

LISTS = {"letters": words(0, n=3), "digits": words(0, n=4, alphabet="0123456789")}


def test_lists_are_taken_whole_and_in_order(tiny_opt):
    found = sepcap.load_labelled_texts(tiny_opt, LISTS)
    assert found.categories == ("letters", "digits")
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert found.texts["digits"] == tuple(LISTS["digits"])
    assert found.table["name"].tolist()[3:5] == ["digits 1", "digits 2"]
    assert found.table["text"].tolist() == list(range(7))
    assert repr(found) == "LabelledTexts(letters 3, digits 4)"
    assert "digits 2" in found._repr_html_()
    assert sepcap.load_labelled_texts(tiny_opt, found) is found


def test_the_fingerprint_is_of_categories_and_texts():
    texts = {name: tuple(held) for name, held in LISTS.items()}
    first = LabelledTexts(texts)
    assert LabelledTexts(texts, {name: tuple("x" * len(held)) for name, held in texts.items()}).fingerprint == first.fingerprint
    changed = [
        {"letters": texts["letters"], "numbers": texts["digits"]},
        {"digits": texts["digits"], "letters": texts["letters"]},
        {"letters": texts["letters"], "digits": texts["digits"][:3]},
        {"letters": (*texts["letters"], texts["digits"][0]), "digits": texts["digits"][1:]},
    ]
    assert len({first.fingerprint, *(LabelledTexts(other).fingerprint for other in changed)}) == 5


def test_of_a_task_the_first_that_are_long_enough_are_taken(tiny_opt):
    short, long = words(1, n=30, length=4), words(2, n=30)
    tasks = {"mixed": load_task(short + long), "digits": words(0, n=40, alphabet="0123456789")}
    found = sepcap.load_labelled_texts(tiny_opt, tasks, per_category=3)
    others = sepcap.load_labelled_texts(tiny_opt, tasks, per_category=3, skip=3)
    assert len(found.texts["mixed"]) == len(others.texts["mixed"]) == 3
    assert set(found.texts["mixed"]) <= set(long)
    assert not set(found.texts["mixed"]) & set(others.texts["mixed"])
    assert sepcap.load_labelled_texts(tiny_opt, tasks, per_category=6).texts["mixed"] == found.texts["mixed"] + others.texts["mixed"]
    held_out = list(load_task(short + long).sources[0].documents("evaluate")["text"])
    assert set(found.texts["mixed"]) <= set(held_out)
    # a smaller context makes the short ones long enough
    few = sepcap.load_labelled_texts(tiny_opt, tasks, per_category=30, context=6)
    assert set(few.texts["mixed"]) & set(short)
    with pytest.raises(ValueError, match=r"'mixed' has only 30 texts of 31 tokens or more, and 31 were asked for"):
        sepcap.load_labelled_texts(tiny_opt, tasks, per_category=31)


def test_rows_open_with_bos_and_hold_the_first_tokens(tiny_opt):
    found = sepcap.load_labelled_texts(tiny_opt, LISTS)
    rows = found.rows(tiny_opt, 20)
    assert rows.shape == (7, 20)
    assert (rows[:, 0] == tiny_opt.tokenizer.bos_token_id).all()
    for row, text in zip(rows, [*LISTS["letters"], *LISTS["digits"]], strict=True):
        assert row[1:].tolist() == tiny_opt.tokenizer(text, add_special_tokens=False)["input_ids"][:19]
    np.testing.assert_array_equal(found.rows(tiny_opt, 12), rows[:, :12])


def test_positions_are_every_fourth_up_to_the_end(tiny_opt):
    assert last_positions(tiny_opt) == (3, 7, 11, 15, 19, 23, 27, 31)
    assert last_positions(tiny_opt, 9) == (4, 8)
    tiny_opt.cfg.n_ctx = 2048
    assert last_positions(tiny_opt) == tuple(range(475, 512, 4))
    assert last_positions(tiny_opt, 256) == tuple(range(219, 256, 4))


def test_chapters_of_the_reference_share_no_paragraph_and_held_out_ones_come_first():
    chapters = list(labelled._reference())
    paragraphs = [p for _, text in chapters for p in text.split("\n\n") if p]
    assert len(paragraphs) == len(set(paragraphs)) > 500
    splits = [local.split_of(name) for name, _ in chapters]
    assert splits == sorted(splits, key=["evaluate", "collect", "train"].index)
    assert all(name.startswith(labelled.REFERENCE) for name, _ in chapters)


def test_folders_take_turns_and_the_reference_is_no_prose():
    names = ["torch/a.py", "torch/b.py", f"{labelled.REFERENCE}#if", "stdlib:email/a.py", "torch/c/d.py", "numpy/a.py", "stdlib:email/b.py"]
    turns = [name for name, _ in labelled._spread([(name, "text") for name in names], 1)]
    assert turns == ["torch/a.py", "stdlib:email/a.py", "numpy/a.py", "torch/b.py", "stdlib:email/b.py", "torch/c/d.py"]
    assert [name for name, _ in labelled._spread([(name, "") for name in names[:5]], 2)][1] == "stdlib:email/a.py"


@pytest.mark.slow
def test_the_default_is_four_kinds_of_held_out_text(tiny_opt):
    found = sepcap.load_labelled_texts(tiny_opt)
    assert {name: len(held) for name, held in found.texts.items()} == dict.fromkeys(labelled.OFFLINE, 5)
    assert found.names is not None
    assert {local.split_of(name) for names in found.names.values() for name in names} <= {"evaluate", "collect"}
    every = [name for names in found.names.values() for name in names]
    assert len(set(every)) == len(every)
    assert all(name.startswith(labelled.REFERENCE) for name in found.names["language reference"])
    assert not any(name.startswith(labelled.REFERENCE) for name in found.names["prose"])
    assert all("torch/include" in name for name in found.names["C++"])
    assert any("def " in text for text in found.texts["Python"])
    assert not any("def " in text for text in found.texts["prose"])
    assert sepcap.load_labelled_texts(tiny_opt).fingerprint == found.fingerprint
    assert found.rows(tiny_opt, 32).shape == (20, 32)


@pytest.mark.parametrize(
    ("texts", "options", "error", "says"),
    [
        ({"letters": LISTS["letters"]}, {}, ValueError, "1 categories"),
        ({"letters": LISTS["letters"], "digits": LISTS["digits"][:2]}, {}, ValueError, "'digits' has 2; measuring its similarity"),
        (
            {"letters": LISTS["letters"], "same": [*LISTS["digits"], LISTS["letters"][1]]},
            {},
            ValueError,
            "occurs twice, in 'letters' and in 'same'",
        ),
        ({"letters": LISTS["letters"], "numbers": [1, 2, 3]}, {}, TypeError, r"texts\['numbers'\] is a list of int"),
        ({"letters": LISTS["letters"], "digits": "no-such-task"}, {}, ValueError, "no-such-task"),
        (LISTS, {"per_category": 2}, ValueError, "per_category=2"),
        (LISTS, {"skip": -1}, ValueError, "skip=-1"),
        (LISTS, {"context": 99}, ValueError, "context=99"),
    ],
)
def test_bad_input_is_named(tiny_opt, texts, options, error, says):
    with pytest.raises(error, match=says):
        sepcap.load_labelled_texts(tiny_opt, texts, **options)


def test_texts_that_are_too_short_or_begin_alike_are_named(tiny_opt):
    short = sepcap.load_labelled_texts(tiny_opt, {**LISTS, "short": words(3, n=3, length=2)})
    with pytest.raises(ValueError, match=r"a text of 'short' .* and 31 are needed .* a smaller context="):
        short.rows(tiny_opt, 32)
    begins = "x" * 60
    alike = sepcap.load_labelled_texts(tiny_opt, {**LISTS, "alike": [begins + "a", begins + "b", begins + "c"]})
    with pytest.raises(
        ValueError, match=r"'alike 1' of 'alike' and 'alike 2' of 'alike' begin with the same 31 tokens .* a larger context="
    ):
        alike.rows(tiny_opt, 32)
    across = sepcap.load_labelled_texts(tiny_opt, {**LISTS, "more": [LISTS["digits"][1][:20] + "z" * 40, *words(9, n=2)]})
    with pytest.raises(
        ValueError, match=r"'digits 2' of 'digits' and 'more 1' of 'more' begin with the same 15 tokens .* later positions="
    ):
        across.rows(tiny_opt, 16)
    assert across.rows(tiny_opt, 32).shape == (10, 32)


def test_of_texts_that_begin_alike_only_the_first_is_chosen(tiny_opt, monkeypatch):
    """Files of one author begin with the same lines: within a category, across categories, and beside texts that were given."""
    licence = "z" * 15
    prose, code = words(1, n=9), words(2, n=9)
    held = {
        "prose": [licence + prose[0], licence + prose[1], *prose[2:]],
        "Python": [code[0], licence + code[1], prose[3][:15] + code[2], *code[3:]],
    }
    monkeypatch.setattr(labelled, "_offline", lambda category: iter([(text[:40], text) for text in held[category]]))
    monkeypatch.setattr(labelled, "OFFLINE", ("prose", "Python"))
    assert sepcap.load_labelled_texts(tiny_opt, per_category=3).texts["prose"] == tuple(held["prose"][:3])
    found = sepcap.load_labelled_texts(tiny_opt, per_category=3, context=16)
    assert found.texts == {"prose": (held["prose"][0], *prose[2:4]), "Python": (code[0], *code[3:5])}
    assert found.rows(tiny_opt, 16).shape == (6, 16)
    # the same where the positions, and not the context, say how much is read
    assert sepcap.load_labelled_texts(tiny_opt, per_category=3, differ_within=16).texts == found.texts
    for study, per_category in ((sepcap.compare_activations, 3), (sepcap.trace_dimensions, 6), (sepcap.find_dimensions, 6)):
        study(tiny_opt, positions=(7, 15), per_category=per_category)
    given = sepcap.load_labelled_texts(
        tiny_opt, {"mine": [licence, *words(7, n=2)], "prose": load_task(held["prose"] * 3)}, per_category=3, context=16
    )
    assert not any(text.startswith(licence) for text in given.texts["prose"])
    with pytest.raises(ValueError, match="differ_within=1: give 2 or more"):
        sepcap.load_labelled_texts(tiny_opt, differ_within=1)


def test_something_that_is_no_model_is_named():
    with pytest.raises(TypeError, match="model is a str"):
        sepcap.load_labelled_texts("gpt2", LISTS)


def test_halves_share_no_text_and_have_half_of_every_category():
    texts = LabelledTexts({"a": tuple(f"a{i}" for i in range(6)), "b": tuple(f"b{i}" for i in range(9))})
    first, second = texts.halves(3)
    for category, whole in texts.texts.items():
        one, two = set(first.texts[category]), set(second.texts[category])
        assert one | two == set(whole)
        assert not one & two
        assert (len(one), len(two)) == (len(whole) // 2, len(whole) - len(whole) // 2)
        # a text keeps its name
        table = pd.concat([first.table, second.table]).query("category == @category")
        assert set(table["name"]) == {f"{category} {i + 1}" for i in range(len(whole))}
    assert first.names["a"] == tuple(f"a {int(text[1:]) + 1}" for text in first.texts["a"])
    assert texts.halves(3)[0].fingerprint == first.fingerprint != texts.halves(4)[0].fingerprint
    with pytest.raises(ValueError, match="category 'a' has 5; one half is searched"):
        LabelledTexts({"a": tuple(f"a{i}" for i in range(5)), "b": tuple(f"b{i}" for i in range(9))}).halves()
