"""What a masked language model is asked: the shares of METHODS 9, which tokens, and that nothing else changes them."""

import math
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from encoders import images, masking_tokenizer, save_masked, save_vit
from encoders import load as load_tiny

import sepcap
from sepcap.tasks.samples import MASKED_SHARE, MaskedSample, sample_masked, sample_task
from sepcap.tasks.task import Task

BEGIN, PAD, END = 0, 1, 2
CONTEXT = 32


@pytest.fixture(scope="module")
def tokenizer():
    return masking_tokenizer()


@pytest.fixture(scope="module")
def sample(letters, tokenizer):
    return sample_masked(sepcap.load_task(letters), "evaluate", tokenizer, 2000, CONTEXT)


def of_rows(rows, tokenizer):
    """A sample of rows that are given."""
    special = tuple(sorted(tokenizer.all_special_ids))
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), special)
    fields = {"special": special, "mask": tokenizer.mask_token_id, "padding": PAD, "ordinary": ordinary}
    n = sum(int((~np.isin(row, special)).sum()) for row in rows)
    return MaskedSample("given", "evaluate", tuple(rows), BEGIN, n, n, ([0],), "f", **fields)


def random_rows(n, length, tokenizer, seed=0):
    rng = np.random.default_rng(seed)
    ordinary = of_rows([], tokenizer).ordinary
    return [np.concatenate([[BEGIN], rng.choice(ordinary, length), [END]]) for _ in range(n)]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 10, 23, 30, 100])
def test_share_is_right_on_average_and_of_every_row_to_within_one_token(length, tokenizer):
    assert MASKED_SHARE == 0.15
    n = 2000
    sample = of_rows(random_rows(n, length, tokenizer), tokenizer)
    asked = [int(sample.hidden(row)[1].sum()) for row in sample.rows]
    whole, part = divmod(15 * length, 100)
    if length < 7:  # 15% is less than one, which is the least
        assert set(asked) == {1}
    elif part == 0:
        assert set(asked) == {whole}
    else:
        assert set(asked) == {whole, whole + 1}
        assert within(sum(asked) - n * whole, n, part / 100)


def test_a_seed_hides_others_of_the_same_tokens(letters, tokenizer):
    rows = random_rows(50, 20, tokenizer)
    first, second = (replace(of_rows(rows, tokenizer), seed=seed) for seed in (1, 2))
    for seeded in (first, second):
        assert any((seeded.hidden(row)[1] != of_rows(rows, tokenizer).hidden(row)[1]).any() for row in rows)
        assert sum(int(seeded.hidden(row)[1].sum()) for row in rows) == 150
    assert any((first.hidden(row)[1] != second.hidden(row)[1]).any() for row in rows)
    again = replace(of_rows(rows, tokenizer), seed=1)
    assert all((first.hidden(row)[0] == again.hidden(row)[0]).all() for row in rows)
    task = sepcap.load_task(letters)
    plain, seeded = (sample_masked(task, "evaluate", tokenizer, 200, CONTEXT, seed) for seed in (0, 3))
    assert (plain.seed, seeded.seed) == (0, 3)
    assert plain.fingerprint != seeded.fingerprint


