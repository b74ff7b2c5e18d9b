"""Models whose layers are on several devices: the same numbers as on one, and nothing moved that need not be."""

import math

import pytest
import torch
from accelerate import dispatch_model
from conftest import VOCABULARY
from pretended import PretendedDevices, put_module, where
from transformers import AutoModelForCausalLM, AutoTokenizer

import sepcap
from sepcap.interventions import constants
from sepcap.models.devices import device_of, layer_device
from sepcap.models.weights import WeightSnapshot, fingerprint
from sepcap.statistics import collect as collecting

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
SITES = ("mlp", "attn_pre_out", "attn_value")
FAMILIES = ("opt", "mistral", "gpt2", "neox", "llama")
"""OPT's output weights are those of its embedding, on the first device; Mistral's are on the second, and it has fewer value heads."""


def device_map_of(hf_model) -> dict[str, str]:
    """Embedding and layer 0 on the first device, layer 1 and what follows on the second; tied weights stay together."""
    base = hf_model.base_model
    prefix = next(name for name, module in hf_model.named_modules() if module is getattr(base, "decoder", base))
    head = next(name for name, module in hf_model.named_modules() if module is hf_model.get_output_embeddings())
    tied = hf_model.get_output_embeddings().weight is hf_model.get_input_embeddings().weight
    parts = {}
    for name, module in hf_model.get_submodule(prefix).named_children():
        if isinstance(module, torch.nn.ModuleList):
            parts |= {f"{prefix}.{name}.{i}": (FIRST, SECOND)[i] for i in range(len(module))}
        else:
            parts[f"{prefix}.{name}"] = SECOND if name in ("final_layer_norm", "norm", "ln_f") else FIRST
    return {name: str(device) for name, device in (parts | {head: FIRST if tied else SECOND}).items()}


@pytest.fixture
def one(tiny_folders, request):
    """The model on one device."""
    return sepcap.load_model(tiny_folders[request.param], device="cpu")


@pytest.fixture
def two(tiny_folders, request):
    """The same model on two pretended devices, spread by accelerate as transformers does it."""
    folder = tiny_folders[request.param]
    hf_model = AutoModelForCausalLM.from_pretrained(folder)
    places = device_map_of(hf_model)
    with PretendedDevices() as devices:
        for name, device in places.items():
            put_module(hf_model.get_submodule(name), device)
        hf_model = dispatch_model(hf_model, places, main_device=str(FIRST))
        hf_model.hf_device_map = places
        model = sepcap.load_model(hf_model, tokenizer=AutoTokenizer.from_pretrained(folder))
        model.devices = devices
        devices.moves.clear()
        yield model


def of_families(*fast):
    """The model of every family on one device and on two; those not named in the slow tier."""
    pairs = [pytest.param(family, family, marks=() if family in fast else pytest.mark.slow, id=family) for family in FAMILIES]
    return pytest.mark.parametrize(("one", "two"), pairs, indirect=True)


@pytest.mark.parametrize("two", ["opt"], indirect=True)
def test_pretended_devices_do_not_mix(two):
    x, y = torch.ones(2, 2, device="cuda:0"), torch.ones(2, 2, device="cuda:1")
    for mix in (lambda: x + y, lambda: torch.stack([x, y]), lambda: torch.where(x > 0, x, y), lambda: x[y > 0], lambda: y.cpu() + x):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    assert where(x + y.to(x.device)) == FIRST
    assert where(x[torch.tensor([0])]) == FIRST  # indices may be on the CPU
    assert where(x * torch.tensor(2.0)) == FIRST  # and numbers
    assert x.device == FIRST
    assert y.tolist() == [[1, 1], [1, 1]]


@of_families("opt", "mistral")
def test_statistics_are_those_of_one_device_and_are_summed_where_the_activations_are(one, two, letters, monkeypatch):
    assert device_of(two) == FIRST
    assert [layer_device(two, layer) for layer in range(2)] == [FIRST, SECOND]
    summed_at = watch_sums(monkeypatch)
    expected, found = (sepcap.collect(model, letters, tokens=400, sites=SITES, histogram=True) for model in (one, two))
    assert summed_at[-3:] == [[FIRST, SECOND]] * 3
    assert not activations_moved(two)
    for site in SITES:
        for name in ("mean", "abs", "sqrt", "rms", "std", "low", "high", "median", "peak"):
            torch.testing.assert_close(getattr(found[site], name).cpu(), getattr(expected[site], name), atol=1e-5, rtol=1e-4)


