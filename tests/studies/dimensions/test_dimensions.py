"""Residual dimensions: the values are the plain model's, a planted dimension is found, and the search is not fooled by its own size."""

import contextlib

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import words
from plain import Plain
from scipy import stats

import sepcap
from sepcap.models.forward import logits_of
from sepcap.studies.base.permutations import relabel
from sepcap.studies.catalog import load_result
from sepcap.studies.dimensions.study import search_dims, separation
from sepcap.tasks.labelled import LabelledTexts

ALIKE = words(5, n=18)
WHOLE = LabelledTexts({"one": tuple(ALIKE[:6]), "two": tuple(ALIKE[6:12]), "three": tuple(ALIKE[12:])})
"""Three categories of the same kind of text: nothing but chance tells them apart."""
SEARCHED, TEXTS = WHOLE.halves()
POSITIONS = (5, 9, 20)
LABELS = TEXTS.labels
"""Both halves have three texts of every category, in this order."""


def test_values_are_the_hidden_states_of_the_plain_model(tiny, family, tiny_folders):
    ids = torch.from_numpy(TEXTS.rows(tiny, 21))
    plain, last = Plain(family, tiny_folders[family]), {}

    def keep(module, args, output):
        last["out"] = output[0] if isinstance(output, tuple) else output

    plain.hf.get_submodule(plain.layout.layers)[1].register_forward_hook(keep)
    with torch.no_grad():
        states = plain.hf(ids, output_hidden_states=True).hidden_states
    # the last hidden state has the final norm behind it
    expected = torch.stack([states[0], states[1], last["out"].view(states[1].shape)])
    found = sepcap.trace_dimensions(tiny, texts=TEXTS, dims=(3, 30), positions=POSITIONS).tables["values"]
    assert len(found) == 2 * 3 * 9 * 3
    values = torch.from_numpy(found["value"].to_numpy(copy=True)).view(2, 3, 9, 3)
    torch.testing.assert_close(values, expected[:, :, list(POSITIONS)][..., [3, 30]].permute(3, 0, 1, 2), atol=1e-5, rtol=1e-5)
    row = found[(found["dim"] == 30) & (found["location"] == 2) & (found["text"] == 4) & (found["position"] == 9)]
    assert row["value"].item() == pytest.approx(float(expected[2, 4, 9, 30]), abs=1e-5)
    assert row["category"].item() == "two"


def plant(dim, values):
    """A hook on what the last block gives: one dimension is replaced, by a value per text."""

    def put(out, hook):
        out = out.clone()
        out[..., dim] = values.to(out)[:, None]
        return out

    return [("blocks.1.hook_out", put)]


def test_a_planted_dimension_comes_first_and_it_alone_is_significant(tiny_opt):
    values = torch.from_numpy(LABELS * 10.0) + torch.tensor([-0.1, 0, 0.1] * 3)
    with tiny_opt.hooks(fwd_hooks=plant(7, values)):
        table = sepcap.find_dimensions(tiny_opt, texts=WHOLE, positions=POSITIONS, n=32).table
        shown = sepcap.trace_dimensions(tiny_opt, texts=WHOLE, dims=table.head(2), positions=POSITIONS)
    best = table.iloc[0]
    assert (best["dim"], best["location"], best["p"], best["p_uncorrected"]) == (7, 2, pytest.approx(1 / 280), pytest.approx(1 / 280))
    assert best["eta2"] == pytest.approx(600 / 600.06)  # Σ n·(mean − 10)² = 600 of a total with 9 · 0.02/3 more
    assert (table["p"][1:] > 0.05).all()
    assert sorted(table["dim"]) == list(range(32))
    assert table["eta2_searched"].is_monotonic_decreasing
    assert shown.config["dims"] == table["dim"].tolist()[:2]
    means = shown.tables["means"].query("dim == 7 and location == 2").set_index("category")
    half = stats.t.ppf(0.975, 2) * 0.1 / 3**0.5
    for category, mean in {"one": 0, "two": 10, "three": 20}.items():
        assert means.loc[category, ["low", "mean", "high"]].tolist() == pytest.approx([mean - half, mean, mean + half], abs=1e-5)
    assert "Dimension 7: after layer 1 categories explain η² = 1.000 of the variance between texts, p = 0.0036;" in shown.summary()[1]
    assert "The search for the 2 dimensions used 9 other texts of the same categories" in shown.summary()[-1]


