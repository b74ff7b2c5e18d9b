"""Spectra of Jacobians: planted ranks, exact against matrix-free, tables against hand arithmetic, resuming, bad input."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import words
from tiny import fresh

import sepcap
from sepcap.studies.catalog import load_result
from sepcap.studies.jacobian import study as module
from sepcap.studies.jacobian.config import JacobianSpectrumConfig
from sepcap.studies.jacobian.plan import plan_jacobian_spectrum
from sepcap.studies.jacobian.study import JacobianSpectrum, mean_and_interval

D = 32
SMALL = {"tokens": 3, "rows": 2, "control": False}


@pytest.fixture(scope="module")
def opt(tiny_folders):
    """A tiny OPT that nobody edits."""
    torch.set_num_threads(1)
    return fresh(tiny_folders["opt"])


@pytest.fixture(scope="module")
def found(opt, letters):
    """Both layers at three rows, with the control."""
    return sepcap.jacobian_spectrum(opt, task=letters, tokens=3, rows=3)


def plant_attention(model, rank):
    """Attention that weighs all positions alike and passes `rank` coordinates of its values: returns W_V W_O summed over heads."""
    attn = model.blocks[0].attn
    with torch.no_grad():
        for name in ("W_Q", "b_Q"):
            getattr(attn, name).zero_()
        attn.W_V[:, :, 2:] = 0
        attn.W_V.view(4, D, 8)[rank // 2 :] = 0
        return torch.einsum("hid,hdo->io", attn.W_V.double(), attn.W_O.double())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_of_uniform_attention_every_singular_value_is_known(tiny_opt, letters, method, dtype):
    through = plant_attention(tiny_opt, 6)
    how = {"method": method, "k": 24, "norm": False, "precision": dtype, **SMALL, "tokens": 4}
    got = sepcap.jacobian_spectrum(tiny_opt, layers=(0,), task=letters, **how)
    assert got.tables["jacobians"]["rank"].tolist() == [24, 24]
    assert not got.tables["jacobians"]["at_least"].any()
    # position t weighs BOS and the t positions up to itself alike; the Jacobian is a Kronecker product
    weights = np.tril(np.ones((4, 4))) / np.arange(2, 6)[:, None]
    pairs = np.outer(np.linalg.svd(weights)[1], np.linalg.svd(through.numpy())[1][:6])
    expected = np.sort(pairs.ravel())[::-1]
    for values in got.tensors["trained"][0].numpy():
        np.testing.assert_allclose(values[:24], expected, rtol=1e-3 if method == "randomized" else 1e-5)
        assert (values[24:] < 1e-6 * values[0]).all()


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("rank", [1, 5, 32])
def test_the_rank_of_a_linear_mlp_is_that_of_its_weights(tiny_opt, letters, rank, method):
    mlp = tiny_opt.blocks[1].mlp
    with torch.no_grad():
        mlp.b_in[:] = -1e4  # ReLU lets nothing of these through, and everything of those below
        mlp.b_in[:rank] = 1e4
    how = {"method": method, "k": 96, "norm": False, "threshold": 1e-6, **SMALL}
    got = sepcap.jacobian_spectrum(tiny_opt, layers=(1,), part="mlp", task=letters, **how)
    assert got.tables["jacobians"]["rank"].tolist() == [3 * rank] * 2
    assert got.tables["jacobians"]["bound"].tolist() == [3 * rank] * 2
    matrix = (mlp.W_in[:, :rank].double() @ mlp.W_out[:rank].double()).detach().numpy()
    expected = np.repeat(np.linalg.svd(matrix)[1][:rank], 3)
    np.testing.assert_allclose(got.tensors["trained"][0, 1].numpy()[: 3 * rank], expected, rtol=1e-3 if method == "randomized" else 1e-9)


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_exact_and_matrix_free_agree_on_the_leading_values(tiny, letters, part):
    exact, free = (
        sepcap.jacobian_spectrum(tiny, layers=(1,), part=part, task=letters, method=method, k=12, **(SMALL | {"rows": 1}))
        for method in ("exact", "randomized")
    )
    true, values = exact.tensors["trained"][..., :12], free.tensors["trained"]
    torch.testing.assert_close(values, true, rtol=1e-3, atol=0)
    assert (values <= true * (1 + 1e-12)).all()
    assert ((true - values) <= free.tensors["trained_errors"] + 1e-12).all()
    assert exact.tensors["trained"].shape == (1, 1, 3 * D)
    table = free.tables["jacobians"]
    np.testing.assert_allclose(table["stable_rank"], exact.tables["jacobians"]["stable_rank"], rtol=0.1)
    ranks = exact.tables["jacobians"]["rank"]
    assert ((table["rank"] == ranks) | (table["at_least"] & (table["rank"] <= ranks))).all()


def test_the_spectrum_of_an_mlp_is_the_union_over_its_tokens(opt, letters):
    from sepcap.models.blocks.parts import block_part
    from sepcap.statistics.spectrum import jacobian

    plan = plan_jacobian_spectrum(opt, JacobianSpectrumConfig(layers=(1,), part="mlp", task=letters, **SMALL))
    ids, kept = plan.rows[0]
    with block_part(opt, 1, "mlp", ids, kept) as part:
        expected = np.linalg.svd(jacobian(part.function, part.at, 64).numpy())[1]
    np.testing.assert_allclose(sepcap.jacobian_spectrum(opt, plan.config).tensors["trained"][0, 0].numpy(), expected, atol=1e-12)


def test_the_table_counts_the_values_in_the_tensors(found):
    for weights, values in (("trained", found.tensors["trained"]), ("random", found.tensors["random"])):
        for layer in (0, 1):
            for row in range(3):
                s = values[layer, row].numpy()
                table = found.tables["jacobians"]
                line = table[(table["weights"] == weights) & (table["layer"] == layer) & (table["row"] == row)].iloc[0]
                assert line["rank"] == (s > 1e-3 * s[0]).sum()
                assert line["largest"] == s[0]
                assert line["stable_rank"] == pytest.approx((s**2).sum() / s[0] ** 2)
                assert line["bound"] == 3 * (D - 1)
                ranks = found.tables["ranks"]
                ranks = ranks[(ranks["weights"] == weights) & (ranks["layer"] == layer) & (ranks["row"] == row)]
                assert ranks["rank"].tolist() == [(s > t * s[0]).sum() for t in ranks["threshold"]]
                assert 1e-3 in ranks["threshold"].tolist()


def test_means_intervals_and_differences_are_those_of_a_t_test(found):
    from scipy import stats

    table = found.tables["jacobians"].set_index(["weights", "layer"])
    line = found.by_layer.set_index(["weights", "layer"]).loc[("trained", 1)]
    values = table.loc[("trained", 1), "stable_rank"].to_numpy()
    interval = stats.ttest_1samp(values, 0).confidence_interval()
    assert (line["stable_rank"], line["stable_rank_low"], line["stable_rank_high"]) == pytest.approx((values.mean(), *interval))
    paired = stats.ttest_rel(values, table.loc[("random", 1), "stable_rank"].to_numpy()).confidence_interval()
    difference = found.against_control("stable_rank").set_index("layer").loc[1]
    assert (difference["low"], difference["high"]) == pytest.approx(tuple(paired))
    assert mean_and_interval([5.0])[0] == 5
    assert math.isnan(mean_and_interval([5.0])[1])


def test_the_control_is_the_model_with_random_weights(found, opt, letters, tiny_folders):
    random = sepcap.load_model(tiny_folders["opt"], device="cpu", random_weights=True, seed=0)
    alone = sepcap.jacobian_spectrum(random, task=letters, tokens=3, rows=3, control=False)
    torch.testing.assert_close(found.tensors["random"], alone.tensors["trained"])
    assert (found.tensors["random"] != found.tensors["trained"]).any()


def test_rows_are_whole_of_one_text_and_from_all_over_the_task(opt, letters):
    plan = plan_jacobian_spectrum(opt, JacobianSpectrumConfig(task=letters, tokens=7, rows=4))
    for ids, kept in plan.rows:
        assert ids[0] == 0
        assert kept == list(range(1, 8))
        assert 0 not in ids[1:]
    assert len({tuple(ids.tolist()) for ids, _ in plan.rows}) == 4
    assert len(plan.resolved["documents"][0]) > 1
    again = plan_jacobian_spectrum(opt, JacobianSpectrumConfig(task=letters, tokens=7, rows=4))
    assert again.resolved["sample"] == plan.resolved["sample"]


def test_the_cost_is_said_beforehand(opt, letters):
    said = plan_jacobian_spectrum(opt, JacobianSpectrumConfig(task=letters, tokens=3, rows=2)).cost()
    for part in ("8 Jacobians", "2 layers, 2 rows, trained and random weights", "96 x 96", "0.0737 MB each", "96 products per", "minutes"):
        assert part in said
    free = plan_jacobian_spectrum(opt, JacobianSpectrumConfig(task=letters, tokens=3, rows=2, method="randomized", k=5, part="mlp"))
    assert "the 5 leading values by products alone: at most 217 products" in free.cost()
    got = sepcap.jacobian_spectrum(opt, free.config)
    assert (got.tables["jacobians"]["products"] <= free.products).all()


def test_auto_is_exact_as_long_as_three_such_matrices_fit(opt, letters, monkeypatch):
    from sepcap.studies.jacobian import plan as jacobian_plan

    def method(part, limit):
        monkeypatch.setattr(jacobian_plan, "EXACT_BYTES", limit)
        return plan_jacobian_spectrum(opt, JacobianSpectrumConfig(task=letters, part=part, tokens=3, rows=1)).method

    needed = {"attn": 3 * 8 * 96 * 96, "mlp": 3 * 8 * 3 * 32 * 32}
    for part, size in needed.items():
        assert method(part, size) == "exact"
        assert method(part, size - 1) == "randomized"


def test_what_cannot_fit_is_refused_before_anything_is_computed(opt, letters, monkeypatch):
    from sepcap.studies.jacobian import plan as jacobian_plan

    monkeypatch.setattr(jacobian_plan, "_memory", lambda device: 1000)
    with pytest.raises(MemoryError, match=r"method='exact' with tokens=3 needs 0\.221 MB"):
        sepcap.jacobian_spectrum(opt, task=letters, method="exact", **SMALL)


def test_a_result_is_saved_and_loaded_as_it_was(found, tmp_path):
    found.save(tmp_path / "study")
    for again in (JacobianSpectrum.load(tmp_path / "study"), load_result(tmp_path / "study")):
        assert again.summary() == found.summary()
        assert again.config == found.config
        for name, tensor in found.tensors.items():
            assert torch.equal(again.tensors[name], tensor)
        for name, table in found.tables.items():
            assert again.tables[name].equals(table)


@pytest.mark.thorough
def test_an_interrupted_study_goes_on_where_it_was_and_gives_the_same(opt, letters, tmp_path, monkeypatch):
    options = {"task": letters, "tokens": 2, "rows": 2}
    expected = sepcap.jacobian_spectrum(opt, **options)
    computed, real = [], module._spectrum

    def failing(*args):
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append(args[2:5])
        return real(*args)

    monkeypatch.setattr(module, "_spectrum", failing)
    with pytest.raises(KeyboardInterrupt):
        sepcap.jacobian_spectrum(opt, out=tmp_path / "study", **options)
    with pytest.raises(FileNotFoundError, match="not finished"):
        JacobianSpectrum.load(tmp_path / "study")
    later = []
    monkeypatch.setattr(module, "_spectrum", lambda *args: (later.append(args[2:5]), real(*args))[1])
    got = sepcap.jacobian_spectrum(opt, out=tmp_path / "study", **options)
    every = [(weights, layer, row) for weights in ("trained", "random") for layer in (0, 1) for row in (0, 1)]
    assert computed + later == every
    assert torch.equal(got.tensors["trained"], expected.tensors["trained"])
    assert got.summary() == expected.summary()
    with pytest.raises(FileExistsError, match="threshold"):
        sepcap.jacobian_spectrum(opt, out=tmp_path / "study", threshold=0.5, **options)
    assert JacobianSpectrum.load(tmp_path / "study").summary() == expected.summary()


def test_the_same_seed_gives_the_same_bits_and_nothing_global_is_touched(opt, letters):
    state = torch.get_rng_state()
    options = {"task": letters, "method": "randomized", "k": 4, **SMALL, "tokens": 2, "rows": 1}
    first, again, other = (sepcap.jacobian_spectrum(opt, layers=(0,), seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.tensors["trained"], again.tensors["trained"])
    assert not torch.equal(first.tensors["trained"], other.tensors["trained"])


def test_the_summary_says_the_numbers(found):
    said = " ".join(found.summary())
    ranks = found.by_layer[found.by_layer["weights"] == "trained"]["rank"]
    for part in ("96 rows and columns", "0.001 of the largest", f"rank {ranks.min():,.4g} of 93 possible", "With random weights"):
        assert part in said
    assert "JacobianSpectrum" in repr(found)


def test_layers_are_counted_by_intervals_that_hold_together(found):
    """Every layer's difference is just outside of its own interval, and inside of one that holds for all layers."""
    rows, layers = found.config["rows"], len(found.config["layers"])
    spread = np.arange(rows) - (rows - 1) / 2
    limits = [scipy.stats.t.ppf(1 - 0.025 / n, rows - 1) * spread.std(ddof=1) / rows**0.5 for n in (1, layers)]
    table = found.tables["jacobians"].sort_values(["weights", "layer", "row"], ignore_index=True)
    trained = table["weights"] == "trained"
    planted = np.tile(spread + sum(limits) / 2, layers)
    table.loc[trained, "stable_rank"] = table.loc[~trained, "stable_rank"].to_numpy() + planted
    result = dataclasses.replace(found, tables={**found.tables, "jacobians": table})
    assert layers > 1
    assert (result.against_control("stable_rank")["low"] > 0).all()
    assert f"lower in 0 and higher in 0 of {layers} layers" in result._against("stable_rank")
    table.loc[trained, "stable_rank"] += limits[1]
    assert f"lower in 0 and higher in {layers} of {layers} layers" in result._against("stable_rank")


