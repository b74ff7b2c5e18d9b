"""A sweep on a tiny model: the cells are those of the study alone, and whatever stops it, the same call goes on."""

import dataclasses
import json
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from pages import Page
from run_folders import bits
from swept import LOAD, base_of, cell_bits

import sepcap
from sepcap.errors import CorruptFile
from sepcap.statistics.intervals import t_factor
from sepcap.studies.check import check_folder
from sepcap.studies.pruning import prune as pruning
from sepcap.studies.sweep import cell as cells
from sepcap.studies.sweep.folder import Ledger
from sepcap.studies.sweep.measures import numbers_of

GRID = {"importance": ["abs", "rms"], "seed": [0, 1]}


@pytest.fixture(scope="module")
def base(trained_folder, tmp_path_factory, letters, digits):
    return base_of(trained_folder, tmp_path_factory.mktemp("texts"), letters, digits)


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """A finished sweep; no test changes it."""
    return sepcap.sweep(base, GRID, out=tmp_path_factory.mktemp("sweep") / "s", load=LOAD, progress=False)


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made.folder, tmp_path / "copy")


def again(base, grid, out, **more):
    """The call of `made`, and what it announced."""
    heard = []
    found = sepcap.sweep(base, grid, out=out, load=LOAD, progress=heard.append, **more)
    return found, heard


@pytest.mark.thorough
def test_a_cell_has_the_bits_of_the_study_alone(base, made, trained, tmp_path):
    for row in made.table.to_dict("records"):
        alone = dataclasses.replace(base, importance=row["importance"], seed=row["seed"])
        sepcap.prune(trained, alone, out=tmp_path / row["cell"], progress=False)
        assert bits(tmp_path / row["cell"]) == bits(made.folder / "cells" / row["cell"])


def test_a_row_is_what_the_run_says(made):
    assert list(made.table["state"]) == ["finished"] * 4
    for row in made.table.to_dict("records"):
        run = made.result(importance=row["importance"], seed=row["seed"])
        s = run.separability("top1")
        expected = {"separability": 100 * (s.area - 1), "separability_low": 100 * (s.interval[0] - 1), "max_drop": s.max_drop}
        expected |= {"max_drop_high": s.max_drop_interval[1], "forget_left": s.remaining[0], "n_clusters": min(s.n_clusters)}
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, nan_ok=True), name
        assert row["model_tokens"] == run.trajectory.query("role == 'forget'")["tokens"].sum()


def test_statistics_that_cells_share_are_collected_once(base, tmp_path, monkeypatch):
    """Two importances of one seed: two collections of step 0 for both, and two of step 2 for each."""
    collected = []
    original = pruning.collect_sample

    def counted(model, sample, *args, **how):
        collected.append(sample.task)
        return original(model, sample, *args, **how)

    monkeypatch.setattr(pruning, "collect_sample", counted)
    sepcap.sweep(base, {"importance": ["abs", "rms"]}, out=tmp_path / "s", load=LOAD, progress=False)
    assert len(collected) == 2 + 2 * 2


@pytest.mark.thorough
def test_cells_of_other_tokens_share_nothing(base, made, tmp_path):
    """`Plan.once` does not tell numbers of tokens apart; the sweep does."""
    found, _ = again(base, {"eval_tokens": [100, 150], "tokens": [100, 150]}, tmp_path / "s")
    name = found.where(eval_tokens=150, tokens=150)["cell"].iloc[0]
    same = made.where(importance="abs", seed=0)["cell"].iloc[0]
    assert bits(tmp_path / "s" / "cells" / name) == bits(made.folder / "cells" / same)
    other = found.result(eval_tokens=100, tokens=150)
    assert other.config["samples"]["evaluate"] != found.result(eval_tokens=150, tokens=150).config["samples"]["evaluate"]


@pytest.mark.thorough
def test_a_model_is_loaded_once_and_again_if_a_cell_leaves_it_changed(base, tmp_path, monkeypatch):
    loaded = []
    original, execute = cells.load_model, cells.execute
    monkeypatch.setattr(cells, "load_model", lambda *a, **k: loaded.append(original(*a, **k)) or loaded[-1])

    def careless(prepared, *a, **k):
        run = execute(prepared, *a, **k)
        if prepared.config.seed == 1:
            with torch.no_grad():
                next(prepared.model.original_model.parameters()).add_(1)
        return run

    monkeypatch.setattr(cells, "execute", careless)
    found, _ = again(base, {"seed": [0, 1, 2, 3]}, tmp_path / "s")
    assert len(loaded) == 2
    prints = {found.result(seed=seed).config["model_fingerprint"] for seed in range(4)}
    assert len(prints) == 1


