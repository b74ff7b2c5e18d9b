"""Statistics by hand, on a model of three neurons, and the laws of merging (METHODS 3)."""

import math
from dataclasses import dataclass
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

import sepcap
from sepcap.errors import CorruptFile
from sepcap.statistics.accumulate import CHUNK, Accumulator, gather
from sepcap.statistics.moments import SUMS, NeuronStatistics, Statistics
from sepcap.storage import load_tensors, save_tensors
from sepcap.tasks.batches import sample_tokens

WORDS = ("<s>", "<pad>", "</s>", "<unk>", "a", "b", "c")
WIDTH = 16

# What each neuron gives at each word; the pre-activation of the second one at c is −3
NEURONS = torch.tensor([[1.0, 4.0, 0.0], [2.0, 2.0, 0.0], [5.0, 5.0, 5.0]])  # [neuron, (a, b, c)]
BEFORE_RELU = torch.tensor([[1.0, 4.0, -1.0], [2.0, 2.0, -3.0], [5.0, 5.0, 5.0]])
AT_BOS = 100.0
# What the value vector of two heads of two dimensions is at each word
VALUES = torch.tensor([[[1.0, -2.0, 3.0], [0.0, 0.0, 0.0]], [[-1.0, -1.0, -1.0], [4.0, 0.0, -4.0]]])  # [head, d_head, (a, b, c)]


@dataclass
class Documents:
    """A source that gives the same documents to every split."""

    texts: list[str]
    fingerprint: str = "by hand"

    def documents(self, split: str) -> Any:
        return datasets.Dataset.from_dict({"text": self.texts})

    def indices(self, split: str, n: int) -> list[int]:
        return list(range(n))


def task(*texts: str) -> sepcap.Task:
    return sepcap.Task("by hand", (Documents(list(texts)),))


@pytest.fixture(scope="module")
def by_hand():
    """An OPT of one layer with three neurons and two heads, whose activations are the tables above."""
    config = OPTConfig(
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=3,
        num_hidden_layers=1,
        num_attention_heads=8,
        max_position_embeddings=8,
        vocab_size=len(WORDS),
    )
    hf: Any = OPTForCausalLM(config)
    layer = hf.model.decoder.layers[0]
    # x = [u, −u] with u the one-hot of the word: mean 0, |x|² = 2, so that LayerNorm is a known factor
    gain = 1 / math.sqrt(2 / WIDTH + 1e-5)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "layer_norm" not in name:
                parameter.zero_()
        embedding = hf.model.decoder.embed_tokens.weight
        for token in range(len(WORDS)):
            embedding[token, token], embedding[token, WIDTH // 2 + token] = 1, -1
        layer.fc1.weight[:, 4:7] = BEFORE_RELU / gain
        layer.fc1.weight[:, :2] = AT_BOS / gain  # at BOS, with which rows are padded, and at the pad token
        layer.self_attn.v_proj.weight[:4, 4:7] = VALUES.reshape(4, 3) / gain
        layer.self_attn.v_proj.weight[:4, :2] = AT_BOS / gain
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    return sepcap.load_model(hf, tokenizer=tokenizer, device="cpu")


def close(got: torch.Tensor, want: list) -> None:
    torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64).reshape(got.shape), rtol=1e-5, atol=1e-6)


# By hand


def test_every_number_of_the_mlp_statistics(by_hand):
    # rows of 4: <s> a a b | <s> c <s> a
    s = sepcap.collect(by_hand, task("a a b c", "a"), tokens=5, context=4, per_document=None, sites="mlp")["mlp"]
    # five positions: a ×3, b ×1, c ×1. First neuron: 1 1 1 4 0; second: 2 2 2 2 0; third: always 5
    assert s.count == 5
    assert s.shape == (1, 3)
    close(s.mean, [7 / 5, 8 / 5, 5])
    close(s.abs, [7 / 5, 8 / 5, 5])
    close(s.sqrt, [(3 * 1 + 2) / 5, 4 * math.sqrt(2) / 5, math.sqrt(5)])
    close(s.rms, [math.sqrt((3 + 16) / 5), math.sqrt(16 / 5), 5])
    # variances: 19/5 − (7/5)² = 46/25, 16/5 − (8/5)² = 16/25, 0
    close(s.std[:, :2], [math.sqrt(46) / 5, 4 / 5])
    assert float(s.std[0, 2]) < 0.01
    close(s.freq, [4 / 5, 4 / 5, 1])
    close(s.min, [0, 0, 5])
    close(s.max, [4, 2, 5])