def test_the_searched_half_alone_decides_and_the_other_half_alone_tests(tiny_opt):
    """A dimension that is planted in the searched texts only comes first and is not significant in the others, and the reverse."""
    values = torch.from_numpy(LABELS * 10.0)
    for searched in (True, False):
        halves = iter([True, False])

        def put(out, hook, halves=halves, searched=searched):
            if next(halves) == searched:
                out = out.clone()
                out[..., 7] = values.to(out)[:, None]
            return out

        with tiny_opt.hooks(fwd_hooks=[("blocks.1.hook_out", put)]):
            table = sepcap.find_dimensions(tiny_opt, texts=WHOLE, positions=POSITIONS, n=32, locations=(2,)).table
        row = table.set_index("dim").loc[7]
        assert (table["dim"][0] == 7) == searched
        assert (row["eta2_searched"] > 0.999) == searched
        assert (row["p_uncorrected"] < 0.01) != searched


def test_a_search_in_noise_gives_uniform_p_values():
    """Twelve texts per half without categories, 40 dimensions at 3 locations: the best of one half, tested on the other."""
    labels = np.repeat([0, 1], 6)
    relabelled, p, naive = relabel(labels), [], []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        first, second = (np.cumsum(rng.normal(size=(3, 12, 40)), axis=0) for _ in range(2))
        best = search_dims(first, labels).iloc[0]
        p.append(separation(second[int(best["location"])][None, :, [int(best["dim"])]], relabelled)[1].item())
        naive.append(separation(first[int(best["location"])][None, :, [int(best["dim"])]], relabelled)[1].item())
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        assert abs(np.mean(np.array(p) <= level) - level) < 4 * np.sqrt(level * (1 - level) / 400) + 1 / 462, level
    assert np.mean(np.array(naive) <= 0.05) > 0.95  # on the searched texts themselves


def test_traces_show_the_half_that_was_not_searched(tiny_opt, tmp_path):
    table = sepcap.find_dimensions(tiny_opt, texts=WHOLE, positions=POSITIONS, n=3).table
    table.to_csv(tmp_path / "found.csv", index=False)
    for again in (table, pd.read_csv(tmp_path / "found.csv"), table.iloc[[2, 0]]):
        found = sepcap.trace_dimensions(tiny_opt, texts=WHOLE, dims=again, positions=POSITIONS)
        assert found.config["texts"] == TEXTS.fingerprint
        assert found.config["searched"] == 9
        tests = found.tables["tests"]
        assert tests[["dim", "location"]].to_numpy().tolist() == again[["dim", "location"]].to_numpy().tolist()
        np.testing.assert_allclose(tests["p_uncorrected"], again["p_uncorrected"])
        for row, note in zip(tests.to_dict("records"), found.figure().layout.annotations, strict=True):
            assert note.text == f"Dimension {row['dim']}: p = {row['p']:.2g} (found on other texts)"
    found = sepcap.trace_dimensions(tiny_opt, texts=WHOLE, dims=table, positions=POSITIONS)
    np.testing.assert_allclose(found.tables["tests"]["p"], table["p"])


def test_what_was_chosen_before_is_tested_on_all_texts(tiny_opt):
    table = sepcap.find_dimensions(tiny_opt, texts=WHOLE, positions=POSITIONS, n=2).table
    others = LabelledTexts({name: tuple(words(seed, n=6)) for seed, name in enumerate(("one", "two", "three"), start=20)})
    dims = table["dim"].tolist()
    for texts, given in ((WHOLE, dims), (others, table), (WHOLE, table[["dim"]])):
        warned = pytest.warns(UserWarning, match="which are other texts than these") if given is table else contextlib.nullcontext()
        with warned:
            found = sepcap.trace_dimensions(tiny_opt, texts=texts, dims=given, positions=POSITIONS)
        assert (found.config["texts"], found.config["searched"]) == (texts.fingerprint, None)
        assert found.summary()[-1].endswith("it is valid only if they were not chosen on these texts.")
        separated, tests = found.tables["separation"], found.tables["tests"]
        assert tests["p"].tolist() == [separated.loc[separated["dim"] == dim, "p"].min() for dim in dims]


def test_a_search_with_another_seed_is_no_test_on_the_searched_texts(tiny_opt, tmp_path):
    """With another seed the texts are cut elsewhere, so that some that were searched would be among those of the test."""
    table = sepcap.find_dimensions(tiny_opt, texts=WHOLE, positions=POSITIONS, n=2, seed=3).table
    table.to_csv(tmp_path / "found.csv", index=False)
    both = pd.concat([table, sepcap.find_dimensions(tiny_opt, texts=WHOLE, positions=POSITIONS, n=32).table.tail(1)])
    for given in (table, pd.read_csv(tmp_path / "found.csv"), both):
        with pytest.raises(ValueError, match=r"dims: .* seed 3.*with seed=0 these texts are cut into other.*give the seed="):
            sepcap.trace_dimensions(tiny_opt, texts=WHOLE, dims=given, positions=POSITIONS)
    assert sepcap.trace_dimensions(tiny_opt, texts=WHOLE, dims=table, positions=POSITIONS, seed=3).config["searched"] == 9


