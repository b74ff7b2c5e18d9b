"""A run is a folder: what it records, what it refuses, and what a broken one says."""

import json
import shutil

import numpy as np
import pytest
import torch
from run_folders import STEPS, bits, config_of

import sepcap
from sepcap.errors import CorruptFile
from sepcap.statistics.intervals import cluster_sums
from sepcap.storage import write_json
from sepcap.studies.base import provenance
from sepcap.studies.pruning import plan
from sepcap.studies.pruning import prune as pruning
from sepcap.studies.pruning.run import Run


@pytest.fixture
def prepared(tiny_opt, letters, digits):
    return pruning.plan(tiny_opt, config_of(letters, digits))


def test_finished_run_is_shown_and_not_computed(prepared, tmp_path, monkeypatch):
    first = pruning.execute(prepared, tmp_path / "run")
    stamps = {p: p.stat().st_mtime_ns for p in first.folder.rglob("*")}
    monkeypatch.setattr(type(prepared.model), "forward", lambda *a, **k: pytest.fail("the model was run"))
    again = pruning.execute(prepared, tmp_path / "run")
    assert again.finished
    assert again.trajectory.equals(first.trajectory)
    assert {p: p.stat().st_mtime_ns for p in first.folder.rglob("*")} == stamps


def test_other_configuration_is_refused_with_the_fields_named(tiny_opt, prepared, letters, digits, tmp_path):
    run = pruning.execute(prepared, tmp_path / "run")
    before, stamps = bits(run.folder), {p: p.stat().st_mtime_ns for p in run.folder.rglob("*")}
    with pytest.raises(FileExistsError) as error:
        sepcap.prune(tiny_opt, config_of(letters, digits, steps=3, importance="rms"), out=run.folder)
    assert "steps: 2 stored, 3 requested" in str(error.value)
    assert "importance: 'abs' stored, 'rms' requested" in str(error.value)
    assert "seed" not in str(error.value)
    other = [text[::-1] for text in letters]
    with pytest.raises(FileExistsError, match="samples") as error:
        sepcap.prune(tiny_opt, config_of(other, digits), out=run.folder)
    assert "forget: " in str(error.value)
    assert len(str(error.value)) < 1000  # fields are named, lists of documents are not printed
    assert bits(run.folder) == before
    assert {p: p.stat().st_mtime_ns for p in run.folder.rglob("*")} == stamps


def test_other_weights_are_another_run(tiny_opt, prepared, letters, digits, tmp_path):
    run = pruning.execute(prepared, tmp_path / "run")
    one = run.neurons(1).masks["mlp"].flatten().nonzero()[0]
    mask = torch.zeros(run.neurons(1).masks["mlp"].numel(), dtype=torch.bool)
    mask[one] = True
    sepcap.delete(tiny_opt, sepcap.NeuronSet({"mlp": mask.view_as(run.neurons(1).masks["mlp"])}))
    with pytest.raises(FileExistsError, match="model_fingerprint"):
        sepcap.prune(tiny_opt, config_of(letters, digits), out=run.folder)


def test_order_of_the_texts_and_versions_do_not_make_another_run(tiny_opt, prepared, letters, digits, tmp_path, monkeypatch):
    run = pruning.execute(prepared, tmp_path / "run")
    assert sepcap.prune(tiny_opt, config_of(letters[::-1], digits), out=run.folder).finished
    now = provenance.made_with
    monkeypatch.setattr(plan, "made_with", lambda model: now(model) | {"versions": now(model)["versions"] | {"torch": "9.9"}})
    assert sepcap.prune(tiny_opt, config_of(letters, digits), out=run.folder).finished
    shutil.rmtree(run.step_folder(2))
    with pytest.warns(UserWarning, match=r"torch .* then, 9.9 now"):
        assert sepcap.prune(tiny_opt, config_of(letters, digits), out=run.folder).finished


def test_folder_that_is_no_run_is_refused(prepared, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty and holds no run"):
        pruning.execute(prepared, out)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    with pytest.raises(FileExistsError, match="is a file"):
        pruning.execute(prepared, out / "thesis.txt")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        Run.load(out)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b'{"format": "sepcap-1"}', b"\xff\xfe"], ids=repr)
def test_corrupt_config(prepared, tmp_path, content):
    run = pruning.execute(prepared, tmp_path / "run")
    (run.folder / "config.json").write_bytes(content)
    with pytest.raises(CorruptFile, match=r"config\.json"):
        Run.load(run.folder)
    with pytest.raises(CorruptFile, match=r"config\.json"):
        pruning.execute(prepared, run.folder)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("steps/0001/record.json", lambda run: run.record(1)),
        ("steps/0001/record.json", lambda run: run.pruned_per_layer),
        ("steps/0001/neurons.safetensors", lambda run: run.neurons(1)),
        ("steps/0001/rows.safetensors", lambda run: run.rows("forget")),
        ("statistics/forget.safetensors", lambda run: run.statistics("forget")),
        ("statistics/retain.safetensors", lambda run: run.scores()),
    ],
)
def test_truncated_files_are_named(prepared, tmp_path, name, use):
    run = pruning.execute(prepared, tmp_path / "run")
    path = run.folder / name
    whole = path.read_bytes()
    for size in (0, 3, 12, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptFile, match=path.name.replace(".", r"\.")):
            use(Run.load(run.folder))
    path.write_bytes(whole)
    use(Run.load(run.folder))