def test_the_seed_reaches_evaluate_and_collect(tmp_path, letters):
    model = load_tiny(save_masked("roberta", tmp_path / "roberta"))
    one, same, other = (sepcap.evaluate(model, letters, tokens=200, seed=seed) for seed in (1, 1, 2))
    assert one.loss == same.loss != other.loss
    assert one.info["sample"] != other.info["sample"]
    one, same, other = (sepcap.collect(model, letters, tokens=200, seed=seed)["mlp"].mean for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_special_tokens_stand_between_documents_only_and_do_not_count(tokenizer):
    texts = [f"{special}{i}" for i in range(200) for special in ("<pad>", "</s>")]
    for tokens in (1, 50, 333):
        sample = sample_masked(sepcap.load_task(texts), "evaluate", tokenizer, tokens, CONTEXT)
        assert sample.tokens == tokens == sum(int((~np.isin(row, sample.special)).sum()) for row in sample.rows)
        assert sample.tokens == sum(batch.size for batch in sample.batches(4)) == sample.take(range(len(sample.rows))).tokens
    inside = np.concatenate([row[1:-1] for row in sample.rows])
    assert set(inside[np.isin(inside, sample.special)].tolist()) == {sample.rows[0][-1]}


def within(count, n, p):
    """Inside four standard deviations of a binomial: fails for one right program in 16,000."""
    return abs(count - n * p) <= 4 * math.sqrt(n * p * (1 - p))


def test_eighty_ten_ten_and_where(tokenizer):
    length = 20
    sample = of_rows(random_rows(4000, length, tokenizer), tokenizer)
    rows = np.stack(sample.rows)
    seen, asked = (np.stack(part) for part in zip(*map(sample.hidden, sample.rows), strict=True))
    n = int(asked.sum())
    assert n == 4000 * 3
    masked, same = (seen == sample.mask) & asked, (seen == rows) & asked
    chance = 1 / len(sample.ordinary)  # a random token is the right one now and then
    assert within(masked.sum(), n, 0.8)
    assert within(same.sum(), n, 0.1 + 0.1 * chance)
    assert within((asked & ~masked & ~same).sum(), n, 0.1 * (1 - chance))
    # every position of a row is asked for as often as another, and so is every place in the row masked
    for position in range(1, length + 1):
        assert within(asked[:, position].sum(), 4000, 0.15)
    # random tokens come from all ordinary ids alike, and no special one is among them
    drawn = seen[asked & ~masked & ~same]
    assert np.isin(drawn, sample.ordinary).all()
    parts = np.histogram(np.searchsorted(sample.ordinary, drawn), bins=4, range=(0, len(sample.ordinary)))[0]
    edges = np.linspace(0, len(sample.ordinary), 5)
    shares = np.diff([np.ceil(edge) for edge in edges]) / len(sample.ordinary)
    assert all(within(count, len(drawn), share) for count, share in zip(parts, shares, strict=True))


def test_what_is_not_asked_for_stays(sample):
    for row in sample.rows:
        seen, asked = sample.hidden(row)
        assert (seen[~asked] == row[~asked]).all()
        assert not np.isin(row[asked], sample.special).any()


def test_rows_are_opened_closed_and_divided(tokenizer):
    texts = ["abc def", "ghi", "xyz " * 30]

    class Fixed:
        fingerprint = "fixed"

        def documents(self, split):
            return datasets.Dataset.from_dict({"text": texts})

        def indices(self, split, n):
            return list(range(n))

    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    sample = sample_masked(Task("fixed", (Fixed(),)), "evaluate", tokenizer, 40, 16, per_document=None)
    stream = [i for document in ids for i in (*document, END)]
    assert all(row[0] == BEGIN and row[-1] == END and len(row) <= 16 for row in sample.rows)
    assert [len(row) for row in sample.rows[:-1]] == [16] * (len(sample.rows) - 1)
    text = [i for row in sample.rows for i in row[1:-1]]
    first_break = len(ids[0])
    assert text[: first_break + 1] == stream[: first_break + 1]  # an end token between the first document and the second
    ordinary = [i for i in text if i != END]
    assert ordinary == [i for i in stream if i != END][:40]
    assert sample.tokens == 40


def test_batches_and_budget_change_nothing(sample, letters, tokenizer):
    def asked_of(sample, size):
        found = []
        for batch in sample.batches(size):
            for i, row in enumerate(batch.inputs):
                length = int(batch.real[i].sum())
                found.append((row[:length].tolist(), batch.asked[i][:length].tolist(), batch.answers[i][:length].tolist()))
        return found

    whole = asked_of(sample, 16)
    assert asked_of(sample, 1) == asked_of(sample, 7) == whole
    assert asked_of(sample_masked(sepcap.load_task(letters), "evaluate", tokenizer, 2000, CONTEXT), 16) == whole
    less = asked_of(sample_masked(sepcap.load_task(letters), "evaluate", tokenizer, 800, CONTEXT), 16)
    assert 2 < len(less) < len(whole)
    assert less[:-1] == whole[: len(less) - 1]
    # rows of equal length are not all asked for the same places
    assert len({tuple(asked) for _, asked, _ in whole}) > len(whole) // 2


def test_batches_are_padded_and_masked(sample):
    rows = [sample.rows[0], np.append(sample.rows[1][:9], END), np.append(sample.rows[2][:17], END)]
    short = of_rows(rows, masking_tokenizer())
    (batch,) = short.batches(4)
    real = torch.arange(CONTEXT) < torch.tensor([[len(row)] for row in rows])
    assert torch.equal(batch.real, real)
    assert batch.mask is not None
    assert torch.equal(batch.mask, real)
    assert (batch.inputs[~real] == PAD).all()
    assert not batch.asked[~real].any()
    assert not batch.keep[~real].any()
    special = torch.isin(batch.answers, torch.tensor(short.special))
    assert torch.equal(batch.keep, real & ~special)
    assert not (batch.asked & ~batch.keep).any()
    assert batch.size == short.tokens == sum(len(row) - 2 - int((row[1:-1] == END).sum()) for row in rows)
    for i, row in enumerate(rows):
        assert batch.answers[i][: len(row)].tolist() == row.tolist()
    # without padding there is nothing to mask
    assert next(of_rows(rows[:1], masking_tokenizer()).batches(4)).mask is None
    answers = torch.cat([b.answers[b.asked] for b in short.batches(2)])
    assert short.targets().tolist() == answers.tolist()


def test_some_rows_of_a_sample(sample):
    some = sample.take([3, 1])
    assert isinstance(some, MaskedSample)
    assert [row.tolist() for row in some.rows] == [sample.rows[3].tolist(), sample.rows[1].tolist()]
    assert some.tokens == sum(batch.size for batch in some.batches(4))
    assert sample.take(range(len(sample.rows))).tokens == sample.tokens


def test_budget_is_kept_exactly(letters, tokenizer):
    for tokens in (1, 29, 30, 31, 333):
        sample = sample_masked(sepcap.load_task(letters), "evaluate", tokenizer, tokens, CONTEXT)
        assert sample.tokens == tokens == sum(batch.size for batch in sample.batches(4))


def test_parts_share_no_document(letters, tokenizer):
    parts = {split: sample_masked(sepcap.load_task(letters), split, tokenizer, 900, CONTEXT) for split in ("collect", "evaluate")}
    used = [set(sample.indices[0]) for sample in parts.values()]
    assert all(used)
    assert not used[0] & used[1]


def test_the_seed_orders_documents(letters, tokenizer):
    first, again, other = (sample_masked(sepcap.load_task(letters), "collect", tokenizer, 500, CONTEXT, seed) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_ends_of_the_tokenizer(letters):
    task = sepcap.load_task(letters)
    both = masking_tokenizer()
    both.cls_token, both.sep_token = both.convert_ids_to_tokens([40, 41])
    row = sample_masked(task, "evaluate", both, 100, CONTEXT).rows[0]
    assert (row[0], row[-1]) == (40, 41)  # what the model was trained with, not BOS and EOS
    assert sample_masked(task, "evaluate", masking_tokenizer("bert"), 100, CONTEXT).rows[0][0] == BEGIN
    neither = masking_tokenizer("bert")
    neither.cls_token = None
    for tokenizer in (neither, masking_tokenizer()):
        tokenizer.mask_token = None
        with pytest.raises(ValueError, match="no beginning, end or mask token"):
            sample_masked(task, "evaluate", tokenizer, 100, CONTEXT)
    with pytest.raises(ValueError, match="context=3: a row of a masked language model needs at least 4 tokens"):
        sample_masked(task, "evaluate", masking_tokenizer(), 100, 3)


def test_a_task_the_model_does_not_take(tmp_path, letters, tiny_opt):
    vit, roberta = load_tiny(save_vit(tmp_path / "vit")), load_tiny(save_masked("roberta", tmp_path / "roberta"))
    for function in (sepcap.evaluate, sepcap.collect, sepcap.compare_ablations):
        with pytest.raises(ValueError, match=r"made of text, but .* takes images"):
            function(vit, task=letters, tokens=10)
        for model in (roberta, tiny_opt):
            with pytest.raises(ValueError, match=r"made of images, but .* takes text"):
                function(model, task=images(), tokens=10)
    with pytest.raises(ValueError, match=r"made of images, but .* takes text"):
        sepcap.ablate(roberta, layer=0, head=0, kind="resample", source=images())
    assert sample_task(roberta, sepcap.load_task(letters), "evaluate", 50).tokens == 50
