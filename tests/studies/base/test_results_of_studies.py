"""Every study that the package had before there were study results: saved, opened by `load_result`, and shown on a page."""

import shutil

import numpy as np
import pandas as pd
import pytest
from damage import DAMAGES, damaged_copies, numbers_of, outcome
from pages import Page
from planted_runs import maker
from tiny import fresh

from sepcap.evaluation.result import COUNTS
from sepcap.studies.ablations.config import AblationSweepConfig
from sepcap.studies.ablations.heads import AblationComparison, compare_ablations
from sepcap.studies.ablations.random_neurons import AblationSweep, sweep_ablation
from sepcap.studies.base.folder import FINISHED
from sepcap.studies.base.result import Shown
from sepcap.studies.catalog import STUDIES, load_result
from sepcap.studies.check import check_folder
from sepcap.studies.directions.study import DirectionComparison, compare_directions
from sepcap.studies.methods.config import MethodComparisonConfig
from sepcap.studies.methods.study import MethodComparison, compare_methods
from sepcap.studies.pruning.separability import halves
from sepcap.studies.reproduce.config import ReproductionConfig
from sepcap.studies.reproduce.study import Reproduction, reproduce


@pytest.fixture(scope="module")
def studies(trained_folder, letters, digits, tmp_path_factory):
    """One of each, in folders: class -> what the study returned."""
    folder = tmp_path_factory.mktemp("studies")
    model = fresh(trained_folder)
    pair = {"forget": letters, "retain": digits}
    small = {"steps": 2, "tokens": 300, "eval_tokens": 900}
    sweep = AblationSweepConfig(task=letters, steps=2, seeds=(0, 1), kinds=("zero", "mean"), tokens=300, reference_tokens=500)
    ablations = compare_ablations(model, task=letters, layer=1, kinds=("zero", "mean"), tokens=400, reference_tokens=400)
    ablations.save(folder / "ablations")
    methods = MethodComparisonConfig(**pair, **small, methods=("mlp",), seeds=(0,), mlp={"mlp": 0.4}, baseline_seeds=2)
    return {
        AblationSweep: sweep_ablation(model, sweep, out=folder / "sweep"),
        AblationComparison: ablations,
        MethodComparison: compare_methods(model, methods, out=folder / "methods"),
        DirectionComparison: compare_directions(model, **pair, **small, fractions={"mlp": 0.4}, baseline_seeds=2, out=folder / "demo"),
        Reproduction: reproduce(
            trained_folder,
            study="sp-figure1",
            budget={"tokens": 300, "eval_tokens": 900, "steps": 2, "fractions": {"mlp": 0.4}},
            tasks={"code": letters, "pile": digits},
            out=folder / "reproduce",
        ),
    }


KINDS = (AblationSweep, AblationComparison, MethodComparison, DirectionComparison, Reproduction)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.STUDY)
def result(request, studies):
    return studies[request.param]


@pytest.fixture(scope="module")
def summaries(studies):
    """The sentences of each, which need intervals from many draws."""
    return {kind: study.summary() for kind, study in studies.items()}


@pytest.fixture
def summary(result, summaries):
    return summaries[type(result)]


def same_tables(one, other):
    assert one.tables.keys() == other.tables.keys()
    for name, table in one.tables.items():
        pd.testing.assert_frame_equal(table, other.tables[name])


def test_every_result_has_the_same_surface(result, summary, studies):
    run = studies[DirectionComparison].forward
    for each, said in ((result, summary), (run, run.summary())):
        assert each.config
        assert len(each.table)
        assert any(list(each.table) == list(table) for table in each.tables.values())
        assert all(isinstance(sentence, str) for sentence in said)
        assert each.figure() is not None
        assert type(each).__name__ in repr(each)
        assert "<table" in each._repr_html_() or "<li" in each._repr_html_()


def test_it_comes_back_from_its_folder(result, summary):
    back = load_result(result.folder)
    assert type(back) is type(result)
    assert isinstance(back, Shown)
    assert back.folder == result.folder
    same_tables(back, result)
    assert back.summary() == summary
    assert STUDIES[result.STUDY].endswith(f".{type(result).__name__}")


def test_its_page_has_question_summary_figures_and_tables(result, summary, tmp_path):
    page = Page(result.report(tmp_path / "page.html"))
    assert f"<h1>{result.TITLE}</h1>" in page.html
    for sentence in summary:
        assert " ".join(sentence.split()) in page.text
    assert set(page.figures) == {f"figure-{kind}" for kind in result.FIGURES}
    rows = sum(len(table) for table in result.tables.values())
    assert page.tags.count("tr") > rows
    assert "Made with sepcap" in page.text


