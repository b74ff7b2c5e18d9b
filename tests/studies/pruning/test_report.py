"""The page about a run: what it says, that it needs nothing else, and that text from outside stays text."""

import base64
import dataclasses
import hashlib
import json
import shlex
import shutil
import subprocess

import pytest
from pages import HOSTILE, Page
from planted_runs import maker
from run_folders import config_of
from tiny import fresh

import sepcap
from sepcap import plots
from sepcap.evaluation import generation
from sepcap.storage import write_json
from sepcap.studies.pruning.report import command

FORGET, RETAIN = (0.8, 0.4, 0.0), (0.5, 0.45, 0.25)
SAMPLES = {"evaluate": {"forget": "f", "retain": "r"}}


@pytest.fixture
def make(tmp_path):
    return maker(tmp_path)


def page_of(run, **options) -> Page:
    return Page(run.report(**options))


def test_the_summary_says_the_numbers_worked_out_by_hand(make):
    run = make(FORGET, RETAIN)
    page = page_of(run)
    assert "After step 2, 60 of 60 MLP neurons (100.0%) were pruned." in page.text
    assert all(sentence in page.text for sentence in run.summary())
    assert "on code from 0.800 to 0.000 (0.0% of it remained) and on prose from 0.500 to 0.250 (50.0% of it remained)" in page.text
    # trapezoids over x = 1, ½, 0 with y = 1, 0.9, 0.5, divided by ½: (0.475 + 0.35) / 0.5 = 1.65
    assert "Separability is 65.0% (" in page.text
    # 50 − 10 in step 1, 100 − 50 in step 2
    assert "(on all of them step 2), on the other half code has lost 100.0% of its accuracy and prose lost 50.0%: " in page.text
    found = run.separability("top1")
    low, high = found.max_drop_interval
    assert f"a differential drop of {found.max_drop:.1f} percentage points [{low:.1f}, {high:.1f}]." in page.text
    # 80 lies 0.6 of the way from 50 to 100: 10 + 0.6 · 40
    assert "Where code had lost 80% of its accuracy, prose had lost 34.0%" in page.text
    assert "not finished" not in page.text


def test_every_accuracy_has_its_area_with_interval_and_every_step_its_row(make):
    run = make(FORGET, RETAIN)
    page = page_of(run)
    for metric in ("top1", "top10", "skip50_top1", "skip50_top10"):
        s = run.separability(metric)
        assert f"{s.area:.3f} [{s.interval[0]:.3f}, {s.interval[1]:.3f}]" in page.cells
        assert f"{s.percent:.1f}% [{s.percent_interval[0]:.1f}, {s.percent_interval[1]:.1f}]" in page.cells
    assert [cell for cell in page.cells if "%)" in cell and "," not in cell] == ["0 (0.0%)", "30 (50.0%)", "60 (100.0%)"]
    assert {"trajectory", "areas", "top1", "loss", "thresholds", "pruned"} <= set(page.figures)


def test_the_page_needs_nothing_from_outside(make):
    page = page_of(make(FORGET, RETAIN))
    fetching = {"src", "href", "data", "action", "srcset", "poster", "background"}
    assert not [found for found in page.attributes if found[1] in fetching]
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    style = page.html[page.html.index("<style>") : page.html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert page.tags.count("script") == 3
    assert page.html.count("* plotly.js v") == 1
    assert len(page.html) < 6_000_000


def test_the_policy_allows_the_scripts_of_the_page_and_no_other(make):
    page = page_of(make(FORGET, RETAIN))
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and name == "content" and "script-src" in value)
    rules = dict(rule.split(None, 1) for rule in policy.split("; "))
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts[1:]]
    assert rules["default-src"] == "'none'"
    assert rules["script-src"].split() == [f"'sha256-{digest}'" for digest in digests]
    assert "http" not in policy