@pytest.fixture(scope="module")
def coarse_and_exact():
    """Three layers of the embedded model with far fewer directions than pass, and the same Jacobians whole."""
    torch.set_num_threads(1)
    model, options = sepcap.load_model(device="cpu"), {"tokens": 2, "rows": 2}
    ways = ({"method": "randomized", "k": 8}, {"method": "exact"})
    return [sepcap.jacobian_spectrum(model, layers=(2, 4), **options, **how) for how in ways]


@pytest.mark.thorough
def test_ranks_that_are_lower_bounds_are_neither_compared_nor_ranked(coarse_and_exact):
    coarse, exact = coarse_and_exact
    both = coarse.by_layer.merge(exact.by_layer, on=["weights", "layer"], suffixes=("", "_true"))
    assert both["at_least"].all()
    assert (both["rank"] < both["rank_true"]).all()
    assert both[["rank_low", "rank_high"]].isna().all(axis=None)
    assert coarse.against_control()[["difference", "low", "high"]].isna().all(axis=None)
    said = " ".join(coarse.summary())
    assert "narrowest" not in said
    assert "With random weights the rank" not in said
    lowest, highest = coarse.tables["jacobians"]["rank"].agg(["min", "max"])
    assert f"is not settled: in 8 of 8 Jacobians it is only known to be at least {lowest} to {highest}" in said
    for how in ("method='exact'", "a larger k (here 8)", "a larger threshold", "fewer tokens"):
        assert how in said
    assert "With random weights the rank" in " ".join(exact.summary())


