"""Bootstrap replicates of statistics against sums over documents by hand; what must not matter; parts that merge."""

import hashlib
import math
import warnings

import numpy as np
import pytest
import torch
from conftest import CONTEXT, words
from encoders import images, load, save_masked, save_vit
from tiny import fresh

import sepcap
from sepcap.statistics import replicates as module
from sepcap.statistics.collect import collect_sample
from sepcap.statistics.replicates import ACTIVATIONS, Draws, poisson_weights
from sepcap.tasks.samples import sample_task

SITES = ("mlp", "attn_value")
NAMES = ("atp", "relp", "ig")
OF_SUMS = ("mean", "abs", "sqrt", "rms", "std", "atp", "taylor", "fisher", "relp", "ig")


@pytest.fixture(scope="module")
def task():
    """Documents shorter than a row, which share rows, and longer ones."""
    return sepcap.load_task([*words(0, n=40, length=1), *words(1, n=20, length=60)])


@pytest.fixture
def sample(tiny_opt, task):
    return sample_task(tiny_opt, task, "collect", 400, CONTEXT)


def drawn(model, sample, task, many=6, seed=0, **how):
    how = {"sites": SITES, "gradients": NAMES, "k": 2, "batch_size": 3, **how}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "integrated gradients")
        return collect_sample(model, sample, draws=Draws.of(task, sample, many, seed), **how)


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def by_hand(key, many):
    """Poisson draws by a loop over probabilities, from the generator's raw 64-bit numbers."""
    found = []
    for raw in np.random.Philox(key=int(key, 16)).random_raw(many):
        u, k, below = (int(raw) >> 11) / 2**53, 0, math.exp(-1)
        while u >= below:
            k += 1
            below += math.exp(-1) / math.factorial(k)
        found.append(k)
    return found


def test_one_replicate_is_the_weighted_sum_over_documents(tiny_opt, sample, task):
    """Every document is collected alone; its sums are weighted and added up here."""
    stats = drawn(tiny_opt, sample, task, many=1)
    print_of = task.sources[0].fingerprint
    keys = [digest(f"{print_of} collect {number}") for _, number in sample.origins]
    assert len(set(sample.clusters)) < len(keys), "some documents share a row"
    weights, seen = {}, set()
    for cluster in set(sample.clusters):
        rows = [i for i, of in enumerate(sample.clusters) if of == cluster]
        documents = {d for i in rows for d in sample.row_documents[i]}
        assert not documents & seen
        seen |= documents
        weights[cluster] = by_hand(digest("0 " + min(keys[d] for d in documents)), 1)[0]
    assert {0, 1, 2} <= set(weights.values())
    total = {site: dict.fromkeys(("count", "predictions", "rows"), 0.0) for site in SITES}
    for row, cluster in enumerate(sample.clusters):
        alone = collect_sample(tiny_opt, sample.take([row]), SITES, gradients=("atp", "relp"))
        for site, stats_of_row in alone.items():
            found = stats_of_row.gradients
            parts = {name: stats_of_row.sums[name] for name in ("total", "absolute", "root", "positive")}
            parts |= dict(found.sums)
            parts["square"] = stats_of_row.rms.square() * stats_of_row.count
            parts |= {"count": stats_of_row.count, "predictions": found.predictions, "rows": found.rows}
            for name, value in parts.items():
                total[site][name] = total[site].get(name, 0) + weights[cluster] * value
    for site in SITES:
        one, sums = stats[site].replicate(0), total[site]
        n = sums["count"]
        assert one.count == n
        expected = {
            "mean": sums["total"] / n,
            "abs": sums["absolute"] / n,
            "sqrt": sums["root"] / n,
            "rms": (sums["square"] / n).sqrt(),
            "std": (sums["square"] / n - (sums["total"] / n).square()).sqrt(),
            "atp": -sums["zg"] / sums["predictions"],
            "taylor": sums["zg_abs"] / sums["predictions"],
            "fisher": sums["row_squares"] / sums["rows"],
            "relp": -sums["relp_zg"] / sums["predictions"],
        }
        for name, value in expected.items():
            torch.testing.assert_close(getattr(one, name), value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stats["mlp"].replicate(0).freq, total["mlp"]["positive"] / total["mlp"]["count"])


def test_replicates_change_no_bit_of_the_statistics(tiny_opt, sample):
    task = sepcap.load_task([*words(0, n=40, length=1), *words(1, n=20, length=60)])
    plain = collect_sample(tiny_opt, sample, SITES, gradients=("atp", "relp", "snip"), batch_size=3, histogram=True)
    again = drawn(tiny_opt, sample, task, gradients=("atp", "relp", "snip"), histogram=True)
    for site in SITES:
        for name, value in plain[site].sums.items():
            assert torch.equal(value, again[site].sums[name]), name
        for name, value in plain[site].gradients.sums.items():
            assert torch.equal(value, again[site].gradients.sums[name]), name
        assert torch.equal(plain[site].histogram.counts, again[site].histogram.counts)
        assert "snip" not in again[site].replicate(0).gradients.names


@pytest.mark.parametrize("kind", ["text", "masked", "images"])
def test_with_weights_of_one_a_replicate_is_the_sample(kind, tiny_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "poisson_weights", lambda key, many: np.ones(many, dtype=np.int64))
    if kind == "text":
        model, data, gradients = fresh(tiny_folders["mistral"]), words(0), ("atp", "relp")
    elif kind == "masked":
        model, data, gradients = load(save_masked("bert", tmp_path)), words(0), ("atp",)
    else:
        model, data, gradients = load(save_vit(tmp_path)), images(), ("atp",)
    stats = sepcap.collect(model, data, tokens=60, gradients=gradients, replicates=2, batch_size=4)
    for site in stats:
        one, gone = stats[site].replicate(1), set(OF_SUMS) - {"ig", *(() if "relp" in gradients else ("relp",))}
        assert one.count == stats[site].count
        for name in gone:
            torch.testing.assert_close(getattr(one, name), getattr(stats[site], name).double(), rtol=1e-4, atol=1e-6)