def test_text_from_outside_is_text(make):
    run = make(FORGET, RETAIN, tasks=(HOSTILE, "a <b>bold</b> task"), model=HOSTILE, model_fingerprint="f", note={HOSTILE: [HOSTILE]})
    rows = [{name: f"{name} {HOSTILE}" for name in ("kind", "prompt", "before", "after")}]
    write_json(run.folder / "generations.json", {"step": 2, "model_fingerprint": "f", "rows": rows})
    page = page_of(run)
    assert page.tags.count("script") == 3
    assert not {"img", "b"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    for text in (f"Forget {HOSTILE}, retain a <b>bold</b> task", f"prompt {HOSTILE}", f"after {HOSTILE}", f"note, {HOSTILE}"):
        assert text in page.text
    # in figures the text is escaped a second time, for plotly reads markup
    assert all("<img" not in json.dumps(figure) and "<b>bold" not in json.dumps(figure) for figure in page.figures.values())


def test_names_that_no_encoding_has_are_written_all_the_same(make):
    # a folder whose name is not UTF-8
    assert "Neurons of a?b were removed" in page_of(make(FORGET, RETAIN, model="a\udc80b")).text


def test_an_unfinished_run_says_so(make):
    run = make(FORGET, RETAIN)
    shutil.rmtree(run.step_folder(2))
    page = page_of(run)
    assert "The run is not finished: 1 of 2 pruning steps are done." in page.text
    assert "After step 1, 30 of 60 MLP neurons" in page.text
    assert "The loss of prose where code has lost 80% is unknown: the latter lost 50.0% at most." in page.text
    assert "not reached" in page.cells
    shutil.rmtree(run.step_folder(1))
    page = page_of(run)
    assert "The unpruned model has a top-1 accuracy of 0.800 on code and 0.500 on prose." in page.text
    assert "thresholds" not in page.figures
    assert "there is no threshold to draw" in page.text
    assert "nothing has been pruned yet" in page.text
    shutil.rmtree(run.step_folder(0))
    page = page_of(run)
    assert "not even the unpruned model was measured" in page.text
    assert page.figures == {}


@pytest.mark.parametrize(
    ("forget", "retain", "options", "said"),
    [
        (FORGET, RETAIN, {"rows": 1}, "its interval is unknown"),
        (RETAIN, FORGET, {}, "The direction is reversed: prose, which was to be retained, dropped faster than code."),
        (RETAIN, FORGET, {}, "At no step had code lost a larger share"),
        ((0.8, 0.4), (0.5, 0.25), {}, "The interval includes 0%"),
        ((0.8, 0.0), (0.5, 0.55), {}, "prose gained 10.0%"),
        ((0.0, 0.0), (0.5, 0.4), {}, "top1 of the unpruned model is 0 on the forget task"),
        (FORGET, RETAIN, {"importance": "random"}, "were removed at random, regardless of code and prose: this run is a baseline"),
        (FORGET, RETAIN, {"importance": "random"}, "it has no thresholds"),
        (FORGET, RETAIN, {"offset": "mean"}, "With offset mean."),
    ],
)
def test_what_is_unusual_is_said(make, forget, retain, options, said):
    assert said in page_of(make(forget, retain, **options)).text


def test_a_random_run_to_compare_with(make):
    run = make(FORGET, RETAIN, samples=SAMPLES)
    random = make((0.8, 0.4, 0.0), (0.5, 0.25, 0.0), importance="random", samples=SAMPLES)
    page = page_of(run, baseline=random)
    assert "The area under the trajectory is 1.65: +0.65 [" in page.text
    assert "above random neurons (1 seed)" in page.text
    assert any(cell.startswith("+0.650 [") for cell in page.cells)
    assert {trace.get("name", "") for trace in page.figures["areas"]["data"]} >= {"abs", "random"}
    other = make(FORGET, RETAIN, importance="random", samples={"evaluate": {"forget": "f", "retain": "other"}})
    with pytest.raises(ValueError, match="evaluated on other tokens"):
        run.report(baseline=other)


def test_where_it_is_written(make, tmp_path):
    run = make(FORGET, RETAIN)
    assert run.report() == run.folder / "report.html"
    page = run.report(tmp_path / "new" / "a.html")
    assert page.read_bytes() == (run.folder / "report.html").read_bytes()
    assert not list(tmp_path.rglob("*.part"))
    with pytest.raises(IsADirectoryError, match=r"path=.* is a folder; give the name of the file"):
        run.report(tmp_path)


@pytest.fixture
def pruned(trained_folder, letters, digits, tmp_path):
    """A run of a model that lies in a folder which the test may take away."""
    model = shutil.copytree(trained_folder, tmp_path / "model")
    config = dataclasses.replace(config_of(letters, digits), model=str(model))
    return sepcap.prune(None, config, out=tmp_path / "run"), model


@pytest.mark.thorough
def test_generations_are_made_once_and_kept(pruned):
    run, folder = pruned
    page = page_of(run)
    kept = json.loads((run.folder / "generations.json").read_text())
    step = run.separability("top1").max_drop_step or 2
    model = sepcap.load_model(folder, device="cpu")
    prompts = [row["prompt"] for row in kept["rows"]]
    assert prompts == list(run.config["prompts"].values())
    assert kept["step"] == step
    assert [row["before"] for row in kept["rows"]] == [generation.continuation(model, p) for p in prompts]
    run.apply(model, step)
    assert [row["after"] for row in kept["rows"]] == [generation.continuation(model, p) for p in prompts]
    shutil.rmtree(folder)
    assert page_of(run).html == page.html
    # texts of a step that is not the one to show are better than none, and are called what they are
    del kept["sha256"]
    write_json(run.folder / "generations.json", kept | {"step": 7})
    page = page_of(run)
    assert "pruned by step 7" in page.text
    assert f"texts after step {step} could not be made" in page.text
    (run.folder / "generations.json").write_text("{}")
    with pytest.raises(RuntimeError, match=r"generations.json is damaged.*Delete it"):
        run.report()


@pytest.mark.thorough
def test_where_there_are_no_generations_the_page_says_why(pruned, tiny_folders, trained_folder):
    run, folder = pruned
    with pytest.raises(ValueError, match=r"model has other weights .* than the one this run was made with"):
        run.report(model=tiny_folders["opt"])
    shutil.rmtree(folder)
    assert "is neither a folder that can be found from here nor in the local Hugging Face cache" in page_of(run).text
    shutil.copytree(tiny_folders["opt"], folder)
    assert "has other weights here than those the run began with" in page_of(run).text
    assert not (run.folder / "generations.json").exists()
    assert f"Prompt: {run.config['retain']}" in page_of(run, model=fresh(trained_folder)).text


def test_the_scores_show_what_the_first_step_took(pruned, monkeypatch):
    run, _ = pruned
    draw, shown = plots.score_histograms, {}

    def recorded(scores, site, *, neurons, **options):
        shown[site] = (scores, neurons)
        return draw(scores, site, neurons=neurons, **options)

    monkeypatch.setattr(plots, "score_histograms", recorded)
    assert {"scores-mlp", "scores-attn_pre_out"} <= set(page_of(run).figures)
    for site, (scores, neurons) in shown.items():
        taken = scores[site][neurons.masks[site]]
        # a quarter, and those with the highest scores; the threshold is the lowest of them
        assert taken.numel() == scores[site].numel() // 4
        assert neurons.info["threshold"][site] == pytest.approx(taken.min().item())
        assert taken.min() >= scores[site][~neurons.masks[site]].max()


def test_the_command_is_the_configuration(make):
    import tyro

    from sepcap.cli.options import config_in
    from sepcap.cli.pruning import Prune

    config = sepcap.PruningConfig(
        model="a folder/it's", forget="a $x file.txt", fractions={"mlp": 0.1, "heads": 0.25}, steps=3, eps=1e-5, recollect=False, seed=3
    )
    run = make(FORGET, RETAIN)
    run.config = run.config | dataclasses.asdict(config)
    # as a shell reads it
    words = subprocess.run(["sh", "-c", f"set -- {command(run)}; printf '%s\\0' \"$@\""], capture_output=True, text=True, check=True)
    program, prune, *args = words.stdout.split("\0")[:-1]
    assert (program, prune) == ("sepcap", "prune")
    parsed = tyro.cli(Prune, args=args)
    assert config_in(sepcap.PruningConfig, parsed) == config
    assert parsed.out == run.folder


def test_the_command_names_what_is_not_the_default_of_every_machine(make):
    """Without these options the command would ask for another configuration than the folder holds, and be refused."""
    import tyro

    from sepcap.cli.pruning import Prune

    run = make(FORGET, RETAIN, per_document=None, dtype="torch.bfloat16", device="cpu")
    parsed = tyro.cli(Prune, args=shlex.split(command(run).replace("\\\n", " "))[2:])
    assert (parsed.per_document, parsed.dtype, parsed.device) == (None, "bfloat16", "cpu")


def test_the_configuration_is_all_there(make):
    page = page_of(make(FORGET, RETAIN, versions={"torch": "9.9"}, documents={"collect": {"forget": list(range(100))}}))
    assert "versions, torch 9.9" in page.text
    assert "documents, collect, forget 0, 1, 2, 3, 4, 5, 6, 7, … (100 in all)" in page.text