@pytest.mark.thorough
def test_what_is_compared_instead_is_what_the_exact_method_finds(coarse_and_exact):
    coarse, exact = coarse_and_exact
    assert "The layer with the lowest stable rank is 2" in " ".join(coarse.summary())
    table, true = coarse.tables["jacobians"], exact.tables["jacobians"]["stable_rank"]
    assert (table["stable_rank_error"] > 0).all()
    # 10 directions estimate what is missed: a t distribution with 9 degrees of freedom, beyond 5 once in 700
    assert ((table["stable_rank"] - true).abs() < 5 * table["stable_rank_error"] + 1e-3 * true).all()
    got, expected = coarse.against_control("stable_rank"), exact.against_control("stable_rank")
    np.testing.assert_allclose(got["difference"], expected["difference"], rtol=0.05)


@pytest.mark.thorough
def test_ranks_are_compared_at_the_threshold_where_all_are_settled(tiny_opt, letters):
    options = {"task": letters, "tokens": 3, "rows": 2, "threshold": 1e-6}
    free, exact = (sepcap.jacobian_spectrum(tiny_opt, method=method, k=40, **options) for method in ("randomized", "exact"))
    assert exact.settled_threshold == 1e-6
    ranks = free.tables["ranks"]
    ranks.loc[ranks["threshold"] < 1e-2, "at_least"] = True
    free.tables["jacobians"]["at_least"] = True
    assert free.settled_threshold == 1e-2
    np.testing.assert_array_equal(free.at(1e-2).by_layer["rank"], exact.at(1e-2).by_layer["rank"])
    np.testing.assert_allclose(free.at(1e-2).against_control()["low"], exact.at(1e-2).against_control()["low"])
    said = free.summary()
    assert "At 0.01 of the largest every rank is settled" in said[2]
    assert said[3].startswith("The narrowest layer")
    assert list(free.at(1e-2).tables["jacobians"]) == list(free.tables["jacobians"])
    values = exact.tensors["trained"][0, 0]
    assert exact.at(0.1).tables["jacobians"]["rank"][0] == (values > 0.1 * values[0]).sum()
    with pytest.raises(ValueError, match=r"threshold=0\.3 is not reported; give one of 0\.1, 0\.01"):
        exact.at(0.3)


