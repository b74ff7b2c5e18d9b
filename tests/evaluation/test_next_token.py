"""Ranks, accuracies, losses and their errors against arithmetic by hand, a naive loop and Hugging Face's own loss."""

import math
import weakref
from collections import Counter
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch

import sepcap
from sepcap.evaluation.next_token import evaluate_sample, hits, most_frequent_targets, rank_and_loss
from sepcap.evaluation.result import COUNTS, METRICS, Evaluation, ratio
from sepcap.models.blocks import unembedding
from sepcap.tasks import batches
from sepcap.tasks.batches import TokenSample, sample_tokens


def sample_of(*rows, bos=0) -> TokenSample:
    arrays = tuple(np.array(row, dtype=np.int64) for row in rows)
    n = sum(int((row[1:] != bos).sum()) for row in arrays)
    return TokenSample("by hand", "evaluate", arrays, bos, n, n, ([0],), "f")


def test_rank_counts_the_logits_that_are_at_least_as_high():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [3.0, 1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 0.0], [5.0, 5.0, 5.0, 5.0], [0.0, 9.0, 0.0, 0.0]])
    ranks, _, losses = rank_and_loss(logits, torch.tensor([0, 3, 1, 2, 1]))
    # ties count against the model: three equal logits make rank 2, four make rank 3
    assert ranks.tolist() == [0, 3, 2, 3, 0]
    row = [3.0, 1.0, 2.0, 0.0]
    assert losses[0].item() == pytest.approx(math.log(sum(map(math.exp, row))) - 3, abs=1e-6)
    assert losses[3].item() == pytest.approx(math.log(4), abs=1e-6)


def test_logits_that_are_no_numbers_are_misses():
    nan, inf = math.nan, math.inf
    logits = torch.tensor([[nan, 0.0, 1.0], [5.0, nan, 1.0], [nan] * 3, [inf, 0.0, 1.0], [-inf, 2.0, 1.0], [0.0, 2.0, -inf]])
    ranks, _, losses = rank_and_loss(logits, torch.tensor([0, 0, 1, 0, 0, 1]))
    assert (ranks[:5] >= 10).all()  # among three classes everything is in the top ten, but what is no number
    assert ranks[5].item() == 0
    assert losses[5].item() == pytest.approx(math.log1p(math.exp(-2)), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rank_against_sorting(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 40, generator=generator).to(dtype)  # in bfloat16 with ties
    targets = torch.randint(40, (50,), generator=generator)
    ranks, tied, losses = rank_and_loss(logits, targets)
    for i, target in enumerate(targets.tolist()):
        row = logits[i].double().tolist()
        worst_place = sorted(row, reverse=True).index(row[target]) + Counter(row)[row[target]] - 1
        assert ranks[i].item() == worst_place
        assert tied[i].item() == (Counter(row)[row[target]] if dtype == torch.bfloat16 else 1)
        assert losses[i].item() == pytest.approx(math.log(sum(map(math.exp, row))) - row[target], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 2, 3, 10])