def test_every_number_of_the_value_statistics(by_hand):
    s = sepcap.collect(by_hand, task("a a b c", "a"), tokens=5, context=4, per_document=None, sites="attn_value")["attn_value"]
    # a ×3, b, c. First neuron: 1 1 1 −2 3; second 0; third −1; fourth 4 4 4 0 −4. The other six heads are idle
    assert s.shape == (1, 8, 2)
    assert not bool(torch.stack([s.sums[name][:, 2:] for name in SUMS]).any())
    four = lambda x: x[0, :2].flatten()  # noqa: E731
    close(four(s.mean), [4 / 5, 0, -1, 8 / 5])
    close(four(s.abs), [8 / 5, 0, 1, 16 / 5])
    close(four(s.sqrt), [(3 + math.sqrt(2) + math.sqrt(3)) / 5, 0, 1, 8 / 5])
    close(four(s.rms), [4 / math.sqrt(5), 0, 1, 8 / math.sqrt(5)])
    close(four(s.std)[[0, 1, 3]], [8 / 5, 0, 16 / 5])  # 16/5 − (4/5)² = 64/25; 64/5 − (8/5)² = 256/25
    close(four(s.min), [-2, 0, -1, -4])
    close(four(s.max), [3, 0, -1, 4])
    assert four(s.sums["positive"]).tolist() == [4, 0, 0, 3]


def test_pre_out_statistics_average_the_values_seen_so_far(by_hand):
    """Without queries and keys attention is uniform: z at position i is the mean of the values at positions 0 to i."""
    s = sepcap.collect(by_hand, task("a b c"), tokens=3, context=4, sites="attn_pre_out")["attn_pre_out"]
    # first neuron, values 100 (BOS), 1, −2, 3: z = 101/2, 99/3, 102/4; BOS itself does not count but is attended to
    z = [101 / 2, 99 / 3, 102 / 4]
    assert s.count == 3
    close(s.mean[0, 0, :1], [sum(z) / 3])
    close(s.min[0, 0, :1], [102 / 4])
    close(s.max[0, 0, :1], [101 / 2])
    close(s.rms[0, 0, :1], [math.sqrt(sum(v * v for v in z) / 3)])


def test_bos_and_padding_never_count(by_hand):
    # <s> a b c <s> a b c | <s> c: the BOS between documents does not count either, and six places of the second row are padding
    documents = task("a b c", "a b c", "c")
    s = sepcap.collect(by_hand, documents, tokens=7, context=8, sites="mlp", batch_size=2)["mlp"]
    assert s.count == 7
    assert float(s.max[0, 0]) == pytest.approx(4, rel=1e-5)
    close(s.sums["total"], [2 * 1 + 2 * 4, 2 * 2 + 2 * 2, 7 * 5])
    alone = sepcap.collect(by_hand, documents, tokens=7, context=8, sites="mlp", batch_size=1)["mlp"]
    close(alone.sums["total"], [10, 8, 35])
    with_bos = sepcap.collect(by_hand, documents, tokens=7, context=8, sites="mlp", batch_size=2, include_bos=True)["mlp"]
    assert with_bos.count == 7 + 3
    close(with_bos.sums["total"], [10 + 300, 8 + 300, 35 + 300])
    assert float(with_bos.max[0, 0]) == pytest.approx(AT_BOS, rel=1e-5)


def test_a_budget_ends_in_the_middle_of_a_row(by_hand):
    s = sepcap.collect(by_hand, task("a b b b b b b"), tokens=7, context=8, sites="mlp")["mlp"]
    less = sepcap.collect(by_hand, task("a b b b b b b", "c c c c c c c"), tokens=9, context=8, sites="mlp")["mlp"]
    assert (s.count, less.count) == (7, 9)
    close(s.sums["total"][0, :1], [1 + 6 * 4])
    close(less.sums["total"][0], [25, 14, 45])  # two c more: 0, 0 and 5 each