def test_no_interval_reaches_beyond_what_is_possible(found):
    for column, value in (("rank", [93, 93, 60]), ("stable_rank", [1.1, 1.1, 9.0])):
        tables = {name: table.copy() for name, table in found.tables.items()}
        tables["jacobians"].loc[:2, column] = value
        line = JacobianSpectrum(found.config, tables, found.tensors).by_layer.iloc[0]
        _, low, high = mean_and_interval(value)
        assert (line[f"{column}_low"], line[f"{column}_high"]) == pytest.approx((max(low, 1), min(high, 93)))
        assert low < 1 or high > 93


def test_where_what_is_possible_differs_from_row_to_row_the_rank_is_as_uncertain_as_that(found):
    tables = {name: table.copy() for name, table in found.tables.items()}
    tables["jacobians"].loc[:2, "bound"] = tables["jacobians"].loc[:2, "rank"] = [20, 30, 60]
    line = JacobianSpectrum(found.config, tables, found.tensors).by_layer.iloc[0]
    expected = mean_and_interval([20, 30, 60])
    assert (line["rank"], line["rank_low"], line["rank_high"]) == pytest.approx((expected[0], max(0, expected[1]), expected[2]))


def test_the_sentences_of_one_layer_one_row_and_of_nothing(tiny_opt, letters):
    one = plan_jacobian_spectrum(tiny_opt, JacobianSpectrumConfig(layers=(0,), task=letters, tokens=1, rows=1, control=False))
    assert "1 Jacobian (1 layer, 1 row) of" in one.cost()
    said = " ".join(sepcap.jacobian_spectrum(tiny_opt, one.config).summary())
    assert "at 1 token, 1 row of" in said
    assert "The only layer is 0: rank" in said
    with torch.no_grad():
        tiny_opt.blocks[0].attn.W_O.zero_()
    empty = " ".join(sepcap.jacobian_spectrum(tiny_opt, layers=(0,), task=letters, **SMALL).summary())
    assert "The only layer is 0: its Jacobian is 0 in every row." in empty
    with_control = " ".join(sepcap.jacobian_spectrum(tiny_opt, task=letters, tokens=2, rows=1).summary())
    assert "The narrowest layer is 0: its Jacobian is 0 in every row." in with_control
    assert "one row of tokens gives no interval" in with_control
    assert not any("nan" in text for text in (said, empty, with_control))