def test_a_finished_sweep_is_read(base, made):
    before = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*") if path.is_file()}
    found, heard = again(base, GRID, made.folder)
    assert heard == [f"{made.folder} is finished (4 cells); nothing is recomputed"]
    pd.testing.assert_frame_equal(found.table, made.table)
    assert {path: path.stat().st_mtime_ns for path in made.folder.rglob("*") if path.is_file()} == before


def test_added_cells_are_carried_out_and_the_others_kept(base, made, copy):
    found, heard = again(base, {"importance": ["abs", "rms", "std"], "seed": [0, 1]}, copy)
    assert heard[0].startswith("6 cells of prune, of which 4 are finished; at most ")
    assert " left, at the rate of 4 finished cells; in this process" in heard[0]
    assert heard[1].startswith("importance=std, seed=0: finished after ")
    assert heard[1].endswith(" left, at the rate of 5 finished cells")
    assert list(found.table["state"]) == ["finished"] * 6
    assert {name: b for name, b in cell_bits(copy).items() if name in set(made.table["cell"])} == cell_bits(made.folder)


def test_another_field_in_the_grid_keeps_the_cells_that_are_there(base, made, copy):
    """Cells are known by their configuration, not by their place in a grid."""
    found, heard = again(base, {"importance": ["abs"], "tokens": [150, 140], "seed": [0]}, copy)
    assert heard[0].startswith("2 cells of prune, of which 1 are finished")
    assert len(found.table) == 5
    assert found.axes["tokens"] == [150, 140]


def test_a_changed_base_is_refused_in_one_sentence(base, made, copy):
    before = bits(copy)
    for change, says in (({"steps": 3}, "steps: 2 stored, 3 requested"), ({"fractions": {"mlp": 1}}, "fractions: ")):
        with pytest.raises(FileExistsError, match=rf"holds a sweep of another base \({says}.*\)\. Use another folder; nothing was changed"):
            again(dataclasses.replace(base, **change), GRID, copy)
    with pytest.raises(FileExistsError, match="threads: 1 stored, 2 requested"):
        again(base, GRID, copy, threads=2)
    with pytest.raises(FileExistsError, match="kind: 'PruningConfig' stored, 'OverlapConfig' requested"):
        again(sepcap.OverlapConfig(), {"seeds": [(0,), (1,)]}, copy)
    assert bits(copy) == before


def test_a_folder_of_something_else_is_refused(base, made, tmp_path):
    with pytest.raises(FileExistsError, match="holds a run, and a sweep was requested"):
        again(base, GRID, made.folder / "cells" / made.table["cell"][0])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "n.txt").write_text("n")
    with pytest.raises(FileExistsError, match="is not empty and holds no sweep"):
        again(base, GRID, tmp_path / "notes")


@pytest.mark.thorough
def test_a_failed_cell_is_recorded_and_the_others_go_on(base, tmp_path):
    grid = [{"seed": [0, 1]}, {"retain": [str(tmp_path / "later.jsonl")], "seed": [2]}]
    with pytest.warns(UserWarning, match=r"1 of 3 cells failed, the first \(.*\) with FileNotFoundError"):
        found, heard = again(base, grid, tmp_path / "s")
    assert sorted(found.table["state"]) == ["failed", "finished", "finished"]
    (row,) = found.table[found.table["state"] == "failed"].to_dict("records")
    assert "later.jsonl" in row["error"]
    assert any("failed with FileNotFoundError" in line for line in heard)
    assert any("failed: FileNotFoundError" in line for line in found.summary())
    shutil.copy(base.retain, tmp_path / "later.jsonl")  # and the same call tries it again
    found, _ = again(base, grid, tmp_path / "s")
    assert list(found.table["state"]) == ["finished"] * 3


