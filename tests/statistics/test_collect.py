"""Collection: equal to statistics taken from the plain Hugging Face model with torch hooks, and it does no more work than that."""

import pytest
import torch
from plain import Plain

import sepcap
from sepcap.models.sites import SITES, bind
from sepcap.statistics.collect import collect_sample
from sepcap.tasks.batches import make_batch, sample_tokens
from sepcap.tasks.load import load_task

TOKENS = 400


def sample_of(model, texts, tokens=TOKENS):
    return sample_tokens(load_task(texts), "collect", model.tokenizer, tokens, 32)


def kept_activations(plain, rows, bos, include_bos=False):
    """site -> [layer, n, ...] in float64: every row alone, so that there is no padding."""
    parts = {}
    for row in rows:
        keep = torch.from_numpy(row != bos) | include_bos

        def look(site, layer, z, keep=keep):
            parts.setdefault((site, layer), []).append(z[0][keep].double())

        plain.run(torch.from_numpy(row)[None], look=look)
    return {site: torch.stack([torch.cat(parts[site, layer]) for layer in range(2)]) for site in SITES}


def same(stats, z):
    """Every statistic against its definition."""
    n = z.shape[1]
    assert stats.count == n
    assert stats.shape == (2, *z.shape[2:])
    expected = {
        "mean": z.mean(1),
        "abs": z.abs().mean(1),
        "sqrt": z.abs().sqrt().mean(1),
        "rms": z.square().mean(1).sqrt(),
        "std": z.std(1, correction=0),
        "min": z.amin(1),
        "max": z.amax(1),
    }
    for name, value in expected.items():
        # a float32 activation of size one is known to 1e-6; its root, near zero, to the root of that
        atol = 1e-4 if name == "sqrt" else 3e-6
        torch.testing.assert_close(getattr(stats, name).double(), value, rtol=1e-4, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    positive = (z > 0).sum(1)
    assert (stats.sums["positive"] - positive).abs().max() <= 1  # one activation in float32 may fall on either side of zero
    if stats.site == "mlp":
        torch.testing.assert_close(stats.freq, stats.sums["positive"] / n)


@pytest.mark.parametrize("include_bos", [False, True])
def test_equals_the_plain_model(tiny, tiny_folders, family, letters, include_bos):
    short = [text[:12] for text in letters]
    sample = sample_of(tiny, short)
    assert len({len(row) for row in sample.rows}) > 1  # so batches are padded
    assert sum(int((row == sample.bos).sum()) for row in sample.rows) > len(sample.rows)  # BOS stands inside rows too
    stats = sepcap.collect(tiny, short, tokens=TOKENS, sites=tuple(SITES), context=32, include_bos=include_bos)
    expected = kept_activations(Plain(family, tiny_folders[family]), sample.rows, sample.bos, include_bos)
    assert expected["mlp"].shape[1] == (sum(map(len, sample.rows)) if include_bos else TOKENS)
    for site in SITES:
        same(stats[site], expected[site])


def test_batch_size_changes_nothing(tiny_opt, letters):
    sample = sample_of(tiny_opt, letters)
    whole = collect_sample(tiny_opt, sample, tuple(SITES), batch_size=64)
    for size in (1, 5):
        other = collect_sample(tiny_opt, sample, tuple(SITES), batch_size=size)
        for site in SITES:
            assert other[site].count == whole[site].count == TOKENS
            for name, value in whole[site].sums.items():
                torch.testing.assert_close(other[site].sums[name], value, rtol=1e-5, atol=1e-3)


def test_padding_may_be_anything(tiny, letters):
    """Only kept positions count, and none of them sees the padding."""
    sample = sample_of(tiny, letters, tokens=100)
    rows = [sample.rows[0], sample.rows[1][:7]]
    from sepcap.statistics.collect import _accumulators, _collect_batch

    results = []
    for padding in (0, 200):
        batch = make_batch(rows, sample.bos)
        batch.inputs[1, 7:] = padding
        accumulators = {"mlp": _accumulators(bind(tiny, "mlp"), histogram=False)}
        _collect_batch(tiny, batch, accumulators, include_bos=False)
        results.append(torch.stack([a.sums for a in accumulators["mlp"]]))
    assert torch.equal(*results)


def test_sites_are_measured_alone_or_together(tiny_opt, letters):
    together = sepcap.collect(tiny_opt, letters, tokens=200, sites=tuple(SITES))
    for site in SITES:
        alone = sepcap.collect(tiny_opt, letters, tokens=200, sites=site)
        assert list(alone) == [site]
        assert torch.equal(alone[site].sums["absolute"], together[site].sums["absolute"])
    assert sepcap.collect(tiny_opt, letters, tokens=200).keys() == {"mlp", "attn_pre_out"}


def test_half_precision_activations_are_summed_wide(tiny_folders, letters):
    """A bfloat16 sum of 400 terms would have stopped growing at 256 times a term; the plain model in bfloat16 says what is right."""
    model = sepcap.load_model(tiny_folders["llama"], device="cpu", dtype="bfloat16")
    sample = sample_of(model, letters)
    stats = sepcap.collect(model, letters, tokens=TOKENS, context=32, sites="mlp")["mlp"]
    plain = Plain("llama", tiny_folders["llama"], dtype=torch.bfloat16, attn_implementation="eager")
    z = kept_activations(plain, sample.rows, sample.bos)["mlp"]
    torch.testing.assert_close(stats.abs, z.abs().mean(1), rtol=2e-2, atol=1e-3)
    assert stats.low.dtype == torch.float32
    assert stats.sums["total"].dtype == torch.float64


@pytest.mark.parametrize(("sites", "last"), [(("mlp",), "mlp"), (("attn_pre_out",), "attn"), (("attn_value", "attn_pre_out"), "attn")])
def test_nothing_runs_after_the_last_site(tiny, letters, sites, last):
    calls = []
    attn, mlp = tiny.blocks[1].attn, tiny.blocks[1].mlp
    watched = {
        "unembed": tiny.original_model.get_output_embeddings(),
        "out": attn.o.original_component,
        "mlp": getattr(mlp, "in").original_component,
        "write": mlp.out.original_component,
    }
    handles = [module.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, module in watched.items()]
    try:
        sepcap.collect(tiny, letters, tokens=100, sites=sites)
        # the hook is the input of the out-projection, which itself is not computed
        assert set(calls) == ({"out", "mlp"} if last == "mlp" else set())
        calls.clear()
        tiny(torch.arange(3, 9)[None])
        assert {"unembed", "out", "mlp", "write"} == set(calls)  # the watch works
    finally:
        for handle in handles:
            handle.remove()


def test_earlier_layers_are_not_run_twice(tiny_opt, letters):
    calls = []
    sample = sample_of(tiny_opt, letters)
    tiny_opt.add_hook("blocks.0.hook_resid_pre", lambda z, hook: calls.append(z.shape[0]))
    collect_sample(tiny_opt, sample, ("mlp", "attn_pre_out"), batch_size=4)
    assert sum(calls) == len(sample.rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("site", "layer"), [("mlp", 0), ("mlp", 1), ("attn_value", 1), ("attn_pre_out", 1)])
def test_broken_activations_name_where_they_begin(tiny_opt, letters, site, layer, value):
    from sepcap.models.sites import get_site

    def break_one(z, hook):
        z = z.clone()
        z[..., 3] = value
        return z

    with (
        tiny_opt.hooks(fwd_hooks=[(get_site(site).hook_name(layer), break_one)]),
        pytest.raises(FloatingPointError, match=f"site '{site}' in layer {layer} are NaN or infinite"),
    ):
        sepcap.collect(tiny_opt, letters, tokens=100, sites=tuple(SITES))
    assert sepcap.collect(tiny_opt, letters, tokens=100)["mlp"].count == 100  # nothing stays hooked


def test_batch_size_is_halved_when_memory_runs_out(tiny_opt, letters, monkeypatch):
    sample = sample_of(tiny_opt, letters)
    expected = collect_sample(tiny_opt, sample, ("mlp",), batch_size=3)
    real, sizes = type(tiny_opt).forward, []

    def small_machine(self, ids, *args, **kwargs):
        sizes.append(len(ids))
        if len(ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(self, ids, *args, **kwargs)

    monkeypatch.setattr(type(tiny_opt), "forward", small_machine)
    with pytest.warns(UserWarning, match="out of memory: continuing with batch_size=") as warned:
        stats = collect_sample(tiny_opt, sample, ("mlp",), batch_size=12)
    assert [str(w.message)[-2:] for w in warned if "out of memory" in str(w.message)] == ["=6", "=3"]
    assert sizes[:3] == [12, 6, 3]
    assert stats["mlp"].count == expected["mlp"].count
    for name, value in expected["mlp"].sums.items():
        assert torch.equal(stats["mlp"].sums[name], value)


def test_one_row_that_does_not_fit_is_an_error(tiny_opt, letters, monkeypatch):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(tiny_opt), "forward", full)
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="batch_size=1"):
        sepcap.collect(tiny_opt, letters, tokens=100, batch_size=2)


def test_other_errors_are_not_taken_for_memory(tiny_opt, letters, monkeypatch):
    calls = []

    def broken(self, *args, **kwargs):
        calls.append(1)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(type(tiny_opt), "forward", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        sepcap.collect(tiny_opt, letters, tokens=100, batch_size=8)
    assert len(calls) == 1


def test_how_it_was_made_is_recorded(tiny_opt, letters):
    stats = sepcap.collect(tiny_opt, letters, tokens=200)
    assert stats.info["tokens"] == stats.info["asked"] == stats["mlp"].count == 200
    assert stats.info["split"] == "collect"
    assert stats.info["rows"] == len(sample_of(tiny_opt, letters, 200).rows)