def test_the_tables_of_saved_results_are_files(studies):
    for kind in (AblationSweep, AblationComparison):
        for name, table in studies[kind].tables.items():
            pd.testing.assert_frame_equal(pd.read_parquet(studies[kind].folder / "tables" / f"{name}.parquet"), table)


def test_a_result_in_memory_is_saved_like_one_that_was_made_in_a_folder(studies, tmp_path):
    made = studies[AblationSweep]
    held = AblationSweep(made.config, made.tables, made.tensors)
    assert held.folder is None
    held.save(tmp_path / "p")
    same_tables(load_result(tmp_path / "p"), made)
    for name in ("tensors.safetensors", "tables/by_kind.parquet", "tables/table.parquet"):
        assert (tmp_path / "p" / name).read_bytes() == (made.folder / name).read_bytes()
    with pytest.raises(FileExistsError, match="another configuration"):
        AblationSweep({**made.config, "steps": 9}, made.tables, made.tensors).save(tmp_path / "p")


@pytest.mark.parametrize(("kind", "run"), [(DirectionComparison, "random-per_layer-reverse-1"), (Reproduction, "random")])
def test_one_that_is_not_finished_says_which_run(studies, tmp_path, kind, run):
    folder = shutil.copytree(studies[kind].folder, tmp_path / "study")
    last = max((folder / run / "steps").iterdir())
    shutil.rmtree(last)
    with pytest.raises(FileNotFoundError, match=rf"is not finished \(1 of . runs missing or not finished: {run}\)"):
        load_result(folder)


MADE_AGAIN = {"run.log", "metrics.jsonl", "trajectory.parquet", "table.csv", "reference.safetensors"}
"""Nothing is read from these when a result is loaded; tables of results that hold sums are made of them again."""


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_changes_a_number_unseen(result, tmp_path, damage):
    right = list(numbers_of(load_result(result.folder)))
    assert check_folder(result.folder).problems == []
    for _, copy, file, named in damaged_copies(result.folder, tmp_path, [damage]):
        found, where = outcome(copy, right, named), file.relative_to(copy)
        made_again = file.name in MADE_AGAIN or file.parent.name == "tables"
        unfinished = damage == "delete" and file.name in (FINISHED, "config.json", "record.json") and "not finished" in found
        allowed = ("same", "error") if made_again else ("error",)  # the file that one was swapped with is read
        assert found in allowed or unfinished, (where, found)


def test_another_study_in_the_folder_is_refused(studies, trained, letters, digits, tmp_path):
    folder = shutil.copytree(studies[DirectionComparison].folder, tmp_path / "study")
    config = MethodComparisonConfig(forget=letters, retain=digits, methods=("mlp",), seeds=(0,), steps=2, tokens=300, eval_tokens=900)
    before = sorted(folder.rglob("*"))
    with pytest.raises(FileExistsError, match="'compare-directions' stored, 'compare-methods' requested"):
        compare_methods(trained, config, out=folder)
    assert sorted(folder.rglob("*")) == before
    with pytest.raises(FileNotFoundError, match="a study 'reproduce' was requested"):
        Reproduction.load(folder)