@pytest.mark.thorough
def test_batches_and_the_number_of_replicates_have_no_effect(tiny_opt, sample, task):
    whole = drawn(tiny_opt, sample, task, many=6)
    for how in ({"batch_size": 1}, {"many": 9, "batch_size": 50}):
        other = drawn(tiny_opt, sample, task, **how)
        for site in SITES:
            assert torch.equal(other[site].replicates.counts[:6], whole[site].replicates.counts)
            for name, value in whole[site].replicates.sums.items():
                got = other[site].replicates.sums[name][:6]
                assert torch.allclose(got, value, rtol=1e-3, atol=1e-5 * float(value.abs().max())), name


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:integrated gradients")
def test_parts_that_share_no_document_merge_to_the_whole(tiny_opt, sample, task, tmp_path):
    whole = drawn(tiny_opt, sample, task, batch_size=1)
    rows = {part: [i for i, cluster in enumerate(sample.clusters) if cluster % 3 == part] for part in range(3)}
    a, b, c = (drawn(tiny_opt, sample.take(rows[part]), task, batch_size=1) for part in (2, 0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = (a.merge(b).merge(c), c.merge(a.merge(b)))
    for merged in both:
        for site in SITES:
            assert merged[site].replicates.clusters == whole[site].replicates.clusters == len(set(sample.clusters))
            for b in range(6):
                for name in OF_SUMS:
                    got, want = (getattr(s[site].replicate(b), name) for s in (merged, whole))
                    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    whole.save(tmp_path / "s.safetensors")
    read = sepcap.Statistics.load(tmp_path / "s.safetensors")
    for site in SITES:
        assert all(torch.equal(read[site].replicates.sums[name], v) for name, v in whole[site].replicates.sums.items())
        assert torch.equal(read[site].replicates.counts, whole[site].replicates.counts)
        assert read[site].replicates.documents == whole[site].replicates.documents
        assert "6 replicates" in repr(read[site])


def test_parts_that_share_documents_say_so_only_where_it_matters(tiny_opt, task):
    how = {"gradients": (), "many": 3}
    apart = sample_task(tiny_opt, sepcap.load_task(words(1, n=20)), "collect", 200, CONTEXT)
    long = sepcap.load_task(words(1, n=20))
    one = drawn(tiny_opt, apart, long, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twice = one.merge(drawn(tiny_opt, apart, long, **how))  # a document has the same weight in both
    for b in range(3):
        torch.testing.assert_close(twice["mlp"].replicate(b).abs, one["mlp"].replicate(b).abs)
    mixed = sample_task(tiny_opt, task, "collect", 400, CONTEXT)
    named = Draws.of(task, mixed, 3)
    first = next(iter(named.documents))
    other = Draws(named.weights, {**named.documents, first: "0" * 16})  # the first document stands in a row with others there
    with pytest.warns(UserWarning, match="1 document is in both statistics, but with other documents in its rows"):
        drawn(tiny_opt, mixed, task, **how).merge(collect_sample(tiny_opt, mixed, SITES, draws=other))
    with pytest.warns(UserWarning, match=r"documents are in both.*too narrow"):
        one.merge(drawn(tiny_opt, apart, long, seed=1, **how))


def test_weights_are_poisson_and_independent():
    keys = [hashlib.sha256(str(i).encode()).hexdigest()[:16] for i in range(300)]
    weights = np.stack([poisson_weights(key, 400) for key in keys])
    n = weights.size
    for k in range(5):  # 5 standard errors
        p = math.exp(-1) / math.factorial(k)
        assert abs((weights == k).mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    for table in (weights, weights.T):
        correlation = np.corrcoef(table)[np.triu_indices(len(table), 1)]
        assert abs(correlation.mean()) < 5 / math.sqrt(len(correlation) * table.shape[1])
        assert correlation.std() == pytest.approx(1 / math.sqrt(table.shape[1]), rel=0.05)
    assert poisson_weights(keys[0], 50).tolist() == by_hand(keys[0], 50)


def test_another_seed_draws_others(tiny_opt, sample, task):
    one, other = (Draws.of(task, sample, 50, seed).weights for seed in (0, 1))
    assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.2


def test_memory_is_said_first(tiny_opt, sample, task, caplog):
    caplog.set_level("INFO", logger="sepcap")
    stats = drawn(tiny_opt, sample, task, many=100, gradients=("atp",))
    neurons = sum(stats[site].low.numel() for site in SITES)
    size = 8 * 100 * neurons * (len(ACTIVATIONS) + 4) / 1e6
    assert f"100 replicates over {len(set(sample.clusters))} documents: {size:,.0f} MB" in caplog.text


def test_what_is_wrong_is_said(tiny_opt, sample, task):
    with_them, without = drawn(tiny_opt, sample, task, many=2, gradients=()), collect_sample(tiny_opt, sample, SITES)
    with pytest.raises(ValueError, match=r"collect\(..., replicates=100\)"):
        without["mlp"].replicate(0)
    with pytest.raises(ValueError, match="with and without replicates"):
        with_them.merge(without)
    with pytest.raises(ValueError, match="3 replicates into those with 2"):
        with_them.merge(drawn(tiny_opt, sample, task, many=3, gradients=()))
    with pytest.raises(IndexError, match="0 to 1"):
        with_them["mlp"].replicate(2)
    with pytest.raises(ValueError, match="replicates=-1"):
        sepcap.collect(tiny_opt, words(0), tokens=60, replicates=-1)