def watch_sums(monkeypatch):
    """Devices of the sums of every layer, site by site, as collections end."""
    seen, gather = [], collecting.gather

    def look(site, layers, *more):
        seen.append([where(layer.sums) for layer in layers])
        return gather(site, layers, *more)

    monkeypatch.setattr(collecting, "gather", look)
    return seen


def activations_moved(model):
    """Moves of activations of neurons, [batch, pos, neuron] or [batch, pos, head, d_head]."""
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    heads, values = attn.W_O.shape[:2], (len(attn.W_V), attn.W_V.shape[2])
    return [move for move in model.devices.moves if move.shape[2:] in {mlp.W_out.shape[:1], tuple(heads), values}]


@pytest.mark.parametrize("two", ["opt"], indirect=True)
def test_sums_on_another_device_would_be_noticed(two, letters, monkeypatch):
    """The check above can fail: with all sums on the first device it sees the second layer's activations move there."""
    monkeypatch.setattr(collecting, "layer_device", lambda model, layer: FIRST)
    sepcap.collect(two, letters, tokens=200, sites=SITES)
    assert {(move.before, move.after) for move in activations_moved(two)} == {("cuda:1", "cuda:0")}


@pytest.mark.parametrize("two", ["opt"], indirect=True)
def test_a_constant_left_behind_would_be_noticed(two, letters, monkeypatch):
    monkeypatch.setattr(constants, "_set", lambda z, hook, mask, constant: torch.where(mask, constant, z))
    with sepcap.ablate(two, layer=1, neurons=[0], kind="zero"), pytest.raises(RuntimeError, match="same device"):
        sepcap.evaluate(two, letters, tokens=100)


@of_families("mistral")
def test_evaluation_and_every_ablation_are_those_of_one_device(one, two, letters):
    found = []
    for model in (one, two):
        reference = sepcap.collect(model, letters, tokens=100, histogram=True)
        neurons = sepcap.NeuronSet.random(model, {"mlp": 0.2, "attn_pre_out": 0.2}, seed=1)
        losses = [sepcap.evaluate(model, letters, tokens=100).loss]
        for kind in ("zero", "mean", "median", "peak", "resample"):
            with sepcap.ablate(model, neurons, kind, reference=reference):
                losses.append(sepcap.evaluate(model, letters, tokens=100).loss)
        found.append(losses)
    assert found[1] == pytest.approx(found[0], abs=2e-5)
    # whole logits stay where they are computed; accelerate would take them back to the input
    assert not [move for move in two.devices.moves if move.shape[2:] == (VOCABULARY,)]


@of_families("opt")
def test_passes_that_begin_in_the_middle_are_those_of_one_device(one, two, letters):
    how = {"head": ((1, 0),), "kinds": ("mean", "resample", "optimal"), "tokens": 100, "reference_tokens": 100, "fit_tokens": 62}
    one, two = (sepcap.compare_ablations(model, task=letters, **how) for model in (one, two))
    assert math.isfinite(one.tensors["per_row"].sum())
    losses = [found.table["delta_loss"].to_numpy() for found in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=5e-5)


@of_families("mistral")
def test_edits_of_weights_are_those_of_one_device(one, two, letters, tmp_path):
    losses = []
    for model in (one, two):
        before, snapshot = fingerprint(model), WeightSnapshot(model, SITES)
        neurons = sepcap.NeuronSet.random(model, {"mlp": 0.2, "attn_pre_out": 0.2}, seed=1)
        rotation = sepcap.rotate_values(model, bias="rotate")
        rotated = sepcap.evaluate(model, letters, tokens=200).loss
        rotation.undo(model)
        assert fingerprint(model) == before
        offset = None
        if model.blocks[0].mlp.b_out is not None:
            reference = sepcap.collect(model, letters, tokens=200)
            offset = {site: reference[site].mean for site in neurons.masks}
        sepcap.delete(model, neurons, offset=offset)
        losses.append([rotated, sepcap.evaluate(model, letters, tokens=200).loss])
        snapshot.restore()
        assert fingerprint(model) == before
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)


@of_families()
def test_a_run_is_that_of_one_device(one, two, letters, digits, tmp_path):
    config = sepcap.PruningConfig(forget=letters, retain=digits, fractions={"mlp": 0.1}, steps=1, tokens=300, eval_tokens=200)
    runs = [sepcap.prune(model, config, out=tmp_path / name) for name, model in (("one", one), ("two", two))]
    assert runs[1].neurons() == runs[0].neurons()
    assert runs[1].trajectory["loss"].to_numpy() == pytest.approx(runs[0].trajectory["loss"].to_numpy(), abs=2e-5)