def test_the_sentences_state_the_numbers_of_the_tables(studies):
    sweep = studies[AblationSweep]
    rows = sweep.by_kind.sort_values("top1_at_50", ascending=False)
    for sentence, row in zip(sweep.summary()[1:], rows.to_dict("records"), strict=False):
        assert sentence.startswith(f"{row['kind']}: with half of the neurons ablated, top-1 was {row['top1_at_50']:.3f}")
    # ranked on one half of the documents, the difference on the other, by hand
    clusters, hits, n = sweep.before.clusters, COUNTS.index("top1"), COUNTS.index("n")
    top1 = []
    for part in halves(int(clusters.max()) + 1, np.random.default_rng(0)):
        rows = sweep.tensors["per_row"][:, 0].sum(0).numpy()[:, np.isin(clusters, part)].sum(1)
        top1.append(dict(zip(("zero", "mean"), rows[:, hits] / rows[:, n], strict=True)))
    first, second = sorted(top1[0], key=lambda kind: -top1[0][kind])
    said = f"{first} ranks before {second} at 50% ablated; on the other half, their difference in top-1 is "
    said += f"{top1[1][first] - top1[1][second]:+.4f}"
    assert said in sweep.summary()[-1]
    ablations = studies[AblationComparison].table
    for kind, of_kind in ablations.groupby("kind"):
        unsure = ((of_kind["delta_loss_low"] <= 0) & (of_kind["delta_loss_high"] >= 0)).sum()
        (sentence,) = [s for s in studies[AblationComparison].summary() if s.startswith(f"{kind}:")]
        assert f"cross-entropy {of_kind['delta_loss'].mean():+.4f} on average over heads" in sentence
        assert f"interval contains 0 for {unsure} of 4 heads" in sentence
    for direction in ("forward", "reverse"):
        methods = studies[MethodComparison]
        found = methods._measured("mlp", direction, half=1)
        (said,) = [s for s in methods.summary() if s.startswith(f"To forget {methods.task(direction)}, mlp is highest of 1")]
        assert f"on the other half it has {found.percent.value:.1f}%" in said
        assert (
            f"{found.gain.value:+.1f} points ({found.gain.low:+.1f} to {found.gain.high:+.1f}) relative to random neurons matched per layer"
            in said
        )
    forward = studies[DirectionComparison].forward
    s = forward.separability("top1", baseline="per_layer")
    assert f"separability of top-1 is {s.percent:.0f}%" in studies[DirectionComparison].summary()[1]
    (low, high), said = s.above_random_interval, studies[DirectionComparison].summary()[2]
    assert f"The area is {s.above_random:+.2f} [{low:+.2f}, {high:+.2f}] above random neurons matched per layer (2 seeds" in said
    assert f"standard deviation over seeds {s.seeds_sd:.2f}" in said
    measured = studies[Reproduction].table.dropna(subset="measured")
    assert len(studies[Reproduction].summary()) == 1 + np.isfinite(measured["measured"]).sum()


def test_a_single_head_has_its_interval_in_the_sentence(trained, letters):
    found = compare_ablations(trained, task=letters, layer=0, head=1, kinds=("zero",), tokens=400, reference_tokens=400)
    row = found.table.iloc[0]
    assert f"({'95% bootstrap interval'} {row['delta_loss_low']:+.4f} to {row['delta_loss_high']:+.4f})" in found.summary()[1]


@pytest.fixture
def never_right(tmp_path):
    """Planted runs of a model that is never right on the first task."""
    make = maker(tmp_path)
    forward = make((0.0, 0.0), (0.5, 0.4), samples={"evaluate": {"forget": "f", "retain": "r"}})
    reverse = make((0.5, 0.4), (0.0, 0.0), tasks=("prose", "code"), samples={"evaluate": {"forget": "r", "retain": "f"}})
    random = make((0.0, 0.0), (0.5, 0.2), importance="random", samples={"evaluate": {"forget": "f", "retain": "r"}})
    return forward, reverse, random


def test_what_a_model_that_is_never_right_has_not_is_said_in_words(never_right, tmp_path):
    forward, reverse, random = never_right
    methods = MethodComparison(tmp_path, {("mlp", "forward", 0): forward, ("mlp", "reverse", 0): reverse})
    demo = DirectionComparison(tmp_path, forward, reverse, {"uniform": {"forward": [random], "reverse": [random]}})
    reproduced = Reproduction(ReproductionConfig("sp-table2", "planted"), tmp_path, {"mlp": forward, "attention": reverse})
    why = "because top1 of the unpruned model is 0 on the forget task: no accuracy to lose."
    assert methods.summary()[1:] == [f"It is not known for any of them, {why}"]
    assert list(methods.table["seeds"]) == [1, 1]
    assert methods.table["separability"].isna().all()
    assert f"To forget code and retain prose: separability is not known, {why}" in demo.summary()
    assert f"Maximum differential drop, mlp (percentage points): not measured, {why}" in reproduced.summary()
    assert reproduced.table["measured"].isna().all()
    for result in (methods, demo, reproduced):
        page = result.report(tmp_path / "page.html").read_text()
        assert "of the unpruned model is 0 on the forget task" in page
        assert ">nan<" not in page


def test_a_sweep_of_a_model_that_is_never_right_has_no_area(studies):
    result = studies[AblationSweep]
    arrays = {name: tensor.numpy().copy() for name, tensor in result.tensors.items()}
    for name in ("before", "per_row"):
        arrays[name][..., COUNTS.index("top1")] = 0
    never = AblationSweep.of(result.config, **arrays)
    why = "the area under top-1 is undefined, because the top-1 accuracy of the unablated model is 0"
    assert all(why in said for said in never.summary()[1:3])
    assert not any("nan" in said for said in never.summary())
