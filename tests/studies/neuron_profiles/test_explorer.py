"""The page of profiles without a browser, and the Python side of the view in a notebook."""

import json
import re
import sys
import types

import numpy as np
import pytest
import torch
import traitlets
from hostile_profiles import MARKUP, hostile_profiles
from tiny import fresh

import sepcap
from sepcap.studies.neuron_profiles import widget
from sepcap.studies.neuron_profiles.explorer import explorer_data
from sepcap.tasks.load import load_task


@pytest.fixture(scope="module")
def profiles(trained_folder, letters, digits):
    return hostile_profiles(fresh(trained_folder), letters, digits)


@pytest.fixture(scope="module")
def page(profiles, tmp_path_factory):
    return profiles.report(tmp_path_factory.mktemp("page") / "page.html").read_text(encoding="utf-8")


def test_the_page_holds_two_scripts_and_names_no_address(page):
    assert re.findall(r"<script[^>]*>", page) == ['<script type="application/json" id="data">', "<script>"]
    assert page.count("</script>") == 2
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page.replace("http://www.w3.org/2000/svg", ""))
    assert "default-src 'none'" in page


def test_the_data_of_the_page_are_those_of_the_result(page, profiles):
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data == json.loads(json.dumps(explorer_data(profiles)))
    assert any(MARKUP in word for word in data["words"])
    for i, unit in enumerate(data["units"]):
        for role, task in zip(("forget", "retain"), unit["tasks"], strict=True):
            rows = profiles.contexts(i)
            rows = rows[(rows["task"] == role) & (rows["group"] == "strongest")].to_dict("records")
            for context, row in zip(task["top"], rows, strict=True):
                ids = [data["words"][w] for w in context["w"]]
                assert len(context["a"]) == len(ids) <= 16
                assert context["a"][context["at"]] == pytest.approx(99 * row["activation"] / unit["scale"], abs=0.51)
                assert context["pos"] == row["position"]
            assert sum(task["histogram"]) == pytest.approx(1, abs=1e-3)


def test_two_hundred_neurons_are_a_page_of_reasonable_size(profiles, trained_folder, letters, digits, tmp_path):
    many = sepcap.examine(
        fresh(trained_folder), [(layer, n) for layer in (0, 1) for n in range(50)], tasks=(letters, digits), tokens=2_000, progress=False
    )
    assert many.report(tmp_path / "page.html").stat().st_size < 2_500_000


def test_a_path_is_needed_without_a_folder(profiles):
    with pytest.raises(ValueError, match="path=None: this result has no folder"):
        profiles.report()


@pytest.fixture
def no_anywidget(monkeypatch):
    monkeypatch.setattr(widget, "find_spec", lambda name: None)


def test_without_anywidget_the_view_is_static(profiles, no_anywidget, trained):
    shown = profiles.explore()._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert "<script" not in shown
    with pytest.warns(UserWarning, match=r"pip install 'sepcap\[widget\]'.*static"):
        assert profiles.explore(trained)._repr_html_() == shown


class Pretended(traitlets.HasTraits):
    """What the view needs of anywidget: traits, and messages."""

    def __init__(self, **traits):
        super().__init__(**traits)
        self.sent, self.heard = [], []

    def on_msg(self, hear):
        self.heard.append(hear)

    def send(self, message):
        self.sent.append(message)

    def click(self, message):
        for hear in self.heard:
            hear(self, message, [])


@pytest.fixture
def view(profiles, trained, letters, digits, monkeypatch):
    if widget.find_spec("anywidget") is None:
        monkeypatch.setitem(sys.modules, "anywidget", types.SimpleNamespace(AnyWidget=Pretended))
    monkeypatch.setattr(widget, "find_spec", lambda name: True)
    view = profiles.explore(trained, tasks=(letters, digits), tokens=600)
    if not isinstance(view, Pretended):
        view.sent = []
        view.send = view.sent.append
        view.click = lambda message: view._handle_custom_msg(message, [])
    return view


def test_a_click_measures_what_the_ablation_costs_on_held_out_texts(view, profiles, trained, letters, digits):
    view.click({"ablate": 2})
    (answer,) = view.sent
    assert json.loads(json.dumps(answer)) == answer
    assert answer["unit"] == 2
    for found, texts, name in zip(answer["tasks"], (letters, digits), profiles.config["tasks"], strict=True):
        task = load_task(texts)
        before = sepcap.evaluate(trained, task, tokens=600)
        with sepcap.ablate(trained, profiles.neurons(2, model=trained)):
            after = sepcap.evaluate(trained, task, tokens=600)
        value, (low, high) = after.difference(before, "loss")
        assert found["task"] == name
        assert found["n"] == before.n
        np.testing.assert_allclose([found["loss"], found["loss_low"], found["loss_high"]], [value, low, high], atol=1e-9)
        assert found["top1"] == pytest.approx(after.top1 - before.top1)


@pytest.mark.parametrize("message", [{}, {"ablate": 99}, {"ablate": "0"}, {"ablate": -1}, "ablate", {"ablate": None}])
def test_other_messages_are_ignored(view, message):
    view.click(message)
    assert view.sent == []


def test_an_error_of_a_click_is_shown(view, monkeypatch):
    monkeypatch.setattr(widget, "evaluate_sample", lambda *_, **__: 1 / 0)
    view.click({"ablate": 0})
    assert view.sent == [{"unit": 0, "error": "ZeroDivisionError: division by zero"}]


def test_the_view_has_the_data_and_the_code_of_the_page(view, profiles):
    assert json.loads(view.data) == json.loads(json.dumps(explorer_data(profiles)))
    assert view.can_ablate
    code = type(view)._esm if isinstance(view, Pretended) else str(view._esm)
    assert "function explore(root, data, ask" in code
    assert "export default" in code


def test_another_model_is_not_ablated(profiles, trained_folder, letters, digits):
    other = fresh(trained_folder)
    with torch.no_grad():
        other.blocks[0].mlp.W_in[0, 0] += 1
    with pytest.raises(ValueError, match=r"other weights .* than the one these profiles are of"):
        widget.Costs(profiles, other, (letters, digits), 100)


def test_an_unknown_pair_of_tasks_is_one_sentence(profiles, trained, monkeypatch):
    monkeypatch.setattr(widget, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match=r"tasks=\('a',\): give the two tasks"):
        profiles.explore(trained, tasks=("a",))