def test_the_second_layer_is_not_the_first(tiny_opt, letters):
    """Each layer's numbers are those of its own hook, against activations taken one by one."""
    statistics = sepcap.collect(tiny_opt, letters, tokens=200, context=16)
    (batch,) = sample_tokens(sepcap.load_task(letters), "collect", tiny_opt.tokenizer, 200, 16).batches(1000)
    with torch.no_grad():
        _, cache = tiny_opt.run_with_cache(batch.inputs)
    for layer in range(2):
        for site, hook in (("mlp", "mlp.hook_post"), ("attn_pre_out", "attn.hook_z")):
            z = cache[f"blocks.{layer}.{hook}"][batch.keep].double()
            s = statistics[site]
            assert s.count == len(z) == 200
            torch.testing.assert_close(s.mean[layer], z.mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(s.abs[layer], z.abs().mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(s.std[layer], z.std(0, correction=0), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(s.max[layer].double(), z.amax(0), rtol=1e-4, atol=1e-5)


# Merging


def accumulate(z: torch.Tensor, keep: torch.Tensor) -> NeuronStatistics:
    """Statistics of activations [batch, pos, neuron] as a hook would make them."""
    accumulator = Accumulator(tuple(z.shape[2:]), z.device)
    accumulator.update(z, keep)
    return gather("mlp", [accumulator])


def every_position(z: torch.Tensor) -> torch.Tensor:
    return torch.ones(z.shape[:2], dtype=torch.bool)


@st.composite
def shards(draw):
    """Activations, which positions count, and a way to cut the rows into shards that are merged in some order."""
    rows, positions, neurons = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    numbers = st.floats(-1e4, 1e4, allow_subnormal=False)
    flat = draw(st.lists(numbers, min_size=rows * positions * neurons, max_size=rows * positions * neurons))
    kept = draw(st.lists(st.booleans(), min_size=rows * positions, max_size=rows * positions))
    shard_of = draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows))
    order = draw(st.permutations(sorted(set(shard_of))))
    z = torch.tensor(flat, dtype=torch.float64).view(rows, positions, neurons)
    return z, torch.tensor(kept).view(rows, positions), torch.tensor(shard_of), order


def assert_same(one: NeuronStatistics, other: NeuronStatistics, relative: float) -> None:
    assert one.count == other.count
    assert torch.equal(one.sums["positive"], other.sums["positive"])
    for name in ("absolute", "root"):
        torch.testing.assert_close(one.sums[name], other.sums[name], rtol=relative, atol=0)
    # a constant neuron has no deviation but the rounding of its mean
    rounding = 1e-14 * other.sums["absolute"].square() / max(1, other.count)
    deviation = other.sums["deviation"]
    assert bool(((one.sums["deviation"] - deviation).abs() <= relative * deviation + rounding).all())
    # Σz may cancel: its error is measured against Σ|z|
    assert bool(((one.sums["total"] - other.sums["total"]).abs() <= relative * one.sums["absolute"]).all())
    assert torch.equal(one.low, other.low)
    assert torch.equal(one.high, other.high)


@settings(max_examples=60, deadline=None)
@given(shards())
def test_shards_merged_in_any_order_equal_one_pass(case):
    z, keep, shard_of, order = case
    parts = [accumulate(z[shard_of == shard], keep[shard_of == shard]) for shard in order]
    whole = accumulate(z, keep)
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert_same(merged, whole, 1e-9)
    # from the other end, and bracketed the other way
    backwards = parts[-1]
    for part in reversed(parts[:-1]):
        backwards = part.merge(backwards)
    assert_same(backwards, whole, 1e-9)
    # and the one pass is right: plain sums over the kept positions
    kept = z[keep]
    assert whole.count == len(kept)
    assert torch.equal(whole.sums["positive"][0], (kept > 0).sum(0).double())
    about_the_mean = (kept - kept.mean(0)).square().sum(0) if len(kept) else torch.zeros(z.shape[2], dtype=z.dtype)
    torch.testing.assert_close(whole.sums["deviation"][0], about_the_mean, rtol=1e-9, atol=1e-14 * float(kept.abs().sum()) ** 2)
    torch.testing.assert_close(whole.sums["root"][0], kept.abs().sqrt().sum(0), rtol=1e-9, atol=0)


def test_batches_one_by_one_equal_all_at_once():
    z = torch.randn(9, 7, 4, dtype=torch.float64)
    keep = torch.rand(9, 7) > 0.3
    accumulator = Accumulator((4,), z.device)
    for row, kept in zip(z, keep, strict=True):
        accumulator.update(row[None], kept[None])
    assert_same(gather("mlp", [accumulator]), accumulate(z, keep), 1e-12)


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_float32_sums_keep_the_documented_bound(scale):
    """Blocks of at most 256 positions are added in float32: n·2⁻²⁴ of the sum, plus one rounding of every term, however long the data."""
    generator = torch.Generator().manual_seed(0)
    # sizes over many orders of magnitude (scale 3) are the hard case for float32 addition
    z = torch.randn(50, 300, 5, generator=generator) * torch.exp(scale * torch.randn(50, 300, 5, generator=generator))
    s, exact = accumulate(z, every_position(z)), accumulate(z.double(), every_position(z))
    bound = (CHUNK + 2) * 2.0**-24
    assert bound < 1.6e-5
    assert_same(NeuronStatistics("mlp", s.count, s.sums, s.low.double(), s.high.double()), exact, bound)
    assert all(total.dtype == torch.float64 for total in s.sums.values())


def test_float32_shards_cut_between_rows_merge_to_the_same_sums():
    z = torch.randn(8, 300, 5) * torch.exp(3 * torch.randn(8, 300, 5))
    whole = accumulate(z, every_position(z))
    halves = [accumulate(part, every_position(part)) for part in (z[:3], z[3:])]
    # blocks are the same, and added in float64: only the order of those additions differs
    assert_same(halves[1].merge(halves[0]), whole, 1e-13)


def test_bfloat16_activations_are_added_with_their_full_value():
    # 257 and its like have no bfloat16: adding up in the model's dtype would stand still at 256
    z = torch.ones(4, 300, 1, dtype=torch.bfloat16)
    s = accumulate(z, every_position(z))
    assert s.count == 1200
    assert {name: float(total) for name, total in s.sums.items()} == {**dict.fromkeys(SUMS, 1200.0), "deviation": 0.0}
    odd = torch.randn(4, 300, 3).to(torch.bfloat16)
    exact = accumulate(odd.double(), every_position(odd))
    torch.testing.assert_close(accumulate(odd, every_position(odd)).std, exact.std, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_std_of_a_constant_neuron(dtype):
    """Zero up to the rounding of a difference from the mean, never NaN."""
    z = torch.tensor([0.0, 0.1, -7.3, 1e4], dtype=dtype).expand(5, 333, 4)
    std = accumulate(z, every_position(z)).std[0]
    assert bool(std.isfinite().all())
    assert float(std[0]) == 0
    assert bool((std <= 1e-7 * z[0, 0].double().abs()).all())


@pytest.mark.parametrize(
    ("mean", "spread", "dtype"),
    [(1e3, 1, torch.float32), (1e4, 1, torch.float32), (1e6, 1, torch.float32), (1e6, 1e-3, torch.float64), (300, 2, torch.bfloat16)],
)
def test_std_keeps_its_digits_at_any_mean(mean, spread, dtype):
    """Against NumPy's two passes in float64 over the same numbers; in one pass and merged from shards of unequal size and mean."""
    generator = torch.Generator().manual_seed(0)
    z = (mean + spread * torch.randn(6, 700, 3, generator=generator, dtype=torch.float64)).to(dtype)
    z[0, 0] = 0  # one value far from all others must not become what the rest is measured from
    z[4:] += 3 * spread
    exact = torch.from_numpy(z.double().flatten(0, 1).numpy().std(0))
    parts = [accumulate(part, every_position(part)) for part in (z[:1], z[1:4], z[4:])]
    for s in (accumulate(z, every_position(z)), parts[0].merge(parts[1]).merge(parts[2]), parts[2].merge(parts[0].merge(parts[1]))):
        torch.testing.assert_close(s.std[0], exact, rtol=1e-5, atol=0)
        torch.testing.assert_close(s.rms[0], z.double().square().mean((0, 1)).sqrt(), rtol=1e-6, atol=0)


def test_std_is_about_the_mean_and_rms_about_zero():
    z = torch.tensor([7.0, 13.0]).view(1, 2, 1)
    s = accumulate(z, every_position(z))
    assert float(s.std) == pytest.approx(3)  # the variance is 9
    assert float(s.rms) == pytest.approx(math.sqrt((49 + 169) / 2))


def test_merging_other_sites_or_shapes_is_refused():
    s = accumulate(torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool))
    other = accumulate(torch.ones(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"'mlp' \[1, 4\] into 'mlp' \[1, 3\].*different sites or models"):
        s.merge(other)
    same_shape = NeuronStatistics("attn_value", s.count, s.sums, s.low, s.high)
    with pytest.raises(ValueError, match=r"'attn_value'.* into 'mlp'"):
        s.merge(same_shape)
    with pytest.raises(ValueError, match=r"cannot merge statistics of sites \['attn_value'\] into \['mlp'\]"):
        Statistics({"mlp": s}).merge(Statistics({"attn_value": same_shape}))


def test_statistics_of_two_tasks_merge_site_by_site(by_hand):
    first = sepcap.collect(by_hand, task("a a a"), tokens=3, context=4, sites=("mlp", "attn_value"))
    second = sepcap.collect(by_hand, task("b c"), tokens=2, context=3, sites=("attn_value", "mlp"))
    merged = first.merge(second)
    assert set(merged) == {"mlp", "attn_value"}
    close(merged["mlp"].mean, [7 / 5, 8 / 5, 5])
    close(merged["attn_value"].mean[0, :2], [4 / 5, 0, -1, 8 / 5])
    assert merged["mlp"].count == 5


# What is refused, and what survives a file


@pytest.mark.parametrize("site", ["attn_pre_out", "attn_value"])
def test_freq_is_refused_for_attention(by_hand, site):
    s = sepcap.collect(by_hand, task("a b c"), tokens=3, context=4, sites=site)
    with pytest.raises(ValueError, match=f"'freq' is undefined for site '{site}'"):
        _ = s[site].freq
    with pytest.raises(ValueError, match=f"'freq' is undefined for site '{site}'"):
        sepcap.score(s, s, importance="freq")


def test_nothing_counted_has_no_mean():
    z = torch.ones(1, 2, 3)
    s, two = accumulate(z, ~every_position(z)), accumulate(z, every_position(z))
    assert s.count == 0
    with pytest.raises(ValueError, match="hold no positions"):
        _ = s.mean
    assert_same(s.merge(two), two, 0)


def test_save_and_load(by_hand, tmp_path):
    s = sepcap.collect(by_hand, task("a a b c", "a"), tokens=5, context=4, per_document=None, sites=("mlp", "attn_pre_out", "attn_value"))
    s.save(tmp_path / "s.safetensors")
    back = Statistics.load(tmp_path / "s.safetensors")
    assert list(back) == ["mlp", "attn_pre_out", "attn_value"]
    for site in s:
        assert back[site].site == site
        assert_same(back[site], s[site], 0)
    assert back.info["task"] == "by hand"
    assert back.info["tokens"] == 5
    assert back.info["sample"] == s.info["sample"]
    assert_same(back.merge(s)["mlp"], s.merge(s)["mlp"], 0)


def test_a_file_that_lacks_a_tensor_is_refused(by_hand, tmp_path):
    path = tmp_path / "s.safetensors"
    sepcap.collect(by_hand, task("a b c"), tokens=3, context=4, sites="mlp").save(path)
    tensors, meta = load_tensors(path, "statistics")
    del tensors["mlp.root"]
    save_tensors(path, tensors, {**meta, "kind": "statistics"})
    with pytest.raises(CorruptFile, match=r"mlp\.root"):
        Statistics.load(path)


def test_a_site_that_was_not_collected(by_hand):
    s = sepcap.collect(by_hand, task("a b c"), tokens=3, context=4, sites="mlp")
    with pytest.raises(ValueError, match=r"site='attn_value' is not known.*Collect it too"):
        _ = s["attn_value"]
    with pytest.raises(ValueError, match=r"site='mpl' is not known. Did you mean 'mlp'"):
        sepcap.collect(by_hand, task("a b c"), tokens=3, context=4, sites="mpl")
