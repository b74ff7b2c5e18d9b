"""Every study is called in the same way: model, configuration or its fields, out, progress."""

import dataclasses
import inspect

import pytest

import sepcap
from sepcap.progress import progress as bar
from sepcap.studies.base.runner import study


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "default"
    tokens: int = 5
    tasks: tuple[str, ...] = ("a",)


@study(Config, loads=False)
def measure(model, config, *, out=None, say, again=False):
    say("cost")
    return model, config, out, again, bar([1], delay=0).disable


def test_fields_are_keywords():
    assert measure("m", tokens=7)[1] == Config("m", tokens=7)
    assert measure("m", Config(tasks=("b",)), tokens=7)[1] == Config("m", tokens=7, tasks=("b",))
    assert measure()[1] == Config()
    assert measure(3)[:2] == (3, Config())
    assert measure("m", out="folder", again=True)[2:4] == ("folder", True)


def test_a_wrong_field_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"argument=.token. is not known\. Did you mean .tokens."):
        measure("m", token=7)
    with pytest.raises(TypeError, match=r"config is a dict|config=\{.*: give a sepcap.Config, or its fields as keywords"):
        measure("m", {"tokens": 7})


def test_progress_is_a_flag_or_a_function(monkeypatch):
    from sepcap import progress as module

    monkeypatch.setattr(module, "watched", lambda: True)
    heard = []
    assert not measure("m", progress=heard.append)[4]
    assert heard == ["cost"]
    assert measure("m", progress=False)[4]
    with pytest.raises(TypeError, match="progress='no': give True or False or a function"):
        measure("m", progress="no")


def test_the_signature_lists_the_fields():
    assert list(inspect.signature(measure).parameters) == ["model", "config", "out", "again", "progress", "tokens", "tasks"]


STUDIES = [
    "measure_modularity", "measure_overlap", "prune_across_tasks", "check_selection",
    "compare_activations", "trace_dimensions", "find_dimensions", "jacobian_spectrum",
    "transfer_paragraphs", "compare_ablations", "sweep_ablation", "ablate_each",
    "prune", "compare_directions", "compare_methods", "compare_importances", "certify", "compare_unlearning",
    "reproduce",
]  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_this_signature(name):
    parameters = list(inspect.signature(getattr(sepcap, name)).parameters)
    assert parameters[:2] == ["model", "config"]
    assert {"out", "progress"} < set(parameters)


def test_a_missing_folder_is_an_error_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr("sepcap.studies.base.runner.load_model", lambda name: pytest.fail("loaded"))
    with pytest.raises(TypeError, match=r"missing a required.* argument: 'out'"):
        sepcap.prune()


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "reproduce"])
def test_without_a_model_the_one_of_the_configuration_is_loaded(name, tmp_path):
    function, missing = getattr(sepcap, name), str(tmp_path / "no-such-model")
    folder = {"out": tmp_path / "out"} if inspect.signature(function).parameters["out"].default is inspect.Parameter.empty else {}
    with pytest.raises((ValueError, OSError), match="no-such-model"):
        function(missing, **folder)