def test_what_it_takes_is_said_before_it_is_done_also_where_auto_switches(opt, letters, monkeypatch, tmp_path, caplog):
    from sepcap.studies.jacobian import plan as jacobian_plan

    said = []
    real = module._spectrum
    monkeypatch.setattr(module, "_spectrum", lambda *args: (said.append("computed"), real(*args))[1])
    options = {"task": letters, **SMALL, "rows": 1, "out": tmp_path / "study"}
    sepcap.jacobian_spectrum(opt, layers=(0,), progress=said.append, **options)
    assert said[1:] == ["computed"]
    config = JacobianSpectrumConfig(layers=(0,), **{name: value for name, value in options.items() if name != "out"})
    assert plan_jacobian_spectrum(opt, config).cost().rsplit(", about")[0] == said[0].rsplit(", about")[0]
    # 96 products together, each of 4 positions that every one of 4 heads weighs 4 times, and 8 times the width, in float64
    working = 96 * 8 * 4 * (4 * 4 * 4 + 8 * D)
    assert f"{working / 1e6:,.3g} MB of it for one batch of products" in said[0]
    assert f"{(working + 3 * 8 * 96 * 96) / 1e6:,.3g} MB at once" in said[0]
    assert "method='auto'" not in said[0]
    sepcap.jacobian_spectrum(opt, layers=(0,), progress=said.append, **options)
    assert said[2:] == [f"{tmp_path / 'study'} is finished; nothing is recomputed"]
    monkeypatch.setattr(jacobian_plan, "EXACT_BYTES", 1)
    with caplog.at_level("INFO", logger="sepcap"):
        sepcap.jacobian_spectrum(opt, layers=(0,), k=2, **(options | {"out": None}))
    assert "the 2 leading values by products alone (method='auto': all values would need 0.221 MB; ranks can be lower bounds" in caplog.text


