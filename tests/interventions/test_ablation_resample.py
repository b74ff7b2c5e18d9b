"""Resample ablation against two passes of the plain Hugging Face model, and donors that are known."""

import numpy as np
import pytest
import torch
from hooked import FRACTIONS, at_hook
from plain import Plain, token_ids

import sepcap
from sepcap.interventions.resample import CHARACTERS, get_draw
from sepcap.models.sites import SITES


def clean(plain, ids):
    """(site, layer) -> activations of the plain model."""
    seen = {}
    plain.run(ids, look=lambda site, layer, z: seen.__setitem__((site, layer), z.clone()))
    return seen


def swapped(plain, ids, donors, neurons, shift=0):
    """Logits of the plain model when the neurons take what `donors` has at the same row and position (or `shift` before)."""

    def put(site, layer, z):
        mask = neurons.masks[site][layer]
        z[..., mask] = donors[site, layer].roll(shift, dims=1)[..., mask]

    return plain.run(ids, look=put)


def test_two_rows_swap(tiny, tiny_folders, family):
    plain, ids, neurons = Plain(family, tiny_folders[family]), token_ids(batch=2), sepcap.NeuronSet.random(tiny, FRACTIONS)
    donors = {place: z.flip(0) for place, z in clean(plain, ids).items()}
    expected = swapped(plain, ids, donors, neurons)
    ablation = sepcap.ablate(tiny, neurons, "resample")
    with torch.no_grad(), ablation:
        inside = tiny(ids)
    with torch.no_grad():
        hooked = tiny.run_with_hooks(ids, fwd_hooks=ablation.fwd_hooks)
    torch.testing.assert_close(inside, expected, atol=1e-4, rtol=0)
    assert torch.equal(hooked, inside)
    assert (expected - plain.run(ids)).abs().max() > 0.05
    assert (expected - swapped(plain, ids, donors, neurons, shift=1)).abs().max() > 0.05


@pytest.mark.parametrize("source", ["tokens", "characters", "texts"])
def test_donors_from_elsewhere(tiny, tiny_folders, family, source, letters):
    plain, ids, neurons = Plain(family, tiny_folders[family]), token_ids(), sepcap.NeuronSet.random(tiny, FRACTIONS)
    ids[:, 0] = 0
    source = letters if source == "texts" else source
    donors = np.stack(get_draw(tiny, source, 5)(list(ids.numpy()), 0, []))
    expected = swapped(plain, ids, clean(plain, torch.from_numpy(donors)), neurons)
    with torch.no_grad(), sepcap.ablate(tiny, neurons, "resample", source=source, seed=5):
        torch.testing.assert_close(tiny(ids), expected, atol=1e-4, rtol=0)
        again = tiny(ids)
    assert (again - expected).abs().max() > 0.05  # another pass, other donors
    with torch.no_grad(), sepcap.ablate(tiny, neurons, "resample", source=source, seed=6):
        assert (tiny(ids) - expected).abs().max() > 0.05


def test_donors_of_texts_that_spell_special_tokens_have_none(tiny_opt):
    texts = [f"<s>{i}</s>(?P<s>{i * i}<pad>" * 3 for i in range(40)]
    special, rows = tiny_opt.tokenizer.all_special_ids, [np.arange(10, 60)]
    (donor,) = get_draw(tiny_opt, texts, 1)(rows, 0, [])
    assert not np.isin(donor, special).any()
    (asked,) = get_draw(tiny_opt, sepcap.load_task(texts, special_tokens=True), 1)(rows, 0, [])
    assert np.isin(asked, special).any()