def test_without_dimensions_the_best_four_are_shown_and_the_model_is_left_as_it_was(tiny_opt):
    ids = torch.arange(3, 20)[None]
    logits = logits_of(tiny_opt, ids)
    found, table = sepcap.trace_dimensions(tiny_opt, texts=WHOLE), sepcap.find_dimensions(tiny_opt, texts=WHOLE, n=4).table
    assert found.dims == table["dim"].tolist()
    assert found.config["texts"] == TEXTS.fingerprint
    assert found.tables["tests"]["p"].tolist() == table["p"].tolist()
    assert torch.equal(logits_of(tiny_opt, ids), logits)
    with pytest.raises(ValueError, match="category 'one' has 3; one half is searched and the other tests the result, which needs 6"):
        sepcap.trace_dimensions(tiny_opt, texts=TEXTS)


def test_results_come_back(tiny_opt, tmp_path):
    for name, dims in {"numbers": 3, "table": sepcap.find_dimensions(tiny_opt, texts=WHOLE, n=2)}.items():
        found = sepcap.trace_dimensions(tiny_opt, texts=WHOLE, dims=dims)
        assert found.config["study"] == "dimension-traces"
        back = load_result(found.save(tmp_path / name))
        assert back.dims == found.dims
        assert isinstance(back, sepcap.DimensionTraces)
        assert back.summary() == found.summary()
        for table in found.tables:
            pd.testing.assert_frame_equal(back.tables[table], found.tables[table], check_dtype=False)
        assert back.figure().data


def test_a_finished_search_is_read_and_nothing_is_computed(tiny_opt, tmp_path, monkeypatch):
    found = sepcap.trace_dimensions(tiny_opt, texts=WHOLE, n=2, out=tmp_path / "traces")
    monkeypatch.setattr("sepcap.studies.dimensions.study.vectors_at", None)
    again = sepcap.trace_dimensions(tiny_opt, texts=WHOLE, n=2, out=tmp_path / "traces")
    assert again.summary() == found.summary()
    with pytest.raises(FileExistsError, match="n: 2 stored, 3 requested"):
        sepcap.trace_dimensions(tiny_opt, texts=WHOLE, n=3, out=tmp_path / "traces")


def test_a_finished_search_comes_back_from_its_folder_and_is_traced(tiny_opt, tmp_path, monkeypatch):
    found = sepcap.find_dimensions(tiny_opt, texts=WHOLE, n=2, out=tmp_path / "found")
    traced = sepcap.trace_dimensions(tiny_opt, texts=WHOLE, dims=found)
    assert traced.dims == found.dims
    assert traced.tables["tests"]["p"].tolist() == pytest.approx(found.table["p"].tolist())
    monkeypatch.setattr("sepcap.studies.dimensions.study.vectors_at", None)
    again = sepcap.find_dimensions(tiny_opt, texts=WHOLE, n=2, out=tmp_path / "found")
    assert again.summary() == load_result(tmp_path / "found").summary() == found.summary()
    assert "The 2 residual dimensions that separate the categories best on one half of 18 texts" in found.summary()[0]
    with pytest.raises(FileExistsError, match="n: 2 stored, 3 requested"):
        sepcap.find_dimensions(tiny_opt, texts=WHOLE, n=3, out=tmp_path / "found")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dims": []}, r"dims=\[\]"),
        ({"dims": [3, 3]}, "give different dimensions"),
        ({"dims": 32}, "dimensions 0 to 31"),
        ({"dims": -1}, "dims=-1: give a whole number, 0 or more"),
        ({"dims": pd.DataFrame({"dimension": [3]})}, "a table with the columns dimension"),
        ({"dims": 3, "positions": (40,)}, "from 0 to 31"),
    ],
)
def test_bad_input_is_named(tiny_opt, options, says):
    with pytest.raises(ValueError, match=says):
        sepcap.trace_dimensions(tiny_opt, texts=TEXTS, **options)


@pytest.mark.parametrize(
    ("options", "says"), [({"n": 0}, "n=0"), ({"locations": ()}, r"locations=\[\]"), ({"locations": (3,)}, r"to 2 \(output of the last")]
)
def test_bad_searches_are_named(tiny_opt, options, says):
    with pytest.raises(ValueError, match=says):
        sepcap.find_dimensions(tiny_opt, texts=WHOLE, positions=POSITIONS, **options)