@pytest.mark.thorough
def test_every_jacobian_has_random_directions_of_its_own(opt, letters, monkeypatch):
    seeds, real = [], module.leading_values
    monkeypatch.setattr(module, "leading_values", lambda *args, **how: (seeds.append(how["seed"]), real(*args, **how))[1])
    options = {"task": letters, "method": "randomized", "k": 2, "tokens": 2, "rows": 2}
    for _ in range(2):
        sepcap.jacobian_spectrum(opt, **options)
    assert seeds[:8] == seeds[8:]
    assert len(set(seeds)) == 8


def test_a_masked_model_is_measured_without_its_special_tokens(tmp_path, letters):
    from encoders import save_masked

    model = sepcap.load_model(save_masked("roberta", tmp_path), device="cpu")
    got = sepcap.jacobian_spectrum(model, layers=(0,), task=letters, tokens=4, rows=2)
    width = model.cfg.d_model
    assert got.config["size"] == 4 * width
    assert all(len(row) == 6 for row in got.config["sample"])
    assert (got.tables["jacobians"]["bound"] <= 4 * width).all()


def test_an_image_classifier_is_refused(tmp_path):
    from encoders import save_vit

    model = sepcap.load_model(save_vit(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="takes images"):
        sepcap.jacobian_spectrum(model)


def test_a_mixture_of_experts_says_what_it_cannot(tmp_path, letters):
    import transformers
    from conftest import tiny_tokenizer

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(**sizes, num_local_experts=4, vocab_size=320, max_position_embeddings=32, bos_token_id=0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = sepcap.load_model(tmp_path, device="cpu")
    options = {"task": letters, "control": False, "tokens": 2, "rows": 1}
    with pytest.raises(NotImplementedError, match="exist in float32 and below only"):
        sepcap.jacobian_spectrum(model, layers=(0,), part="mlp", **options)
    with pytest.raises(NotImplementedError, match="no forward derivative"):
        sepcap.jacobian_spectrum(model, layers=(0,), part="mlp", precision="float32", method="randomized", **options)
    assert sepcap.jacobian_spectrum(model, layers=(0,), part="mlp", precision="float32", **options).tables["jacobians"]["rank"][0] > 0
    assert sepcap.jacobian_spectrum(model, layers=(0,), **options).tables["jacobians"]["rank"][0] > 0


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"tokens": 0}, ValueError, "tokens=0: give at least 1"),
        ({"rows": 0}, ValueError, "rows=0"),
        ({"threshold": 0.0}, ValueError, "threshold=0.0"),
        ({"threshold": 1e-6, "precision": "float32"}, ValueError, "within rounding.*or precision='float64'"),
        ({"tolerance": 2.0}, ValueError, "tolerance=2.0"),
        ({"layers": (2,)}, IndexError, r"layers=\(2,\): this model has layers 0 to 1"),
        ({"layers": ()}, ValueError, "layers is empty"),
        ({"layers": (0, False)}, TypeError, r"layers=\(0, False\): give 'all' or whole numbers of layers"),
        ({"tokens": 40}, ValueError, "context=41"),
        ({"thresold": 0.1}, ValueError, "Did you mean 'threshold'"),
    ],
)
def test_bad_input_is_named(opt, letters, options, error, said, tmp_path):
    with pytest.raises(error, match=said):
        sepcap.jacobian_spectrum(opt, **{"task": letters, "out": tmp_path / "study", **options})
    assert not (tmp_path / "study").exists()


