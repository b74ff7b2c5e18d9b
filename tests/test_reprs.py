"""What objects say of themselves in a notebook: what, how large, how made; text as text; quickly."""

import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from planted_runs import maker

import sepcap
from sepcap.evaluation.result import COUNTS, METRICS, Evaluation
from sepcap.selection.neurons import NeuronSet
from sepcap.selection.score import Scores
from sepcap.statistics.moments import SUMS, NeuronStatistics, Statistics

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Tags, attributes and text of a piece of HTML as a browser reads them."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += f"{data} "


def statistics(task, shape=(2, 5), site="mlp", count=10, **info):
    value = torch.ones(shape, dtype=torch.float64)
    stats = NeuronStatistics(site, count, dict.fromkeys(SUMS, value * count), -value, 2 * value)
    return Statistics({site: stats}, {"task": task, "model": EVIL, "split": "collect", **info})


def evaluation(task):
    return Evaluation(task, np.ones((4, len(COUNTS))), (), {"model": EVIL, "sample": "s"})


@pytest.fixture
def objects(tmp_path):
    scores = sepcap.score(statistics(EVIL), statistics("prose"))
    return {
        "Statistics": statistics(EVIL),
        "Scores": scores,
        "NeuronSet": scores.top({"mlp": 0.5}),
        "Evaluation": evaluation(EVIL),
        "Run": maker(tmp_path)([0.5, 0.2, 0.1], [0.4, 0.4, 0.3], tasks=(EVIL, "prose")),
    }


@pytest.mark.parametrize("name", ["Statistics", "Scores", "NeuronSet", "Evaluation", "Run"])
def test_every_object_shows_itself(objects, name):
    source = objects[name]._repr_html_()
    page = Page(source)
    assert name in page.text
    assert page.tags.count("table") == 1
    # what is named like markup is shown letter by letter
    assert "script" not in page.tags
    assert EVIL in page.text
    # a notebook may be dark or light: the card leaves colours to it
    assert not re.search(r"color|background|bgcolor|#[0-9a-f]{3,6}\b", source.replace(EVIL, ""))
    assert {value for key, value in page.attributes if key == "style"} <= {"text-align: right;"}
    assert len(source) < 6000


def test_statistics_say_how_they_were_made():
    page = Page(statistics("code", context=128, rotation="abc", include_bos=True)._repr_html_()).text
    for said in ("2 × 5", "task: code", "split: collect", "context: 128", "rotation: abc", "BOS: counted"):
        assert said in page
    merged = statistics("code").merge(statistics("prose"))
    assert "merged: code + prose" in Page(merged._repr_html_()).text
    assert "20" in Page(merged._repr_html_()).text


def test_statistics_without_positions_show_themselves_too():
    assert "Statistics" in statistics("none", count=0)._repr_html_()


def test_scores_show_their_distribution():
    values = torch.arange(1, 102).double().view(1, 101)
    page = Page(Scores({"mlp": values}, {"importance": "abs", "forget": "code", "retain": "prose"})._repr_html_()).text
    for said in ("1 × 101", "51", "99", "101", "importance: abs", "forget: code", "retain: prose"):
        assert said in page


def test_a_neuron_set_counts_itself():
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, :2] = mask[2, 5] = True
    page = Page(NeuronSet({"mlp": mask}, {"threshold": {"mlp": 1.23456789}})._repr_html_()).text
    for said in ("3 × 8", "0.125", "2, 0, 1", "threshold: mlp 1.235"):
        assert said in page
    deep = torch.zeros(40, 8, dtype=torch.bool)
    deep[7] = True
    assert "0 to 8 in 40 layers" in Page(NeuronSet({"mlp": deep})._repr_html_()).text


def test_an_evaluation_shows_every_metric_with_its_error():
    e = evaluation("code")
    page = Page(e._repr_html_()).text
    assert all(metric in page for metric in (*METRICS, "perplexity"))
    assert "standard error" in page
    assert "predictions: 4" in page


def test_a_run_shows_its_steps(tmp_path):
    run = maker(tmp_path)([0.5, 0.1], [0.4, 0.4])
    page = Page(run._repr_html_()).text
    for said in ("forget top1", "retain loss", "steps: 1 of 1", "fractions: ", str(run.folder)[-20:]):
        assert said in page
    s = run.separability("top1")
    assert f"{s.percent:.1f}% [" in page


def test_large_objects_show_themselves_quickly():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(32, 16_384, generator=generator, dtype=torch.float64)
    stats = NeuronStatistics("mlp", 10, dict.fromkeys(SUMS, values), values, values)
    scores = Scores({"mlp": values})
    objects = [Statistics({"mlp": stats}, {"task": "t"}), scores, scores.top({"mlp": 0.02})]
    for thing in objects:
        start = time.process_time()
        source = thing._repr_html_()
        assert time.process_time() - start < 2
        assert "32 × 16384" in source
        assert len(source) < 3000