def test_what_the_donors_are(tiny_opt, letters):
    tokenizer = tiny_opt.tokenizer
    rows = [np.array([0, *range(10, 40), 0, *range(50, 90)]), np.array([0, 7])]
    draws = {str(source)[:6]: get_draw(tiny_opt, source, 1) for source in ("tokens", "characters")}
    for draw in (*draws.values(), get_draw(tiny_opt, letters, 1)):
        donors = draw(rows, 0, [])
        for row, donor in zip(rows, donors, strict=True):
            assert ((donor == 0) == (row == 0)).all()  # BOS stays where it is, and comes nowhere else
            assert not np.isin(donor[row != 0], tokenizer.all_special_ids).any()
        assert np.mean(donors[0] == rows[0]) < 0.2
        # a longer row begins with the same donor, and a row's donor is the same whatever the batch
        longer = [np.concatenate([rows[0], np.arange(100, 300)])]
        assert (draw(longer, 0, [])[0][: len(rows[0])] == donors[0]).all()
        assert (draw([rows[0]], 1, [])[0] == draw([rows[1], rows[0]], 0, [])[1]).all()
    long = [np.arange(3, 303).repeat(10)]
    counts = np.bincount(draws["tokens"](long, 0, [])[0], minlength=320)
    known = len(tokenizer)
    assert (counts[3:known] > 0).all()  # uniform: none of 310 is missing in 3000 draws
    assert not counts[known:].any()
    text = tokenizer.decode(draws["charac"](long, 0, [])[0])
    assert set(text) == set(CHARACTERS)
    tiny_opt.tokenizer.add_special_tokens({"additional_special_tokens": ["e"]})
    assert not np.isin(get_draw(tiny_opt, "tokens", 1)(long, 0, [])[0], tokenizer.all_special_ids).any()


def test_texts_are_those_for_collecting(tiny_opt, letters):
    documents = sepcap.load_task(letters).sources[0].documents("collect")["text"]
    text = tiny_opt.tokenizer.decode(get_draw(tiny_opt, letters, 3)([np.arange(3, 203)], 0, [])[0])
    assert any(document.startswith(text[:50]) for document in documents)


def test_no_row_of_a_batch_is_its_own_donor(tiny_opt, tiny_folders):
    ids, neurons = token_ids(batch=6), sepcap.NeuronSet.random(tiny_opt, {"mlp": 0.3})
    free = clean(Plain("opt", tiny_folders["opt"]), ids)
    mask, found = neurons.masks["mlp"][0], set()
    for seed in range(4):
        with sepcap.ablate(tiny_opt, neurons, "resample", seed=seed):
            (z,) = at_hook(tiny_opt, "mlp", 0, lambda: tiny_opt(ids))
        distance = (z[:, None] - free["mlp", 0][None])[..., mask].abs().amax(dim=(2, 3))
        nearest, donors = distance.min(dim=1)
        assert nearest.max() < 1e-5
        assert sorted(donors.tolist()) == list(range(6))
        assert not bool((donors == torch.arange(6)).any())
        assert torch.allclose(z[..., ~mask], free["mlp", 0][..., ~mask], atol=1e-5)
        found.add(tuple(donors.tolist()))
    assert len(found) > 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("plain_hooks", [False, True])
def test_position_under_padding(tiny, side, plain_hooks):
    """The donor of position p is position p of the other text, not of the other row; beyond its end, 1, 2, … again."""
    texts = [token_ids(seed=1, batch=1, length=9)[0], token_ids(seed=2, batch=1, length=5)[0]]
    alone = {}
    for i, text in enumerate(texts):
        for site in SITES:
            (alone[i, site],) = at_hook(tiny, site, 0, lambda text=text: tiny(text[None]))
    short = torch.full((9,), 1)
    real = torch.arange(9) >= 4 if side == "left" else torch.arange(9) < 5
    short[real] = texts[1]
    ids, mask = torch.stack([texts[0], short]), torch.stack([torch.ones(9), real.long()]).long()
    wanted = {0: [0, 1, 2, 3, 4, 1, 2, 3, 4], 1: [0, 1, 2, 3, 4]}  # positions in the other text
    for site in SITES:
        neurons = sepcap.NeuronSet.random(tiny, {site: 0.5})
        chosen = neurons.masks[site][0]
        ablation = sepcap.ablate(tiny, neurons, "resample")
        if plain_hooks:
            with tiny.hooks(fwd_hooks=ablation.fwd_hooks):
                (z,) = at_hook(tiny, site, 0, lambda: tiny(ids, attention_mask=mask))
        else:
            with ablation:
                (z,) = at_hook(tiny, site, 0, lambda: tiny(ids, attention_mask=mask))
        for i in range(2):
            expected = alone[1 - i, site][0, wanted[i]]
            torch.testing.assert_close(z[i][mask[i].bool()][..., chosen], expected[..., chosen], atol=1e-4, rtol=0)