NAMES = [
    ("part", "mpl", "is not known.*Did you mean 'mlp'"),
    ("method", "svd", "is not known.*'exact'"),
    ("precision", "half", "is not known.*'float32'"),
    ("layers", "first", "give 'all' or numbers of layers"),
]


@pytest.mark.parametrize(("name", "given", "said"), NAMES)
def test_unknown_names_are_answered_with_the_valid_ones(name, given, said):
    # the type checker of the tests would answer first
    config = JacobianSpectrumConfig()
    object.__setattr__(config, name, given)
    with pytest.raises(ValueError, match=f"{name}='{given}'.*{said}"):
        config.__post_init__()


def test_too_little_text_and_what_is_no_model(opt):
    with pytest.raises(ValueError, match=r"too little text|no row of 20 tokens"):
        sepcap.jacobian_spectrum(opt, task=["a b c", "d e f", "g h"] * 3, tokens=20)
    with pytest.warns(UserWarning, match="rows of 30 tokens, not 50"):
        sepcap.jacobian_spectrum(opt, layers=(0,), part="mlp", task=words(3, n=6, length=14), tokens=30, rows=50, control=False)
    with pytest.raises(TypeError, match="model is a dict"):
        sepcap.jacobian_spectrum({})
    with pytest.raises(ValueError, match="control=False"):
        sepcap.jacobian_spectrum(opt, layers=(0,), part="mlp", task=words(3), **SMALL).against_control()


def test_thresholds_within_rounding_are_not_reported():
    assert JacobianSpectrumConfig(precision="float32").thresholds(1000) == [1e-1, 1e-2, 1e-3]
    assert JacobianSpectrumConfig(threshold=0.02).thresholds(1000) == [1e-1, 2e-2, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
