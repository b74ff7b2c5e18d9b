"""Streams: the values are the plain model's, a planted dimension is found, and the search is not fooled by its own size."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import words
from plain import Plain
from scipy import stats

import sepcap
from sepcap.experiments.permutations import relabel
from sepcap.experiments.result import load_result
from sepcap.experiments.search_origin import ORIGINS
from sepcap.experiments.streams import search_dims, separation
from sepcap.models.forward import logits_of
from sepcap.tasks.labelled import LabelledTexts

ALIKE = words(5, n=9)
TEXTS = LabelledTexts({"one": tuple(ALIKE[:3]), "two": tuple(ALIKE[3:6]), "three": tuple(ALIKE[6:])})
"""Three categories of the same kind of text: nothing but chance tells them apart."""
POSITIONS = (5, 9, 20)
LABELS = TEXTS.labels


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
    found = sepcap.streams(tiny, TEXTS, (3, 30), POSITIONS).tables["values"]
    assert len(found) == 2 * 3 * 9 * 3
    values = torch.from_numpy(found["value"].to_numpy(copy=True)).view(2, 3, 9, 3)
    torch.testing.assert_close(values, expected[:, :, list(POSITIONS)][..., [3, 30]].permute(3, 0, 1, 2), atol=1e-5, rtol=1e-5)
    row = found[(found["dim"] == 30) & (found["stage"] == 2) & (found["text"] == 4) & (found["position"] == 9)]
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
        table = sepcap.find_dims(tiny_opt, TEXTS, POSITIONS, n=32)
        shown = sepcap.streams(tiny_opt, TEXTS, table.head(2), POSITIONS)
    best = table.iloc[0]
    assert (best["dim"], best["stage"], best["p"], best["p_uncorrected"]) == (7, 2, pytest.approx(1 / 280), pytest.approx(1 / 280))
    assert best["eta2"] == pytest.approx(600 / 600.06)  # Σ n·(mean − 10)² = 600 of a total with 9 · 0.02/3 more
    assert (table["p"][1:] > 0.05).all()
    assert sorted(table["dim"]) == list(range(32))
    assert table["eta2"].is_monotonic_decreasing
    assert shown.config["dims"] == table["dim"].tolist()[:2]
    means = shown.tables["means"].query("dim == 7 and stage == 2").set_index("category")
    half = stats.t.ppf(0.975, 2) * 0.1 / 3**0.5
    for category, mean in {"one": 0, "two": 10, "three": 20}.items():
        assert means.loc[category, ["low", "mean", "high"]].tolist() == pytest.approx([mean - half, mean, mean + half], abs=1e-5)
    assert "Dimension 7: categories explain most of the variance between texts after layer 1: η² = 1.000" in shown.summary()[1]
    assert "η² = 1.000, p = 0.0036;" in shown.summary()[1]
    assert "were found on these very texts: p is corrected for that search." in shown.summary()[-1]


def test_the_test_on_other_texts_knows_that_they_are_others(tiny_opt):
    table = sepcap.find_dims(tiny_opt, TEXTS, POSITIONS, n=2)
    others = LabelledTexts({name: tuple(words(seed, n=3)) for seed, name in enumerate(("one", "two", "three"), start=20)})
    tested = sepcap.streams(tiny_opt, others, table, POSITIONS)
    assert tested.summary()[-1].endswith("were found on other texts, so that these are a test of them.")
    assert "p is corrected for all dimensions and stages shown" in tested.summary()[-1]
    separation = tested.tables["separation"]
    assert tested.tests["p"].tolist() == [separation.loc[separation["dim"] == dim, "p"].min() for dim in table["dim"]]


def origins(model, texts, dims, positions=POSITIONS):
    """What a result says of the origin, having checked that figure and summary say the same and give the same p."""
    found = sepcap.streams(model, texts, dims, positions)
    for row, note in zip(found.tests.to_dict("records"), found.figure().layout.annotations, strict=True):
        assert note.text == f"Dimension {row['dim']}: p = {row['p']:.2g} ({ORIGINS[row['origin']].title})"
        assert any(f"Dimension {row['dim']}: " in line and f"p = {row['p']:.2g};" in line for line in found.summary())
        assert ORIGINS[row["origin"]].told.split("{")[0] in found.summary()[-1]
    return found.tests["origin"].tolist(), found.tests["p"].tolist()


def test_the_origin_survives_whatever_is_done_to_the_table(tiny_opt, tmp_path):
    table = sepcap.find_dims(tiny_opt, TEXTS, POSITIONS, n=3)
    assert not table.attrs
    table.to_csv(tmp_path / "found.csv", index=False)
    changed = {
        "csv": pd.read_csv(tmp_path / "found.csv"),
        "dict": pd.DataFrame(table.to_dict()),
        "merge": table.merge(pd.DataFrame({"dim": table["dim"], "note": "x"}), on="dim"),
        "rows": table.iloc[[2, 0]],
    }
    for name, other in changed.items():
        assert origins(tiny_opt, TEXTS, other) == (["here"] * len(other), pytest.approx(other["p"].tolist())), name
    one = sepcap.find_dims(tiny_opt, TEXTS, (9,), n=1)
    one.to_csv(tmp_path / "one.csv")
    assert origins(tiny_opt, TEXTS, pd.read_csv(tmp_path / "one.csv"), (9,))[0] == ["here"]


def test_an_unknown_origin_is_called_unknown(tiny_opt):
    table = sepcap.find_dims(tiny_opt, TEXTS, POSITIONS, n=3)
    for unknown in (table["dim"].tolist(), table[["dim", "stage", "p"]], table.drop(columns="p"), table.assign(found_in=None)):
        assert origins(tiny_opt, TEXTS, unknown)[0] == ["unknown"] * 3
    mixed = pd.concat([table.head(1), table[["dim"]].tail(1)])
    assert origins(tiny_opt, TEXTS, mixed)[0] == ["here", "unknown"]
    assert "if on these texts, p is too small" in sepcap.streams(tiny_opt, TEXTS, 3, POSITIONS).summary()[-1]


def test_what_was_found_in_one_model_is_not_corrected_in_another(tiny_opt, tiny_folders):
    """The dimension was planted in one model only: the other has it by number, and its p is its own."""
    with tiny_opt.hooks(fwd_hooks=plant(7, torch.from_numpy(LABELS * 10.0))):
        table = sepcap.find_dims(tiny_opt, TEXTS, POSITIONS, n=1)
    other = sepcap.load_model(tiny_folders["gpt2"], device="cpu")
    said, (p,) = origins(other, TEXTS, table)
    assert said == ["other model"]
    assert table["p"][0] == pytest.approx(1 / 280)
    assert p == sepcap.streams(other, TEXTS, 7, POSITIONS).tables["separation"]["p"].min() != table["p"][0]
    # the same architecture with one weight changed is another model
    with torch.no_grad():
        tiny_opt.blocks[0].attn.W_O[0, 0, 0] += 1
    assert origins(tiny_opt, TEXTS, table)[0] == ["other model"]


def test_other_positions_and_texts_in_part_are_no_test(tiny_opt):
    table = sepcap.find_dims(tiny_opt, TEXTS, POSITIONS, n=1)
    assert origins(tiny_opt, TEXTS, table, (5, 9))[0] == ["other positions"]
    fresh = {name: tuple(words(seed, n=3)) for seed, name in enumerate(("one", "two"), start=40)}
    in_part = LabelledTexts({**fresh, "three": (TEXTS.texts["three"][0], *words(50, n=2))})
    relabelled = LabelledTexts(dict(zip(("three", "two", "one"), TEXTS.texts.values(), strict=True)))
    assert origins(tiny_opt, in_part, table)[0] == origins(tiny_opt, relabelled, table)[0] == ["some texts"]
    assert origins(tiny_opt, LabelledTexts(fresh), table, (5, 9))[0] == ["other texts"]


def test_eta_squared_is_the_f_ratio_and_its_p_values_those_of_scipy():
    rng = np.random.default_rng(0)
    means, labels = rng.normal(size=(2, 8, 3)), np.array([0, 0, 0, 1, 1, 1, 1, 1])
    means[1, :3, 2] += 3
    eta2, corrected, alone = separation(means, relabel(labels))
    for stage in range(2):
        for dim in range(3):
            groups = [means[stage, labels == g, dim] for g in (0, 1)]
            f = eta2[stage, dim] / (1 - eta2[stage, dim]) * 6
            assert f == pytest.approx(stats.f_oneway(*groups).statistic)
            options = {"permutation_type": "independent", "n_resamples": np.inf, "alternative": "greater"}
            p = stats.permutation_test(groups, lambda *g: stats.f_oneway(*g).statistic, vectorized=False, **options).pvalue
            assert alone[stage, dim] == pytest.approx(p)
    assert (corrected >= alone - 1e-12).all()
    assert np.unravel_index(corrected.argmin(), corrected.shape) == np.unravel_index(eta2.argmax(), eta2.shape)


def test_scale_and_offset_of_a_dimension_do_not_matter_and_constants_explain_nothing():
    rng = np.random.default_rng(1)
    means = rng.normal(size=(1, 9, 4))
    relabelled = relabel(LABELS)
    changed = means * [1000, 1e-3, -5, 1] + [0, 4, -2, 0]
    for one, other in zip(separation(means, relabelled), separation(changed, relabelled), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)
    constant = np.full((1, 9, 1), 0.1) + rng.normal(size=(1, 9, 1)) * 1e-9
    eta2, p, alone = separation(np.concatenate([means, constant], axis=2), relabelled)
    assert (eta2[0, 4], p[0, 4], alone[0, 4]) == (0, 1, 1)


def test_the_search_finds_something_by_chance_as_often_as_it_says():
    """40 dimensions at 3 stages without categories: the best p-value is at most k/35 with probability k/35."""
    relabelled, best, naive = relabel(np.repeat([0, 1], 4)), [], []
    for seed in range(400):
        stages = np.cumsum(np.random.default_rng(seed).normal(size=(3, 8, 40)), axis=0)
        table = search_dims(stages, relabelled)
        best.append(table["p"].min())
        naive.append(table["p_uncorrected"].min())
    for k in (1, 2, 4, 9, 18):
        expected = k / 35
        assert abs(np.mean(np.array(best) <= expected + 1e-9) - expected) < 3.5 * np.sqrt(expected * (1 - expected) / 400), k
    assert np.mean(np.array(naive) <= 2 / 35) > 0.9  # what a search by hand would have believed


def test_only_the_stages_asked_for_are_searched(tiny_opt):
    values = torch.from_numpy(LABELS * 10.0)
    with tiny_opt.hooks(fwd_hooks=plant(7, values)):
        before = sepcap.find_dims(tiny_opt, TEXTS, POSITIONS, n=32, stages=[1, 0])
        after = sepcap.find_dims(tiny_opt, TEXTS, POSITIONS, n=1, stages=[2])
    assert set(before["stage"]) <= {0, 1}
    assert (before["p"] > 0.05).all()
    assert after[["dim", "stage"]].to_numpy().tolist() == [[7, 2]]


def test_without_dimensions_the_best_four_are_shown_and_the_model_is_left_as_it_was(tiny_opt):
    ids = torch.arange(3, 20)[None]
    logits = logits_of(tiny_opt, ids)
    found = sepcap.streams(tiny_opt, TEXTS)
    assert found.config["dims"] == sepcap.find_dims(tiny_opt, TEXTS, n=4)["dim"].tolist()
    assert found.tests["origin"].tolist() == ["here"] * 4
    assert found.tests["p"].tolist() == sepcap.find_dims(tiny_opt, TEXTS, n=4)["p"].tolist()
    assert torch.equal(logits_of(tiny_opt, ids), logits)


def test_results_come_back(tiny_opt, tmp_path):
    for name, dims in {"numbers": 3, "table": sepcap.find_dims(tiny_opt, TEXTS, n=2)}.items():
        found = sepcap.streams(tiny_opt, TEXTS, dims)
        assert found.config["study"] == "streams"
        back = load_result(found.save(tmp_path / name))
        assert isinstance(back, sepcap.Streams)
        assert back.summary() == found.summary()
        for table in found.tables:
            pd.testing.assert_frame_equal(back.tables[table], found.tables[table], check_dtype=False)
        assert back.figure().data


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
        sepcap.streams(tiny_opt, TEXTS, **options)


@pytest.mark.parametrize(
    ("options", "says"), [({"n": 0}, "n=0"), ({"stages": []}, r"stages=\[\]"), ({"stages": [3]}, r"to 2 \(what leaves")]
)
def test_bad_searches_are_named(tiny_opt, options, says):
    with pytest.raises(ValueError, match=says):
        sepcap.find_dims(tiny_opt, TEXTS, POSITIONS, **options)