def test_half_precision_counts_a_tie_as_often_as_a_draw_would(dtype, k):
    """Against all orders of six classes: sorted by logit, tokens that tie in every order of theirs."""
    logits = torch.tensor([[2, 2, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [5, 4, 3, 2, 1, 0], [0, 0, 0, 3, 3, 3]], dtype=dtype)
    for target in range(6):
        ranks, tied, _ = rank_and_loss(logits, torch.full((4,), target))
        for row, share in zip(logits.tolist(), hits(ranks, tied, k).tolist(), strict=True):
            orders = [order for order in permutations(range(6)) if all(row[a] >= row[b] for a, b in pairwise(order))]
            assert share == pytest.approx(np.mean([target in order[:k] for order in orders]))


def test_logits_without_numbers_are_misses_in_half_precision_too():
    ranks, tied, _ = rank_and_loss(torch.full((2, 5), math.nan, dtype=torch.bfloat16), torch.tensor([0, 4]))
    assert hits(ranks, tied, 10).tolist() == [0, 0]


def naive(model, sample, skip) -> dict[str, float]:
    """Every prediction of every row alone, one after the other."""
    seen = {name: [] for name in ("loss", "top1", "top10", "skip50_top1", "skip50_top10")}
    for row in sample.rows:
        for i in range(1, len(row)):
            if row[i] == sample.bos:
                continue
            logits = model(torch.from_numpy(row[None, :i]))[0, -1].tolist()
            better = sum(1 for k, value in enumerate(logits) if value >= logits[row[i]] and k != row[i])
            seen["loss"].append(-math.log(math.exp(logits[row[i]]) / sum(map(math.exp, logits))))
            for k in (1, 10):
                seen[f"top{k}"].append(better < k)
                if row[i] not in skip:
                    seen[f"skip50_top{k}"].append(better < k)
    return {name: float(np.mean(values)) for name, values in seen.items()}


@torch.inference_mode()
def half_predictable(model, n_rows=14, length=24) -> TokenSample:
    """Rows in which every other token is among the model's own best five, so that there are hits and misses."""
    rng, rows = np.random.default_rng(0), []
    for i in range(n_rows):
        row = [0]
        while len(row) < length - i % 3:
            best = model(torch.tensor([row]))[0, -1].topk(5).indices.tolist()
            row.append(int(rng.choice(best[:1] * 2 + best)) if rng.random() < 0.5 else int(rng.integers(320)))
        rows.append(row)
    rows[0][5] = 0  # where one document ends and another begins
    return sample_of(*rows)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "family", ["opt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "mistral", "neox"))], indirect=True
)
def test_metrics_against_a_naive_loop(tiny):
    sample = half_predictable(tiny)
    result = evaluate_sample(tiny, sample, batch_size=5)
    tokens = [int(t) for row in sample.rows for t in row[1:] if t != sample.bos]
    assert result.n == len(tokens)
    # the most frequent targets, and of equally frequent ones the smaller id
    skip = sorted(Counter(tokens), key=lambda t: (-Counter(tokens)[t], t))[:50]
    assert list(result.skip_tokens) == skip
    expected = naive(tiny, sample, set(skip))
    assert 0.05 < expected["top1"] < expected["top10"] < 0.95
    assert expected["skip50_top1"] != expected["top1"]
    for metric, value in expected.items():
        np.testing.assert_allclose(result.value(metric), value, rtol=1e-4, err_msg=metric)
    assert result.perplexity == pytest.approx(math.exp(result.loss), rel=1e-12)
    named = [result.loss, result.top1, result.top10, result.skip50_top1, result.skip50_top10]
    assert named == [result.value(m) for m in ("loss", "top1", "top10", "skip50_top1", "skip50_top10")]


def test_skip50_leaves_out_the_frequent_targets(tiny_opt):
    # 60 ids: 50 of them twice, ten once; those ten are what is left
    ids = [*range(3, 53), *range(3, 53), *range(53, 63)]
    rows = [[0, *ids[i : i + 22]] for i in range(0, len(ids), 22)]
    result = evaluate_sample(tiny_opt, sample_of(*rows))
    assert result.skip_tokens == tuple(range(3, 53))
    assert result.per_row[:, COUNTS.index("n")].sum() == 110
    assert result.per_row[:, COUNTS.index("skip50_n")].sum() == 10
    # the first token of a row is never a target, nor is a BOS inside it
    assert most_frequent_targets(sample_of([7, 8, 8, 0, 9], bos=0)) == {8: 2, 9: 1}
    assert most_frequent_targets(sample_of([7, 8, 8, 0, 9], bos=None), k=1) == {8: 2}


def test_skip50_of_few_tokens_has_nothing_left(tiny_opt):
    result = evaluate_sample(tiny_opt, sample_of([0, 5, 6, 7]))
    assert math.isnan(result.skip50_top1)
    assert math.isnan(result.se("skip50_top1"))
    assert result.as_row()["n"] == 3
    assert "3" in result._repr_html_()


def test_loss_is_that_of_hugging_face(tiny_folders, family, letters):
    from transformers import AutoModelForCausalLM

    model = sepcap.load_model(tiny_folders[family], device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(tiny_folders[family]).eval()
    sample = sample_tokens(sepcap.load_task(letters), "evaluate", model.tokenizer, 400, 32)
    total, n = 0.0, 0
    for row in sample.rows:
        ids = torch.from_numpy(row)[None]
        labels = ids.masked_fill(ids == sample.bos, -100)
        targets = int((labels[0, 1:] != -100).sum())
        with torch.no_grad():
            total += float(plain(input_ids=ids, labels=labels).loss) * targets
        n += targets
    result = evaluate_sample(model, sample, batch_size=7)
    assert result.n == n
    assert result.loss == pytest.approx(total / n, rel=1e-5)


def test_perplexity_is_exp_of_the_mean_loss_and_not_the_mean_of_exp():
    per_row = np.zeros((2, len(COUNTS)))
    per_row[:, COUNTS.index("n")] = 1
    per_row[:, COUNTS.index("loss")] = [0, 2]
    result = Evaluation("t", per_row, (), {})
    assert result.perplexity == pytest.approx(math.e)
    assert result.perplexity != pytest.approx((1 + math.exp(2)) / 2)
    per_row[:, COUNTS.index("loss")] = 1e4
    assert result.perplexity == math.inf


def test_standard_error_of_perplexity_is_its_spread_over_resampled_rows():
    rng = np.random.default_rng(0)
    per_row = rows_of(rng)
    result = Evaluation("t", per_row, (), {})
    spread = np.exp(ratio(per_row[rng.integers(0, len(per_row), (4000, len(per_row)))], "loss")).std(ddof=1)
    assert result.perplexity_se == pytest.approx(spread, rel=0.15)
    row = result.as_row()
    assert row["perplexity_se"] == result.perplexity_se == pytest.approx(math.exp(result.loss) * result.se("loss"))
    assert {f"{name}_se" for name in (*METRICS, "perplexity")} < set(row)


def rows_of(rng, n_rows=200) -> np.ndarray:
    """Rows of unequal lengths whose tokens share the luck of their row."""
    per_row = np.zeros((n_rows, len(COUNTS)))
    per_row[:, 0] = rng.integers(5, 60, n_rows)
    for name in ("top1", "top10", "skip50_top1", "skip50_top10"):
        per_row[:, COUNTS.index(name)] = rng.binomial(per_row[:, 0].astype(int), rng.beta(2, 3, n_rows))
    per_row[:, COUNTS.index("skip50_n")] = per_row[:, 0]
    per_row[:, COUNTS.index("loss")] = per_row[:, 0] * rng.gamma(2, 1, n_rows)
    return per_row


@pytest.mark.parametrize("metric", METRICS)
def test_standard_error_is_the_spread_over_resampled_rows(metric):
    rng = np.random.default_rng(0)
    per_row = rows_of(rng)
    result = Evaluation("t", per_row, (), {})
    draws = rng.integers(0, len(per_row), (4000, len(per_row)))
    spread = ratio(per_row[draws], metric).std(ddof=1)
    assert result.se(metric) == pytest.approx(spread, rel=0.1)
    # tokens of a row depend on each other: the error of independent tokens would be far too small
    if metric == "top1":
        independent = math.sqrt(result.top1 * (1 - result.top1) / result.n)
        assert result.se("top1") > 1.5 * independent


def test_standard_error_of_rows_of_one_token_is_the_textbook_one():
    hits = np.array([1, 0, 0, 1, 1, 0, 1.0])
    per_row = np.zeros((7, len(COUNTS)))
    per_row[:, 0], per_row[:, 1] = 1, hits
    result = Evaluation("t", per_row, (), {})
    assert result.se("top1") == pytest.approx(hits.std(ddof=1) / math.sqrt(7))
    assert math.isnan(Evaluation("t", per_row[:1], (), {}).se("top1"))
    with pytest.raises(ValueError, match=r"metric='top_1' is not known. Did you mean 'top1'"):
        result.value("top_1")


def test_batches_and_halving_do_not_change_the_result(tiny_opt, letters, monkeypatch):
    sample = sample_tokens(sepcap.load_task(letters), "evaluate", tiny_opt.tokenizer, 500, 32)
    of_two = evaluate_sample(tiny_opt, sample, batch_size=2)
    of_many = evaluate_sample(tiny_opt, sample, batch_size=16)
    n = COUNTS.index("n")
    np.testing.assert_array_equal(of_many.per_row[:, n], of_two.per_row[:, n])
    # logits that rounding tells apart may change places in other shapes: one hit in a hundred would be too many
    assert np.abs(of_many.per_row[:, :-1] - of_two.per_row[:, :-1]).sum() <= 5
    np.testing.assert_allclose(of_many.per_row[:, -1], of_two.per_row[:, -1], rtol=1e-5)

    sizes, original = [], unembedding.logits_of

    def small_memory(model, ids, mask):
        sizes.append(len(ids))
        if len(sizes) > 1 and len(ids) > 2:  # one batch fits, then no more
            raise torch.OutOfMemoryError("no memory left")
        return original(model, ids, mask)

    monkeypatch.setattr(unembedding, "logits_of", small_memory)
    with pytest.warns(UserWarning, match="batch_size=2"):
        halved = evaluate_sample(tiny_opt, sample, batch_size=8)
    assert sizes[:3] == [8, 8, 4]
    assert sum(sizes[3:]) == len(sample.rows)
    assert max(sizes[3:]) == 2
    np.testing.assert_array_equal(halved.per_row, of_two.per_row)  # begun again from the first row: none counts twice
    monkeypatch.setattr(unembedding, "logits_of", lambda *a: (_ for _ in ()).throw(RuntimeError("another fault")))
    with pytest.raises(RuntimeError, match="another fault"):
        evaluate_sample(tiny_opt, sample, batch_size=8)


def test_one_batch_of_logits_at_a_time(tiny_opt, letters, monkeypatch):
    sample = sample_tokens(sepcap.load_task(letters), "evaluate", tiny_opt.tokenizer, 500, 32)
    alive, most, original = weakref.WeakSet(), [], unembedding.logits_of

    def watched(model, ids, mask):
        most.append(len(alive))
        logits = original(model, ids, mask)
        alive.add(logits)
        return logits

    monkeypatch.setattr(unembedding, "logits_of", watched)
    evaluate_sample(tiny_opt, sample, batch_size=2)
    assert len(most) > 5
    assert max(most) == 0  # the logits of a batch are gone before those of the next are computed


def test_padding_and_bos_are_no_targets(tiny_opt):
    long, short = [0, 5, 6, 0, 7, 8], [0, 9, 10]
    together = evaluate_sample(tiny_opt, sample_of(long, short), batch_size=2)
    assert together.per_row[:, 0].tolist() == [4, 2]
    alone = evaluate_sample(tiny_opt, sample_of(short))
    np.testing.assert_allclose(together.per_row[1, -1], alone.per_row[0, -1], rtol=1e-5)


def test_without_bos_the_first_token_of_a_row_is_no_target(tiny_opt, letters, monkeypatch):
    monkeypatch.setattr(batches, "separator_of", lambda tokenizer: None)
    result = sepcap.evaluate(tiny_opt, letters, tokens=333, context=16)
    assert result.n == 333  # the budget is a number of predictions
    assert result.info["tokens"] == 333


def test_evaluation_reads_the_evaluation_part(tiny_opt, letters):
    result = sepcap.evaluate(tiny_opt, letters, tokens=400)
    statistics = sepcap.collect(tiny_opt, letters, tokens=400, sites="mlp")
    evaluated, collected = set(result.info["documents"][0]), set(statistics.info["documents"][0])
    assert evaluated
    assert collected
    assert not evaluated & collected
    assert result.info["sample"] != statistics.info["sample"]
    assert "n=400" in repr(result)


def test_a_paired_difference_cancels_what_the_rows_share(tmp_path):
    rng = np.random.default_rng(1)
    hard = rng.integers(10, 90, size=40).astype(float)  # rows differ much in difficulty

    def evaluation(hits, sample="s"):
        rows = np.zeros((40, len(COUNTS)))
        rows[:, COUNTS.index("n")] = 100
        rows[:, COUNTS.index("top1")] = hits
        return Evaluation("t", rows, (), {"sample": sample})

    before, after = evaluation(hard), evaluation(hard - 5)
    change, (low, high) = after.difference(before)
    assert change == pytest.approx(-0.05)
    # every row lost exactly five hits of a hundred: resampling rows cannot change the difference
    assert (low, high) == pytest.approx((-0.05, -0.05))
    assert before.se("top1") > 0.02
    with pytest.raises(ValueError, match="other tokens"):
        after.difference(evaluation(hard, sample="other"))
    after.save(tmp_path / "e.safetensors")
    loaded = Evaluation.load(tmp_path / "e.safetensors")
    assert loaded.top1 == after.top1
    assert loaded.info == after.info
