"""What the lm-evaluation-harness says of a hooked and edited model, against the plain one: run where `lm_eval` is installed.

`test_harness.py` makes such an environment and runs this file in it.
"""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from plain import Plain

import sepcap
from sepcap.evaluation.harness import run_lm_eval

CHOICES = ["fox", "lazy dog", "cat"]
QUESTIONS = ["the quick brown", "jumps over the", "def return", "self None", "abc", "the", "dog", "over", "x y z", "brown"]
ROWS = [{"question": q, "choices": CHOICES, "gold": i % 3} for i, q in enumerate(QUESTIONS)]

CHOOSE = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

WRITE = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: []
  max_gen_toks: 4
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder, name, template, rows):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(template.format(name=name, rows=path))
    return folder


def choices_of(plain, tokenizer, zero=None):
    """The likeliest choice for every question, by log-probabilities of the plain Hugging Face model."""
    chosen = []
    for question in QUESTIONS:
        context = tokenizer(question)["input_ids"]
        scores = []
        for choice in CHOICES:
            ids = tokenizer(f"{question} {choice}")["input_ids"]
            assert ids[: len(context)] == context
            logprobs = plain.run(torch.tensor([ids]), zero=zero)[0].log_softmax(-1)
            scores.append(sum(float(logprobs[i - 1, ids[i]]) for i in range(len(context), len(ids))))
        chosen.append(int(np.argmax(scores)))
    return chosen


def accuracy(chosen):
    return sum(c == row["gold"] for c, row in zip(chosen, ROWS, strict=True)) / len(ROWS)


def some_neurons(model):
    neurons = sepcap.NeuronSet.empty(model, "mlp")
    mask = neurons.masks["mlp"]
    mask[:] = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    return neurons


def test_hooks_and_edits_count_and_nothing_global_is_touched(tmp_path, tiny, family, tiny_folders):
    folder = write_task(tmp_path / "tasks", "planted-choice", CHOOSE, ROWS)
    plain, neurons = Plain(family, tiny_folders[family]), some_neurons(tiny)
    whole, ablated = choices_of(plain, tiny.tokenizer), choices_of(plain, tiny.tokenizer, neurons.masks)
    # the model's own choices are the right answers: only a model with the same choices has an accuracy of 1
    rows = [{**row, "gold": chosen} for row, chosen in zip(ROWS, whole, strict=True)]
    write_task(folder, "own-choice", CHOOSE, rows)
    write_task(folder, "ablated-choice", CHOOSE, [{**row, "gold": chosen} for row, chosen in zip(ROWS, ablated, strict=True)])
    tiny.tokenizer.pad_token = None  # the harness gives its tokenizer one
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    names = ["planted-choice", "own-choice", "ablated-choice"]

    def accuracies():
        table = run_lm_eval(tiny, names, include_path=folder, batch_size=4)
        assert table["metric"].tolist() == ["acc"] * 3
        assert table["n"].tolist() == [10] * 3
        return dict(zip(table["task"], table["value"], strict=True))

    agree = sum(a == b for a, b in zip(whole, ablated, strict=True)) / 10
    expected = {
        True: {"planted-choice": accuracy(whole), "own-choice": 1.0, "ablated-choice": agree},
        False: {"planted-choice": accuracy(ablated), "own-choice": agree, "ablated-choice": 1.0},
    }
    assert accuracies() == pytest.approx(expected[True])
    with sepcap.ablate(tiny, neurons):
        assert accuracies() == pytest.approx(expected[False])
    assert accuracies() == pytest.approx(expected[True])
    sepcap.delete(tiny, neurons)
    assert accuracies() == pytest.approx(expected[False])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert tiny.tokenizer.pad_token is None


def test_generating_tasks_see_the_hooks_and_limit_limits(tmp_path, trained, trained_folder):
    plain, neurons = Plain("opt", trained_folder), some_neurons(trained)
    questions = ["abcd efg", "12 345", "hg", "0", "bca 1", "7 77", "a", "gf edc"]

    def written(zero):
        answers = []
        for question in questions:
            ids = trained.tokenizer(question)["input_ids"]
            start = len(ids)
            for _ in range(4):
                ids.append(int(plain.run(torch.tensor([ids]), zero=zero)[0, -1].argmax()))
            answers.append(trained.tokenizer.decode(ids[start:], skip_special_tokens=True))
        return answers

    whole, ablated = written(None), written(neurons.masks)
    same = sum(a == b for a, b in zip(whole, ablated, strict=True)) / len(questions)
    assert same < 1
    rows = [{"question": q, "answer": a} for q, a in zip(questions, ablated, strict=True)]
    folder = write_task(tmp_path / "tasks", "written", WRITE, rows)
    assert run_lm_eval(trained, "written", include_path=folder)["value"].tolist() == [same]
    with sepcap.ablate(trained, neurons):
        table = run_lm_eval(trained, "written", include_path=folder, limit=3)
    assert table[["task", "metric", "value", "n"]].values.tolist() == [["written", "exact_match", 1.0, 3]]


def test_the_same_as_the_harness_alone_on_the_saved_pruned_model(tmp_path, tiny_opt):
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = write_task(tmp_path / "tasks", "planted-choice", CHOOSE, ROWS)
    sepcap.delete(tiny_opt, some_neurons(tiny_opt))
    sepcap.save_pretrained(tiny_opt, tmp_path / "pruned")
    arguments = {"pretrained": str(tmp_path / "pruned"), "dtype": "float32"}
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    alone = lm_eval.simple_evaluate("hf", arguments, ["planted-choice"], device="cpu", task_manager=manager)["results"]["planted-choice"]
    table = run_lm_eval(tiny_opt, "planted-choice", include_path=folder)
    assert table["value"].tolist() == pytest.approx([alone["acc,none"]])
    assert table["stderr"].tolist() == pytest.approx([alone["acc_stderr,none"]])
    assert isinstance(table, pd.DataFrame)