def test_files_with_something_missing_are_named(prepared, tmp_path):
    run = pruning.execute(prepared, tmp_path / "run")
    record = run.step_folder(1) / "record.json"
    whole = json.loads(record.read_text())
    del whole["sha256"]
    for field in ("tasks", "files", "run"):
        write_json(record, {name: value for name, value in whole.items() if name != field})
        with pytest.raises(CorruptFile, match=rf"record\.json is corrupt: {field} is missing.*Delete .*0001 and the steps after it"):
            run.record(1)
    record.write_text("3")
    with pytest.raises(CorruptFile, match=r"record\.json"):
        run.record(1)


def test_reading_a_run(prepared, tmp_path):
    run = pruning.execute(prepared, tmp_path / "run")
    table = run.trajectory
    assert list(table["step"]) == [0, 0, 1, 1, 2, 2]
    assert list(table["role"]) == ["forget", "retain"] * 3
    metrics = [m + e for m in ("loss", "top1", "top10", "skip50_top1", "skip50_top10") for e in ("", "_se")]
    sites = [f"{what}_{site}" for what in ("pruned", "threshold") for site in ("mlp", "attn_pre_out")]
    assert {"task", "n", "perplexity", "seconds", "tokens", *metrics, *sites} <= set(table.columns)
    assert table["threshold_mlp"].isna().tolist() == [True, True, False, False, False, False]
    for step in range(STEPS + 1):
        neurons = run.neurons(step)
        for site in ("mlp", "attn_pre_out"):
            assert set(table.loc[table["step"] == step, f"pruned_{site}"]) == {neurons.count(site)}
            per_layer = run.pruned_per_layer.query("step == @step and site == @site")["pruned"]
            assert per_layer.tolist() == neurons.per_layer(site)
    assert run.neurons() == run.neurons(STEPS)
    for step in (-1, STEPS + 1):
        with pytest.raises(IndexError, match=f"step={step}: this run has steps 0 to {STEPS}"):
            run.neurons(step)
    with pytest.raises(ValueError, match=r"role='forgot' is not known. Did you mean 'forget'"):
        run.rows("forgot")
    for role in ("forget", "retain"):
        np.testing.assert_array_equal(run.per_cluster(role), cluster_sums(run.rows(role), run.clusters(role)))
    with pytest.raises(ValueError, match="figure='nothing' is not known"):
        run.figure("nothing")
    assert "finished" in repr(run)
    assert "top1" in run._repr_html_()


def test_config_records_how_the_run_was_made(prepared, letters, tmp_path):
    config = pruning.execute(prepared, tmp_path / "run").config
    assert set(config["versions"]) >= {"sepcap", "torch", "transformers", "transformer-lens"}
    assert config["seed"] == 0
    assert config["context"] == 32  # resolved: the configuration said None
    assert config["task_fingerprints"]["forget"] == sepcap.load_task(letters).fingerprint
    used = {split: set(config["documents"][split]["forget"][0]) for split in ("collect", "evaluate")}
    assert all(used.values())
    assert not used["collect"] & used["evaluate"]
    assert config["tokens_found"]["evaluate"] == {"forget": 150, "retain": 150}


@pytest.mark.thorough
def test_baseline_serves_both_directions_and_no_other_tasks(tiny_opt, letters, digits, tmp_path):
    many = {"eval_tokens": 1000}  # an untrained model seldom hits
    run = sepcap.prune(tiny_opt, config_of(letters, digits, **many), out=tmp_path / "run")
    reverse = sepcap.prune(tiny_opt, config_of(digits, letters, **many), out=tmp_path / "reverse")
    baseline = sepcap.prune(tiny_opt, config_of(letters, digits, importance="random", **many), out=tmp_path / "random")
    swapped = sepcap.prune(tiny_opt, config_of(digits, letters, importance="random", **many), out=tmp_path / "swapped")
    own = run.separability("top10")
    assert own.above_random is None
    assert run.separability("top10", baseline=baseline).above_random == own.area - baseline.separability("top10").area
    # the same random neurons with the roles exchanged: the area that matters for the reverse run
    assert reverse.separability("top10", baseline=baseline).above_random == reverse.separability("top10", baseline=swapped).above_random
    other = sepcap.prune(tiny_opt, config_of(letters, digits, importance="random", eval_tokens=100), out=tmp_path / "other")
    with pytest.raises(ValueError, match="evaluated on other tokens"):
        run.separability("top10", baseline=other)
    with pytest.raises(ValueError, match="a random run has no scores"):
        baseline.scores()
    assert torch.equal(run.scores().top({"mlp": 0.25}).masks["mlp"], run.neurons(1).masks["mlp"])