def test_a_device_map_is_followed_by_the_loading_code(tiny_folders):
    folder = tiny_folders["opt"]
    names = device_map_of(AutoModelForCausalLM.from_pretrained(folder))
    ids = torch.arange(3, 20)[None]
    expected = sepcap.load_model(folder, device="cpu")(ids, return_type="logits")
    maps = ("auto", "balanced", "sequential", {"": "cpu"}, dict.fromkeys(names, "cpu"), dict.fromkeys(names, torch.device("cpu")))
    for device_map in maps:
        model = sepcap.load_model(folder, device_map=device_map)
        assert torch.equal(model(ids, return_type="logits"), expected)
    memory = {"cpu": "10MB"}
    sepcap.load_model(folder, device_map="auto", max_memory=memory)
    assert memory == {"cpu": "10MB"}  # accelerate would write numbers into it


def test_random_weights_are_the_same_on_a_device_map(tiny_folders):
    how = {"random_weights": True, "seed": 3}
    spread, whole = (sepcap.load_model(tiny_folders["opt"], **how, **at) for at in ({"device_map": "auto"}, {"device": "cpu"}))
    assert fingerprint(spread) == fingerprint(whole)


def test_weights_that_do_not_fit_are_refused(tiny_folders, tmp_path):
    folder = tiny_folders["opt"]
    with pytest.raises(NotImplementedError, match=r"36 of them \(model.decoder.embed_tokens.weight.*more max_memory"):
        sepcap.load_model(folder, device_map="auto", max_memory={"cpu": "60KB"})
    places = dict.fromkeys(device_map_of(AutoModelForCausalLM.from_pretrained(folder)), "cpu") | {"model.decoder.layers.1": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    with pytest.raises(NotImplementedError, match=r"layers\.1.*offloaded"):
        sepcap.load_model(offloaded, tokenizer=AutoTokenizer.from_pretrained(folder))


def test_a_bridge_with_offloaded_weights_is_neither_measured_nor_edited(tiny_folders, tmp_path, letters):
    from transformer_lens.model_bridge import TransformerBridge

    folder = tiny_folders["llama"]
    places = dict.fromkeys(device_map_of(AutoModelForCausalLM.from_pretrained(folder)), "cpu") | {"model.layers.1": "disk"}
    hf_model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    model = TransformerBridge.boot_transformers(str(folder), hf_model=hf_model, tokenizer=AutoTokenizer.from_pretrained(folder))
    whole = sepcap.load_model(folder, device="cpu")
    neurons = sepcap.NeuronSet.random(whole, {"mlp": 0.1})
    for attempt in (
        lambda: sepcap.collect(model, letters, tokens=100),
        lambda: sepcap.delete(model, neurons),
        lambda: sepcap.rotate_values(model),
        lambda: fingerprint(model),
        lambda: sepcap.save_pretrained(model, tmp_path / "out"),
    ):
        with pytest.raises(NotImplementedError, match="offloaded"):
            attempt()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"device_map": "sequentail"}, "Did you mean 'sequential'"),
        ({"device_map": "cpu"}, "use device="),
        ({"device_map": "auto", "device": "cpu"}, "give one of them"),
        ({"max_memory": {0: "1GiB"}}, "device_map='auto' too"),
        ({"device_map": {}}, "name of a module -> device"),
        ({"device_map": {"": 99}}, r"device_map\[''\]=99: torch sees \d+ CUDA"),
        ({"device_map": {"": "disk"}}, "disk"),
        ({"device_map": {"": "nonsense"}}, "'cuda:0' or 'cpu'"),
    ],
)
def test_a_map_that_cannot_be_followed_is_refused(arguments, said):
    with pytest.raises((TypeError, ValueError), match=said):
        sepcap.load_model("default", **arguments)


def test_a_model_object_is_not_placed_again(tiny_folders):
    hf_model = AutoModelForCausalLM.from_pretrained(tiny_folders["opt"])
    with pytest.raises(ValueError, match="dispatch_model"):
        sepcap.load_model(hf_model, tokenizer=AutoTokenizer.from_pretrained(tiny_folders["opt"]), device_map="auto")


def test_a_device_that_torch_does_not_know_is_named(tiny_folders):
    with pytest.raises(ValueError, match=r"device='cqu': torch knows no such device; give 'cpu', 'cuda'"):
        sepcap.load_model(tiny_folders["opt"], device="cqu")