@pytest.mark.thorough
@pytest.mark.parametrize("stop", [KeyboardInterrupt, pytest.param(SystemExit, marks=pytest.mark.slow)])
def test_interrupted_between_any_two_passes_it_goes_on_to_the_same_bits(base, made, tmp_path, monkeypatch, stop):
    count = 0
    original = pruning.evaluate_sample

    def passes(*args, **how):
        nonlocal count
        count += 1
        if count == 9:
            raise stop
        return original(*args, **how)

    monkeypatch.setattr(pruning, "evaluate_sample", passes)
    torch.set_num_threads(2)
    with pytest.raises(stop):
        again(base, GRID, tmp_path / "s")
    assert torch.get_num_threads() == 2
    states = list(sepcap.load_result(tmp_path / "s").table["state"])
    assert sorted(set(states)) == ["begun", "finished", "planned"]
    again(base, GRID, tmp_path / "s")
    assert cell_bits(tmp_path / "s") == cell_bits(made.folder)


def test_a_cell_that_was_deleted_is_carried_out_again(base, made, copy):
    shutil.rmtree(copy / "cells" / made.table["cell"][0])
    assert list(sepcap.load_result(copy).table["state"]) == ["planned", "finished", "finished", "finished"]
    again(base, GRID, copy)
    assert cell_bits(copy) == cell_bits(made.folder)


def test_a_task_of_any_study_that_changed_under_its_name_is_refused(base, tmp_path):
    texts = tmp_path / "forget.jsonl"
    shutil.copy(base.forget, texts)
    each = sepcap.SingleAblationsConfig(
        model=base.model, forget=str(texts), retain=base.retain, layers=0, sample=2, tokens=60, reference_tokens=60
    )
    found, _ = again(each, {"seed": [0]}, tmp_path / "s")
    assert list(found.table["state"]) == ["finished"]
    texts.write_text(texts.read_text() + json.dumps({"text": "a b a b a b"}) + "\n")
    with pytest.warns(UserWarning, match=r"ValueError: task .*forget.jsonl has changed since other cells of this sweep finished with it"):
        found, _ = again(each, {"seed": [0, 1]}, tmp_path / "s")
    assert list(found.table["state"]) == ["finished", "failed"]


def test_warnings_of_cells_and_of_loading_are_repeated_once(base, tmp_path, monkeypatch):
    def load(name, **how):
        warnings.warn("these weights are old", stacklevel=2)
        return sepcap.load_model(name, **how)

    def numbers(result):
        warnings.warn("few documents", stacklevel=2)
        return numbers_of(result)

    monkeypatch.setattr(cells, "load_model", load)
    monkeypatch.setattr(cells, "numbers_of", numbers)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        swept, _ = again(base, {"seed": [0, 1]}, tmp_path / "s")
    assert list(swept.table["state"]) == ["finished"] * 2
    said = [str(one.message) for one in found]
    assert said.count("these weights are old") == said.count("few documents") == 1


def test_a_model_or_task_that_changed_under_its_name_is_refused(base, made, copy, tmp_path, monkeypatch):
    """Texts are added to a file between two calls; the finished cells keep their means, and no table mixes both."""
    grid, texts = {"seed": [0]}, tmp_path / "forget.jsonl"
    shutil.copy(base.forget, texts)
    own = dataclasses.replace(base, forget=str(texts))
    again(own, grid, tmp_path / "s")
    texts.write_text(texts.read_text() + json.dumps({"text": "a b a b a b"}) + "\n")
    with pytest.warns(UserWarning, match=r"ValueError: task .*forget.jsonl has changed since other cells of this sweep finished with it"):
        found, _ = again(own, {"seed": [0, 1]}, tmp_path / "s")
    assert list(found.table["state"]) == ["finished", "failed"]
    assert not (found.folder / "cells" / found.table["cell"][1]).exists()
    monkeypatch.setattr(cells, "load_model", lambda name, **how: sepcap.load_model(name, **how, random_weights=True))
    with pytest.warns(UserWarning, match=r"ValueError: model .* has changed since"):
        again(base, {"importance": ["abs", "rms", "std"], "seed": [0]}, copy)


def test_cells_of_two_models_have_no_means(made, copy):
    """Two workers that loaded the model before and after it changed."""
    ledger = Ledger(copy)
    name = made.table["cell"][1]
    ended = ledger.ended[name]
    ledger.add(name, ended | {"made_of": dict.fromkeys(ended["made_of"], "0")})
    found = sepcap.load_result(copy)
    for ask in (found.over_seeds, found.best, found.figure):
        with pytest.raises(ValueError, match=r"finished cells are of different versions of task .*, and means would mix them"):
            ask()
    assert "There are no means: finished cells are of different versions of task" in found.summary()[1]
    assert list(found.tables) == ["cells"]


