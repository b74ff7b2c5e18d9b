"""Tasks and measures of compiled models, and the files as the compiler writes them (METHODS 20)."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

import sepcap
from sepcap.compiled.load import FOLDER, ranking_metrics
from sepcap.compiled.programs import GIVEN, PAIRS
from sepcap.tasks.samples import sample_task

NAMES = list(PAIRS)


HARD = {"sort-and-reverse", "sort-and-reverse-rotated", "up-and-down", "distinct-and-frequent"}
"""Models on which the AUROC of `abs` at mlp neurons is below 0.95."""


def test_the_list_has_every_model_with_as_many_neurons_as_it_has():
    table = sepcap.compiled_models()
    assert list(table.index) == NAMES
    assert {"rotated", "noisy"} < set(table["variant"])
    counts = table[[f"{label}_neurons" for label in ("forget", "retain", "shared", "unused")]].sum(axis=1)
    assert counts["sort-and-reverse"] == counts["sort-and-reverse-rotated"]
    with pytest.raises(ValueError, match="Did you mean 'sort-and-reverse'"):
        sepcap.load_compiled("sort-reverse")


@pytest.mark.parametrize("role", ["forget", "retain"])
def test_every_answer_of_a_task_is_predicted_and_nothing_else_is_scored(compiled, role):
    task, program = compiled.tasks[role], getattr(compiled.pair, role)
    found = sepcap.evaluate(compiled.model, task, tokens=200)
    assert found.top1 == 1
    assert found.loss < 0.01
    sample = sample_task(compiled.model, task, "evaluate", 200)
    decode = compiled.model.tokenizer.decode
    for row, (batch,) in zip(sample.rows[:-1], ([batch] for batch in list(sample.batches(1))[:-1]), strict=True):
        given, answer = decode(row[1:]).split(f" {GIVEN} ")
        assert decode(batch.answers[batch.asked]) == answer
        assert program.answer(given.split()[program.told :]) == answer.split()


def test_no_text_is_in_both_parts_and_a_seed_gives_the_same_texts(compiled):
    for task in compiled.tasks.values():
        parts = [set(task.sources[0].documents(split)["text"]) for split in ("collect", "evaluate")]
        assert min(map(len, parts)) > 50
        assert not parts[0] & parts[1]
    program = compiled.pair.forget
    assert program.texts(50, 3) == program.texts(50, 3) != program.texts(50, 4)


def test_deleting_the_forget_neurons_from_the_weights_ends_one_task_and_leaves_the_other(compiled, tmp_path):
    model = sepcap.load_model(compiled.folder, device="cpu")
    sepcap.delete(model, compiled.labels["forget"])
    forgotten, kept = (sepcap.evaluate(model, task, tokens=200) for task in compiled.tasks.values())
    assert kept.top1 == 1
    assert forgotten.top1 < 0.5


def test_abs_is_far_from_perfect_on_the_hard_models_and_on_no_others(compiled):
    forget, retain = (sepcap.collect(compiled.model, task, tokens=2_000, sites="mlp") for task in compiled.tasks.values())
    found = compiled.metrics(sepcap.score(forget, retain))["auroc"].item()
    assert (found < 0.95) == (compiled.name in HARD)


def test_measures_of_a_ranking_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    for _ in range(20):
        score, wanted = rng.integers(0, 5, 12).astype(float), rng.random(12) < 0.4
        if not 0 < wanted.sum() < 12:
            continue
        pairs = [(a > b) + (a == b) / 2 for a in score[wanted] for b in score[~wanted]]
        precision = [wanted[score >= level].mean() for level in score[wanted]]
        found = ranking_metrics(score, wanted)
        assert found["auroc"] == pytest.approx(np.mean(pairs))
        assert found["auprc"] == pytest.approx(np.mean(precision))
        # the mean over random orders of the tied ones
        drawn = [wanted[np.lexsort((rng.random(12), -score))[: wanted.sum()]].mean() for _ in range(2000)]
        assert found["recall"] == pytest.approx(np.mean(drawn), abs=0.03)


def test_labels_as_scores_are_a_perfect_ranking_and_unused_neurons_count_only_if_asked_for(compiled):
    wanted = {site: mask.double() for site, mask in compiled.labels["forget"].masks.items()}
    assert (compiled.metrics(wanted)[["auroc", "auprc", "recall"]] == 1).all(axis=None)
    used = compiled.metrics({"mlp": wanted["mlp"]})["neurons"].item()
    every = compiled.metrics({"mlp": wanted["mlp"]}, among="all")["neurons"].item()
    assert every - used == compiled.labels["unused"].count("mlp")
    assert every == wanted["mlp"].numel()
    with pytest.raises(ValueError, match="NaN"):
        compiled.metrics({"mlp": wanted["mlp"] * torch.nan})


def test_the_compiler_writes_the_shipped_files_byte_by_byte(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "training"))
    compiler = importlib.import_module("compile")
    for name in NAMES:
        compiler.compile_model(name, tmp_path)
        files = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        assert files == {path.name: path.read_bytes() for path in (FOLDER / name).iterdir()}
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 3_000_000