def test_the_attention_mask_is_what_counts(tiny_opt):
    """A mask that no token gives away: padding with ordinary tokens."""
    ids, mask = token_ids(batch=2, length=8), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    neurons = sepcap.NeuronSet.random(tiny_opt, {"mlp": 1.0})
    (free,) = at_hook(tiny_opt, "mlp", 0, lambda: tiny_opt(ids[1:]))
    with sepcap.ablate(tiny_opt, neurons, "resample"):
        (z,) = at_hook(tiny_opt, "mlp", 0, lambda: tiny_opt(ids, attention_mask=mask))
    torch.testing.assert_close(z[0, 3:], free[0, :5], atol=1e-5, rtol=0)


def test_a_batch_of_one_takes_from_the_batch_before(tiny_opt):
    first, second = token_ids(seed=1, batch=1), token_ids(seed=2, batch=1)
    neurons = sepcap.NeuronSet.random(tiny_opt, {"mlp": 1.0})
    (free,) = at_hook(tiny_opt, "mlp", 0, lambda: tiny_opt(first))
    with sepcap.ablate(tiny_opt, neurons, "resample"), torch.no_grad():
        with pytest.raises(ValueError, match="a batch of one row has no other row"):
            tiny_opt(first)
        (z,) = at_hook(tiny_opt, "mlp", 0, lambda: tiny_opt(second))
    torch.testing.assert_close(z, free, atol=1e-5, rtol=0)


def test_evaluation_does_not_depend_on_the_batch_size(tiny_opt, letters, digits):
    neurons = sepcap.NeuronSet.random(tiny_opt, FRACTIONS)
    ablation = sepcap.ablate(tiny_opt, neurons, "resample", source=digits)
    with ablation:
        small = sepcap.evaluate(tiny_opt, letters, tokens=400, batch_size=3)
    with ablation:
        large = sepcap.evaluate(tiny_opt, letters, tokens=400, batch_size=16)
    np.testing.assert_allclose(small.per_row[:, -1], large.per_row[:, -1], rtol=1e-4)
    assert abs(small.loss - sepcap.evaluate(tiny_opt, letters, tokens=400).loss) > 1e-4


def test_collect_sees_the_donors(tiny_opt, letters):
    """With every neuron taken from digits, the statistics are those of the donors' own passes."""
    neurons = sepcap.NeuronSet.random(tiny_opt, {"mlp": 1.0, "attn_pre_out": 1.0})
    with sepcap.ablate(tiny_opt, neurons, "resample", source="tokens", seed=4):
        seen = sepcap.collect(tiny_opt, letters, tokens=310, batch_size=4)
    sample = sepcap.tasks.batches.sample_tokens(sepcap.load_task(letters), "collect", tiny_opt.tokenizer, 310, 32)
    donors = get_draw(tiny_opt, "tokens", 4)(list(sample.rows), 0, [])
    total = sum(at_hook(tiny_opt, "mlp", 1, lambda row=row: tiny_opt(torch.from_numpy(row)[None]))[0][0, 1:].sum(0) for row in donors)
    torch.testing.assert_close(seen["mlp"].sums["total"][1], total.double(), atol=1e-3, rtol=1e-4)