def test_a_line_that_a_killed_process_left_is_replaced_and_a_changed_one_is_named(base, made, copy):
    lines = (copy / "cells.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "cells.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    assert sorted(sepcap.load_result(copy).table["state"]) == ["begun", "finished", "finished", "finished"]
    found, _ = again(base, GRID, copy)
    assert len((copy / "cells.jsonl").read_bytes().splitlines()) == 4
    pd.testing.assert_frame_equal(found.table, made.table, check_exact=True)
    value = json.loads(lines[0])
    value["values"]["separability"] = 99.0
    (copy / "cells.jsonl").write_bytes(json.dumps(value).encode() + b"\n" + b"".join(lines[1:]))
    with pytest.raises(CorruptFile, match=r"cells.jsonl, line 1: it has changed"):
        sepcap.load_result(copy)


def test_swapped_cells_are_found(made, copy):
    one, other = (copy / "cells" / name for name in made.table["cell"][:2])
    one.rename(copy / "x")
    other.rename(one)
    (copy / "x").rename(other)
    with pytest.raises(CorruptFile, match="is not that of the cell that finished there"):
        sepcap.load_result(copy).result(importance="abs", seed=0)
    assert len([line for line in check_folder(copy).problems if "does not match the plan" in line]) == 2


def test_check_finds_nothing_wrong_and_then_the_damage(made, copy):
    assert check_folder(copy).problems == []
    assert len(check_folder(copy).notes) == 4
    (copy / "cells" / made.table["cell"][0] / "steps" / "0001" / "neurons.safetensors").write_bytes(b"x")
    (copy / "extra.txt").write_text("x")
    problems = check_folder(copy).problems
    assert any("neurons.safetensors" in line for line in problems)
    assert any("extra.txt is unexpected" in line for line in problems)


def test_means_over_seeds_say_what_they_cover(made):
    """By hand: mean and t interval of two seeds, and the mean of the bootstrap replicas of both."""
    over = made.over_seeds()
    documents = made.over_seeds("documents")
    assert list(over["covers"]) == ["seeds", "seeds"]
    assert list(documents["covers"]) == ["documents", "documents"]
    for importance in ("abs", "rms"):
        of = [made.result(importance=importance, seed=seed).separability("top1") for seed in (0, 1)]
        values = np.array([100 * (s.area - 1) for s in of])
        row, by_text = (table[table["importance"] == importance].iloc[0] for table in (over, documents))
        half = t_factor(2) * values.std(ddof=1) / np.sqrt(2)
        ends = row[["separability", "separability_low", "separability_high"]].to_numpy(dtype=float)
        np.testing.assert_allclose(ends, values.mean() + half * np.array([0, -1, 1]))
        assert by_text["separability"] == pytest.approx(values.mean())
        replicas = np.mean([100 * (s.replicas.area - 1) for s in of], axis=0)
        assert replicas.min() <= by_text["separability_low"] <= np.quantile(replicas, 0.1)


def test_the_best_is_chosen_on_one_half_and_measured_on_the_other(made):
    from sepcap.studies.methods.measured import separabilities_of

    halves = {
        name: [np.mean([100 * (s.area - 1) for s in separabilities_of(runs, "top1", half)]) for half in (0, 1)]
        for (name,), runs in made.runs().items()
    }
    best = made.best(n=2)
    order = sorted(halves, key=lambda name: -halves[name][0])
    assert list(best["importance"]) == order
    np.testing.assert_allclose(best["on_first_half"], [halves[name][0] for name in order])
    np.testing.assert_allclose(best["separability"], [halves[name][1] for name in order])
    assert list(best["compared"]) == [2, 2]
    assert list(made.best(importance="rms")["importance"]) == ["rms"]


def test_tables_figures_and_page(made, tmp_path):
    assert {"cells", "seeds"} == set(made.tables)
    copied = sepcap.load_result(made.save(tmp_path / "copy"))
    pd.testing.assert_frame_equal(copied.table, made.table)
    pd.testing.assert_frame_equal(copied.over_seeds(), made.over_seeds())
    assert r"\toprule" in made.to_latex()
    assert "abs & 0" in made.to_latex("cells")
    strip = made.figure("strip")
    drawn = sorted(x for trace in strip.data if trace.marker.size == 3.5 for x in trace.x)
    np.testing.assert_allclose(drawn, sorted(made.table["separability"]), rtol=1e-4)
    heat = made.figure("heat")
    np.testing.assert_allclose(np.array(heat.data[0].z, dtype=float), made.table["separability"].to_numpy().reshape(2, 2), rtol=1e-3)
    assert sum(trace.mode == "lines+markers" for trace in made.figure("trajectories").data) == 2
    page = Page(made.report(tmp_path / "page.html"))
    assert set(page.figures) == {"figure-strip", "figure-heat", "figure-trajectories"}
    assert "4 cells of importance (2) × seed (2): 4 finished." in page.text
    assert type(sepcap.load_result(made.folder)) is sepcap.Sweep
    assert "4 cells of importance (2) × seed (2): 4 finished" in repr(made)


def test_wrong_questions_are_one_error(made):
    for ask, says in (
        (lambda: made.result(importance="abs"), "importance=abs: 2 cells; give fields that only one cell has"),
        (lambda: made.result(importance="ABS", seed=0), "importance='ABS' is not known"),
        (lambda: made.result(tokens=3), "field='tokens' is not known"),
        (lambda: made.figure("strip", column="speed"), "column='speed' is not known"),
        (lambda: made.figure("strip", rows="seed", colour="seed"), "colour='seed': it is the field of the rows"),
        (lambda: made.figure("heat", rows="seed", columns="seed"), "a heat map needs two fields"),
        (lambda: made.figure("trajectories", most=9), "most=9: give 1 to 6"),
        (lambda: made.over_seeds("texts"), "covers='texts' is not known"),
        (lambda: made.over_seeds(metric="top10"), "give covers='documents'"),
        (lambda: made.over_seeds("documents", metric="tpo1"), "metric='tpo1' is not known. Did you mean 'top1'"),
        (lambda: made.best(metric="tpo1"), "metric='tpo1' is not known. Did you mean 'top1'"),
        (lambda: made.best(by="speed"), "by='speed' is not known"),
        (lambda: made.to_latex("rows"), "table='rows' is not known"),
    ):
        with pytest.raises(ValueError, match=says):
            ask()


def test_wrong_arguments_are_one_error_and_write_nothing(base, tmp_path):
    for more, says in (
        ({"workers": 2}, "workers=2 with engine='here', which has one"),
        ({"engine": "threads"}, "engine='threads' is not known"),
        ({"threads": 0}, "threads=0: give"),
        ({"engine": "processes", "gpus_per_run": 1}, "gpus_per_run=1: there are 0 GPUs"),
    ):
        with pytest.raises(ValueError, match=says):
            again(base, GRID, tmp_path / "s", **more)
    assert not (tmp_path / "s" / "cells").exists()


def test_a_model_without_accuracy_to_lose_has_a_note_and_no_numbers(base, tiny_folders, tmp_path):
    from sepcap.studies.sweep.measures import numbers_of

    class Nothing(sepcap.Run):
        def separability(self, *args, **how):
            raise ValueError("top1 of the unpruned model is 0")

    found, _ = again(base, {"seed": [0]}, tmp_path / "s")
    row = numbers_of(Nothing(found.result(seed=0).folder))
    assert row["note"] == "top1 of the unpruned model is 0"
    assert "separability" not in row


@pytest.mark.slow
def test_another_study_takes_its_place(base, tmp_path):
    own = sepcap.SingleAblationsConfig(
        model=base.model, forget=base.forget, retain=base.retain, tokens=100, sample=3, batch_size=4, context=16, per_document="row"
    )
    found, heard = again(own, {"seed": [0, 1]}, tmp_path / "s")
    assert heard[0].startswith("2 cells of ablate_each; in this process")
    assert list(found.table["state"]) == ["finished"] * 2
    assert isinstance(found.result(seed=1), sepcap.SingleAblations)
    alone = sepcap.ablate_each(sepcap.load_model(base.model, device="cpu"), own, seed=1, progress=False)
    pd.testing.assert_frame_equal(found.result(seed=1).table, alone.table)
    with pytest.raises(ValueError, match="the cells are of ablate_each, and this needs pruning runs"):
        found.over_seeds()
    with pytest.raises(ValueError, match=r"no finished cell of .* has a separability"):
        found.figure()


