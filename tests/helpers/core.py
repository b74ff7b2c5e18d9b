"""The core on HookedTransformer objects of transformer-lens 3.9: the numbers that a bridge gives on the same weights.

Run by test_core_on_hooked_transformers.py in an environment that has this class; MODELS is the folder with the models, each with the
bridge's numbers beside it.
"""

import contextlib
import copy
import os
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import CONTEXT, words
from safetensors.torch import load_file

import sepcap
from sepcap.models.blocks.views import value_row_norms
from sepcap.models.partial import logits_from, residuals
from sepcap.models.sites import SITES, bind, live_weight
from sepcap.models.weights import WeightSnapshot, fingerprint
from sepcap.selection.neurons import NeuronSet
from sepcap.studies.ablations.heads import compare_ablations
from sepcap.studies.pruning import prune as pruning
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import sample_task

MODELS = "SEPCAP_TEST_MODELS"
HOOKED = ("opt", "gpt2", "neox", "llama", "mistral")
LETTERS, DIGITS = words(0), words(0, alphabet="0123456789")
SIZE: dict[str, Any] = {"tokens": 300, "context": CONTEXT}
IDS = torch.randint(3, 320, (3, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def numbers(model) -> dict[str, torch.Tensor]:
    """What sepcap measures and computes on a model of these families, and logits after every edit; the model is left as it came."""
    found = {"logits": model(IDS), "row norms": value_row_norms(model)}
    measured = {name: sepcap.collect(model, task, sites=tuple(SITES), histogram=True, **SIZE) for name, task in both()}
    for site in SITES:
        for name, statistics in measured.items():
            for importance in ("mean", "abs", "rms", "std", "peak"):
                found[f"{name} {site} {importance}"] = getattr(statistics[site], importance)
        found[f"score {site}"] = sepcap.score(measured["letters"], measured["digits"], "abs")[site]
    found |= {f"evaluate {name}": torch.from_numpy(sepcap.evaluate(model, task, **SIZE).per_row) for name, task in both()}
    for site, neurons in drawn(model).items():
        kinds = {"zero": "zero", "mean": "mean", "median": "median", "resample": "resample", "constant": 0.5}
        for name, kind in kinds.items():
            with sepcap.ablate(model, neurons, kind, reference=measured["digits"] if name in ("mean", "median") else None):
                found[f"ablate {site} {name}"] = model(IDS)
        found[f"delete {site}"] = edited(model, lambda neurons=neurons: sepcap.delete(model, neurons))
    for bias in ("fold", "rotate"):
        rotation = sepcap.compute_rotation(model, bias=bias)
        found[f"singular values {bias}"] = rotation.singular_values
        found[f"offset {bias}"] = rotation.output_bias
        turned = sepcap.collect(model, LETTERS, sites="attn_value", rotation=rotation, **SIZE)
        found[f"rotated {bias}"] = turned["attn_value"].abs
        found[f"logits rotated {bias}"] = edited(model, partial(sepcap.rotate_values, model, bias=bias))
    table = compare_ablations(model, task=LETTERS, tokens=200, reference_tokens=300, fit_tokens=100, context=CONTEXT).table
    found["compared"] = torch.from_numpy(table[["delta_loss", "delta_top1"]].to_numpy(dtype=float))
    return {name: tensor.double().contiguous() for name, tensor in found.items()}


def both():
    return (("letters", LETTERS), ("digits", DIGITS))


def drawn(model) -> dict[str, NeuronSet]:
    """A random third of every site, and two whole heads."""
    sets = {site: NeuronSet.random(model, {site: 0.3}, seed=1) for site in SITES}
    return {**sets, "heads": NeuronSet.heads(model, [(0, 1), (1, 0), (1, 1)])}


def edited(model, edit) -> torch.Tensor:
    """Logits after an edit, which is taken back."""
    before = WeightSnapshot(model, tuple(SITES))
    edit()
    after = model(IDS).clone()
    before.restore()
    return after


def made_from(folder):
    """A HookedTransformer and the plain model of the same folder."""
    import transformers

    return sepcap.load_model(folder, device="cpu", backend="hooked"), transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(params=HOOKED)
def case(request):
    """A HookedTransformer, the plain model of the same weights, and what a bridge gives on them."""
    folder = Path(os.environ[MODELS]) / request.param
    return *made_from(folder), load_file(folder.with_suffix(".safetensors"))


@pytest.fixture
def model(case):
    return case[0]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(model, before) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_is_taken_as_it_is(model):
    before = state(model)
    assert sepcap.load_model(model) is model
    assert same_state(model, before)


def test_the_numbers_are_those_of_a_bridge(case):
    model, _, expected = case
    before, print_before, training = state(model), fingerprint(model), model.training
    found = numbers(model)
    assert found.keys() == expected.keys()
    wrong = {}
    for name, value in expected.items():
        if not torch.allclose(found[name], value, rtol=1e-3, atol=2e-5 * max(1.0, float(value.abs().max()))):
            wrong[name] = float((found[name] - value).abs().max())
    assert not wrong
    assert same_state(model, before)
    assert fingerprint(model) == print_before
    assert model.training == training
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@torch.no_grad()
def test_the_loss_is_that_of_the_plain_models_logits(case):
    model, hf_model, _ = case
    losses = []
    for batch in sample_task(model, load_task(LETTERS), "evaluate", 300, CONTEXT).batches(1):
        losses.append(torch.log_softmax(hf_model(batch.inputs).logits, -1)[batch.asked].gather(-1, batch.answers[batch.asked][:, None]))
    assert sepcap.evaluate(model, LETTERS, **SIZE).loss == pytest.approx(-float(torch.cat(losses).mean()), abs=1e-5)


@pytest.mark.parametrize("site", [*SITES, "heads"])
@torch.no_grad()
def test_deletion_is_zero_ablation_and_reaches_the_parameters(model, site):
    neurons, before = drawn(model)[site], model(IDS).clone()
    with sepcap.ablate(model, neurons):
        ablated = model(IDS).clone()
    sepcap.delete(model, neurons)
    assert (ablated - before).abs().max() > 1e-2
    torch.testing.assert_close(model(IDS), ablated, rtol=0, atol=2e-5)
    for site_of, mask in neurons.masks.items():
        rows = [bind(model, site_of).rows(layer) for layer in range(2)]
        assert all(bool((row[gone] == 0).all()) for row, gone in zip(rows, mask, strict=True))


@torch.no_grad()
def test_a_shared_value_goes_with_the_last_head_that_uses_it(model):
    attn = model.blocks[0].attn
    heads, value_heads = len(attn.W_O), len(live_weight(attn, "W_V"))
    group = heads // value_heads
    parameter = dict(attn.named_parameters())["_W_V" if group > 1 else "W_V"]
    for head in range(group):
        assert bool((parameter[0] != 0).any())
        sepcap.delete(model, NeuronSet.heads(model, [(0, head)]))
    assert bool((parameter[0] == 0).all())
    assert bool((parameter[1] != 0).any())


@torch.no_grad()
def test_rotation_keeps_the_logits_and_can_be_undone(model):
    before, logits = state(model), model(IDS).clone()
    rotation = sepcap.rotate_values(model)
    assert not same_state(model, before)
    torch.testing.assert_close(model(IDS), logits, rtol=0, atol=1e-4)
    rotation.undo(model)
    assert same_state(model, before)


@torch.no_grad()
def test_a_pass_may_begin_in_the_middle(model):
    logits = model(IDS).clone()
    before = residuals(model, IDS, [1])[1]
    torch.testing.assert_close(logits_from(model, before, IDS), logits, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="never called"):
        logits_from(model, before, IDS, [("blocks.0.hook_attn_out", lambda x, hook: x)])
    later = logits_from(model, before, IDS, [("blocks.1.hook_attn_out", lambda x, hook: 0 * x)])
    torch.testing.assert_close(later, model.run_with_hooks(IDS, fwd_hooks=[("blocks.1.hook_attn_out", lambda x, hook: 0 * x)]))
    assert not torch.allclose(later, logits)


def test_an_interrupted_run_goes_on(model, tmp_path, monkeypatch):
    options = {"fractions": {"mlp": 0.2, "attn_pre_out": 0.2, "attn_value": 0.2}, "steps": 3, "tokens": 300, "eval_tokens": 200}
    config = sepcap.PruningConfig(forget=LETTERS, retain=DIGITS, rotation="fold", offset="mean", **options)
    before = state(model)
    whole = sepcap.prune(model, config, out=tmp_path / "whole")
    assert same_state(model, before)
    calls, evaluate = [], pruning.evaluate_sample

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(pruning, "evaluate_sample", stopping)
    with pytest.raises(KeyboardInterrupt):
        sepcap.prune(model, config, out=tmp_path / "stopped")
    monkeypatch.undo()
    assert same_state(model, before)
    run = sepcap.prune(model, config, out=tmp_path / "stopped")
    assert all(run.neurons(step) == whole.neurons(step) for step in range(4))
    assert run.trajectory.drop(columns="seconds").equals(whole.trajectory.drop(columns="seconds"))
    assert len(run.neurons(3)) > 100
    run.apply(model, 3)
    assert not same_state(model, before)


@torch.no_grad()
def test_it_computes_what_the_plain_model_does_in_every_precision(case):
    model, hf_model, _ = case
    torch.testing.assert_close(model(IDS), hf_model(IDS).logits, rtol=0, atol=1e-4)
    half = sepcap.load_model(hf_model.bfloat16(), tokenizer=model.tokenizer, dtype="bfloat16", device="cpu", backend="hooked")
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    off, plain_off = ((logits.float() - model(IDS)).square().mean().sqrt() for logits in (half(IDS), hf_model(IDS).logits))
    assert off < 1.5 * plain_off


@pytest.mark.parametrize("edit", ["nothing", "deletion", "rotation", "offset", "cast", "copied"])
@torch.no_grad()
def test_what_is_saved_is_a_plain_checkpoint_with_the_same_logits(case, edit, tmp_path):
    import transformers

    model, hf_model, _ = case
    edits = {
        "deletion": lambda: [sepcap.delete(model, neurons) for neurons in drawn(model).values()],
        "rotation": lambda: sepcap.rotate_values(model),
        "offset": lambda: sepcap.delete(model, drawn(model)["mlp"], {"mlp": sepcap.collect(model, LETTERS, **SIZE)["mlp"].mean}),
    }
    if edit == "offset" and model.cfg.gated_mlp:  # whose checkpoints have no such bias
        edits["offset"]()
        with pytest.raises(NotImplementedError, match=r"b_out.* has no place for"):
            sepcap.save_pretrained(model, tmp_path / "saved")
        return
    if edit in edits:
        edits[edit]()
    if edit == "cast":
        model.to(torch.float64, print_details=False)
        sepcap.delete(model, drawn(model)["mlp"])
    if edit == "copied":
        model = copy.deepcopy(model)
        sepcap.delete(model, drawn(model)["mlp"])
    sepcap.save_pretrained(model, tmp_path / "saved")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert saved.config.architectures == hf_model.config.architectures
    torch.testing.assert_close(saved(IDS).logits.to(model.cfg.dtype), model(IDS), rtol=0, atol=1e-4)
    changed = not torch.allclose(saved(IDS).logits, hf_model(IDS).logits, atol=1e-3)
    assert changed == (edit not in ("nothing", "rotation"))
    for backend in ("bridge", "hooked"):
        again = sepcap.load_model(tmp_path / "saved", device="cpu", backend=backend)
        torch.testing.assert_close(again(IDS), saved(IDS).logits, rtol=0, atol=1e-4)


def test_a_weight_that_the_checkpoint_ties_to_another_is_not_saved_wrong(model, tmp_path):
    model.unembed.W_U = torch.nn.Parameter(model.W_U.detach() * 2)
    before = state(model)
    if model.sepcap_origin.hf_model.config.tie_word_embeddings:
        with pytest.raises(NotImplementedError, match=r"(embed\.W_E|unembed\.W_U) .*ties it to another weight"):
            sepcap.save_pretrained(model, tmp_path / "saved")
        assert same_state(model, before)
    else:
        sepcap.save_pretrained(model, tmp_path / "saved")


def test_a_subclass_is_made_too(tiny_folders):
    class Own(import_module("transformer_lens").HookedTransformer):
        pass

    model = sepcap.load_model(tiny_folders["gpt2"], device="cpu", backend=Own)
    assert type(model) is Own
    assert sepcap.evaluate(model, LETTERS, **SIZE).n == 300


@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.0.attn.hook_z", "blocks.0.mlp.hook_post"])
@torch.no_grad()
def test_an_sae_in_the_model_is_a_part_of_it(hook, tiny_folders, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    model = sepcap.load_model(tiny_folders["opt"], device="cpu", backend=sae_lens.HookedSAETransformer)
    assert type(model) is sae_lens.HookedSAETransformer
    torch.manual_seed(0)
    metadata, width = sae_lens.saes.sae.SAEMetadata(hook_name=hook), 72 if "mlp" in hook else 32
    reshaped = "hook_z" if hook.endswith("hook_z") else "none"
    sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=width, d_sae=64, metadata=metadata, reshape_activations=reshaped))
    fold = [(hook, lambda x, hook: sae(x))]
    neurons = sepcap.NeuronSet.random(model, dict.fromkeys(("mlp", "attn_pre_out"), 0.3), seed=1)

    def measured(ablation):
        with ablation:
            table = compare_ablations(model, task=LETTERS, kinds=("zero", "mean"), tokens=200, reference_tokens=300, context=CONTEXT).table
            collected = sepcap.collect(model, LETTERS, sites=("mlp", "attn_pre_out"), **SIZE)
            return model(IDS), collected["mlp"].abs, collected["attn_pre_out"].abs, sepcap.evaluate(model, LETTERS, **SIZE).loss, table

    plain = measured(contextlib.nullcontext())
    with model.hooks(fwd_hooks=fold):
        expected = measured(contextlib.nullcontext())
        expected_ablated = measured(sepcap.ablate(model, neurons))
    model.add_sae(sae)
    found, ablated = measured(contextlib.nullcontext()), measured(sepcap.ablate(model, neurons))
    for now, then in ((found, expected), (ablated, expected_ablated)):
        torch.testing.assert_close(now[:4], then[:4])
        pd.testing.assert_frame_equal(now[4], then[4], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found[0], plain[0], rtol=0.01)
    assert not torch.allclose(found[1][1], plain[1][1], rtol=0.01)
    before, fractions = state(model), dict.fromkeys(neurons.masks, 0.2)
    config = sepcap.PruningConfig(forget=LETTERS, retain=DIGITS, fractions=fractions, steps=1, tokens=300, eval_tokens=200)
    if "resid" in hook:
        sepcap.prune(model, config, out=tmp_path / "run")
        assert same_state(model, before)
        assert list(model.acts_to_saes) == [hook]
        sepcap.delete(model, neurons)
        torch.testing.assert_close(model(IDS), ablated[0])
    else:
        for edit in (lambda: sepcap.prune(model, config, out=tmp_path / "run"), lambda: sepcap.delete(model, neurons)):
            with pytest.raises(NotImplementedError, match=rf"an SAE at {hook} reads them .*reset_saes"):
                edit()
        assert same_state(model, before)
    model.reset_saes()
    sepcap.save_pretrained(model, tmp_path / "saved")
    torch.testing.assert_close(sepcap.load_model(tmp_path / "saved", device="cpu")(IDS), model(IDS), rtol=0, atol=1e-4)


def test_one_that_sepcap_has_not_made_is_measured_but_not_saved(tiny_folders, tmp_path):
    from transformers import AutoTokenizer

    sizes = {"n_layers": 1, "d_model": 16, "n_ctx": 32, "d_head": 8, "d_vocab": 320, "act_fn": "relu", "d_mlp": 24}
    model = import_module("transformer_lens").HookedTransformer(sizes, AutoTokenizer.from_pretrained(tiny_folders["opt"]))
    assert sepcap.evaluate(model, LETTERS, **SIZE).n == 300
    with pytest.raises(NotImplementedError, match=r"saving a checkpoint .*load_model"):
        sepcap.save_pretrained(model, tmp_path / "saved")


def test_a_bridge_is_not_made_into_something_else(tiny_folders):
    with pytest.raises(ValueError, match="a TransformerBridge already"):
        sepcap.load_model(sepcap.load_model(tiny_folders["opt"], device="cpu"), backend="hooked")


@torch.no_grad()
def test_other_logits_than_the_plain_models_are_refused(tiny_folders, monkeypatch):
    from sepcap.models import hooked_families

    options, module = hooked_families.HOOKED_FAMILIES["GPT2LMHeadModel"]
    wrong = (lambda config: options(config) | {"act_fn": "relu"}, module)
    monkeypatch.setitem(hooked_families.HOOKED_FAMILIES, "GPT2LMHeadModel", wrong)
    with pytest.raises(NotImplementedError, match=r"HookedTransformer computes logits that differ .*leave out backend"):
        sepcap.load_model(tiny_folders["gpt2"], device="cpu", backend="hooked")


def test_it_is_loaded_with_the_checks_of_a_bridge(tiny_folders, capsys):
    from transformers import AutoTokenizer, GPT2LMHeadModel

    def load(hf_model, tokens=0, dtype="float32"):
        tokenizer = AutoTokenizer.from_pretrained(tiny_folders["gpt2"])
        tokenizer.add_tokens([f"QUUX{i}" for i in range(tokens)])
        return sepcap.load_model(hf_model, tokenizer=tokenizer, device="cpu", dtype=dtype, backend="hooked")

    def plain(hook=None):
        hf_model = GPT2LMHeadModel.from_pretrained(tiny_folders["gpt2"])
        if hook:
            hf_model.transformer.h[0].attn.register_forward_hook(hook)
        return hf_model

    load(plain())
    assert capsys.readouterr().out.endswith(" on cpu in float32\n")
    with pytest.raises(ValueError, match="320 embeddings"):
        load(plain(), tokens=400)
    with pytest.raises(NotImplementedError, match=r"hooks on transformer\.h\.0\.attn are lost.*hook the HookedTransformer"):
        load(plain(lambda module, args, out: (out[0] * 3, *out[1:])))
    with pytest.warns(UserWarning, match=r"transformer\.h\.0\.attn are not called.*give the HookedTransformer"):
        load(plain(lambda module, args, out: None))
    with pytest.raises(NotImplementedError, match="HookedTransformer computes logits that differ"):
        load(plain(lambda module, args, out: (out[0] * 30, *out[1:])), dtype="bfloat16")


def test_what_needs_the_hugging_face_model_says_so(model):
    with pytest.raises(NotImplementedError, match=r"harness .*load_model"):
        sepcap.run_lm_eval(model, "piqa")


@torch.no_grad()
def test_resampling_by_plain_hooks_is_the_same(model):
    ablation = sepcap.ablate(model, layer=0, head=0, kind="resample")
    with ablation:
        expected = model(IDS)
    assert torch.equal(model.run_with_hooks(IDS, fwd_hooks=ablation.fwd_hooks), expected)
    assert not torch.allclose(model(IDS), expected)


@torch.no_grad()
def test_resampling_goes_on_with_a_cache(model):
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    # of random tokens a longer donor begins as a shorter one does
    ablation = sepcap.ablate(model, layer=0, head=0, kind="resample", source="tokens")
    with ablation:
        expected = model(IDS)
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", len(IDS))
    with ablation:
        parts = [model(part, past_kv_cache=cache) for part in IDS.split([12, 3, 5], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_norm_over_the_neurons_is_no_place_to_delete():
    sizes = {"n_layers": 1, "d_model": 16, "n_ctx": 16, "d_head": 8, "d_vocab": 50}
    solu_ln = {**sizes, "act_fn": "solu_ln", "normalization_type": "LN", "attn_only": False, "d_mlp": 24}
    solu = import_module("transformer_lens").HookedTransformer(solu_ln)
    with pytest.raises(NotImplementedError, match="normalises"):
        sepcap.delete(solu, NeuronSet.random(solu, {"mlp": 0.5}))
    sepcap.delete(solu, NeuronSet.random(solu, {"attn_pre_out": 0.5}))
