"""Bad input: every error names the argument, what came and what would be right.

Files of a run that are broken, interruption and resumption are in tests/studies.
"""

import re
import shutil
import socket
import time
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from plain import token_ids

import sepcap
from sepcap.models.sites import get_site


def config(forget, retain, **options):
    return sepcap.PruningConfig(**{"forget": forget, "retain": retain, "steps": 2, "tokens": 200, "eval_tokens": 200, **options})


def unchecked(settings, **wrong):
    """Settings with a value that the type checks of the tests would stop before the package's own checks see it."""
    for name, value in wrong.items():
        object.__setattr__(settings, name, value)
    return settings


def says(*parts):
    """A pattern that wants all parts, in this order."""
    return "(?s)" + ".*".join(map(re.escape, parts))


# names


@pytest.mark.parametrize("use", [sepcap.load_task, lambda task: config(task, "local-prose") and sepcap.load_task(task)])
def test_unknown_task(use):
    with pytest.raises(ValueError, match=says("task='local-prosa' is not known", "Did you mean 'local-prose'", "'local-code'", ".jsonl")):
        use("local-prosa")


def test_unknown_site(tiny_opt, letters):
    wanted = says("site='attn_preout' is not known", "Did you mean 'attn_pre_out'", "'mlp'")
    with pytest.raises(ValueError, match=wanted):
        sepcap.collect(tiny_opt, letters, tokens=100, sites=["attn_preout"])
    with pytest.raises(ValueError, match=wanted):
        sepcap.NeuronSet.random(tiny_opt, {"attn_preout": 0.1})
    with pytest.raises(ValueError, match=wanted):
        sepcap.NeuronSet({"attn_preout": torch.zeros(2, 3, 4, dtype=torch.bool)})
    with pytest.raises(ValueError, match=wanted):
        config("local-code", "local-prose", fractions={"attn_preout": 0.1})


def test_site_that_was_not_collected(tiny_opt, letters):
    stats = sepcap.collect(tiny_opt, letters, tokens=100, sites="mlp")
    with pytest.raises(ValueError, match=says("site='attn_pre_out' is not known", "'mlp'", "Collect it too")):
        stats["attn_pre_out"]


def test_unknown_importance(tiny_opt, letters):
    stats = sepcap.collect(tiny_opt, letters, tokens=100)
    with pytest.raises(ValueError, match=says("importance='abss' is not known", "Did you mean 'abs'", "'rms'")):
        sepcap.score(stats, stats, "abss")
    with pytest.raises(ValueError, match=says("importance='sqr' is not known", "Did you mean 'sqrt'", "'random'")):
        unchecked(config("local-code", "local-prose"), importance="sqr").__post_init__()


def test_unknown_kind_of_ablation(tiny_opt):
    neurons = sepcap.NeuronSet.random(tiny_opt, {"mlp": 0.1})
    with (
        pytest.raises(ValueError, match=says("kind='meen' is not known", "Did you mean 'mean'", "'zero'", "mapping from site")),
        sepcap.ablate(tiny_opt, neurons, "meen"),
    ):
        pass


def test_unknown_dtype(tiny_folders):
    with pytest.raises(ValueError, match=says("dtype='bf16' is not known", "'bfloat16'")):
        sepcap.load_model(tiny_folders["opt"], dtype="bf16")


# models


@pytest.mark.parametrize("offline", [True, False])
def test_hub_model_without_network(monkeypatch, tmp_path, offline):
    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")

    for place, name in ((socket, "getaddrinfo"), (socket, "create_connection"), (socket.socket, "connect")):
        monkeypatch.setattr(place, name, refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.perf_counter()
    wanted = says("model='facebook/opt-1.3b'", "Alternatives: load_model()", "folder", "HF_HOME", "HF_ENDPOINT")
    with pytest.raises(ConnectionError, match=wanted):
        sepcap.load_model("facebook/opt-1.3b")
    assert time.perf_counter() - started < 1


def test_path_that_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=says("model='/no/such/folder': there is no such folder")):
        sepcap.load_model("/no/such/folder")
    with pytest.raises(FileNotFoundError, match=says("model='nothing'", "no such folder")):
        sepcap.load_model(Path("nothing"))
    with pytest.raises(FileNotFoundError, match=says("'a model' is neither an existing folder nor a name of a hub model ('owner/name')")):
        sepcap.load_model("a model")
    with pytest.raises(FileNotFoundError, match=says(str(tmp_path), "without config.json")):
        sepcap.load_model(tmp_path)
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(FileNotFoundError, match=says("model.safetensors' is a file; give the folder")):
        sepcap.load_model(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("left", [[], ["tokenizer_config.json"]])
def test_folder_without_tokenizer(family, tiny_folders, tmp_path, left):
    gone = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"} - set(left)
    folder = shutil.copytree(tiny_folders[family], tmp_path / "model", ignore=shutil.ignore_patterns(*gone))
    with pytest.raises(ValueError, match=says("the folder", "model' has no tokenizer", "save_pretrained(folder)", "tokenizer=")):
        sepcap.load_model(folder)


def test_empty_tokenizer(tiny_folders, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    wanted = says("the tokenizer of", "is empty: ", "save_pretrained(folder)", "tokenizer=")
    folder = shutil.copytree(tiny_folders["opt"], tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    for backend in (Tokenizer(models.BPE()), Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))):
        empty = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<unk>", eos_token="<unk>", unk_token="<unk>")
        with pytest.raises(ValueError, match=wanted):
            sepcap.load_model(tiny_folders["opt"], tokenizer=empty)
        empty.save_pretrained(folder)
        with pytest.raises(ValueError, match=wanted):
            sepcap.load_model(folder)


# data


def test_empty_dataset(tiny_opt):
    for nothing in ([], ["", "  \n"], datasets.Dataset.from_dict({"text": []})):
        with pytest.raises(ValueError, match=says("no text")):
            sepcap.collect(tiny_opt, nothing, tokens=100)


def test_dataset_shorter_than_one_context(tiny_opt):
    wanted = says("too little text to collect", "1 documents with", "less than one context of 32 tokens", "smaller context")
    with pytest.raises(ValueError, match=wanted):
        sepcap.collect(tiny_opt, ["a b", "c d"], tokens=100)
    with pytest.raises(ValueError, match=says("too little text to evaluate", "less than one context of 32 tokens")):
        sepcap.evaluate(tiny_opt, ["a b", "c d"], tokens=100)


def test_forget_and_retain_the_same(tiny_opt, letters, tmp_path):
    for other in (letters, list(reversed(letters)), datasets.Dataset.from_dict({"text": letters})):
        with pytest.raises(ValueError, match=says("forget and retain are the same data")):
            sepcap.prune(tiny_opt, config(letters, other), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fewer_tokens_than_asked_for(tiny_opt, letters, digits, tmp_path):
    few = letters[:6]
    wanted = says("fewer tokens to collect than the 1,000,000 asked for", "documents with", "continuing with those")
    with pytest.warns(UserWarning, match=wanted):
        stats = sepcap.collect(tiny_opt, few, tokens=1_000_000)
    assert stats.info["asked"] == 1_000_000
    assert 31 < stats.info["tokens"] == stats["mlp"].count < 1_000_000
    with pytest.warns(UserWarning, match=wanted):
        run = sepcap.prune(tiny_opt, config(few, digits, tokens=1_000_000, steps=1), out=tmp_path / "run")
    assert run.config["tokens"] == 1_000_000
    assert run.config["tokens_found"]["collect"]["forget"] == stats.info["tokens"]


@pytest.mark.parametrize("name", ["tokens", "batch_size"])
def test_counts_below_one(tiny_opt, letters, name):
    with pytest.raises(ValueError, match=says(f"{name}=0: give at least 1")):
        sepcap.collect(tiny_opt, letters, **{"tokens": 100, name: 0})
    with pytest.raises(ValueError, match=says(f"{name}=-1: give at least 1")):
        config(letters, "local-prose", **{name: -1})


@pytest.mark.parametrize(("context", "said"), [(1, ["give at least 2"]), (-4, ["give at least 2"]), (33, ["at most 32 tokens", "2 to 32"])])
def test_context_the_model_cannot_see(tiny_opt, letters, context, said):
    with pytest.raises(ValueError, match=says(f"context={context}", *said)):
        sepcap.collect(tiny_opt, letters, tokens=100, context=context)


# fractions


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5])
def test_fraction_outside_its_range(tiny_opt, letters, fraction):
    wanted = says(f"fractions['mlp']={fraction}", "a fraction lies in (0, 1], 0.02 for two percent")
    stats = sepcap.collect(tiny_opt, letters, tokens=100)
    with pytest.raises(ValueError, match=wanted):
        sepcap.score(stats, stats).top({"mlp": fraction})
    with pytest.raises(ValueError, match=wanted):
        sepcap.NeuronSet.random(tiny_opt, {"mlp": fraction})
    with pytest.raises(ValueError, match=wanted):
        config("local-code", "local-prose", fractions={"mlp": fraction}, steps=1)


def test_fraction_that_selects_no_neuron(tiny_opt, letters, digits, tmp_path):
    wanted = says("fractions['mlp']=0.001 selects no neuron: 0.001 of 144 is less than 1", "The least is 0.0069")
    with pytest.raises(ValueError, match=wanted):
        sepcap.NeuronSet.random(tiny_opt, {"mlp": 0.001})
    with pytest.raises(ValueError, match=wanted):
        sepcap.prune(tiny_opt, config(letters, digits, fractions={"mlp": 0.001}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fractions_that_exceed_what_is_left(tiny_opt):
    gone = sepcap.NeuronSet.random(tiny_opt, {"mlp": 0.75})
    with pytest.raises(ValueError, match=says("fractions['mlp']=0.5: 72 neurons to select but only 36 of 144 are left")):
        sepcap.NeuronSet.random(tiny_opt, {"mlp": 0.5}, exclude=gone)
    wanted = says("fractions['mlp']=0.3 in 4 steps prunes 120% of the neurons", "At most 3 steps of 0.3", "0.25")
    with pytest.raises(ValueError, match=wanted):
        config("local-code", "local-prose", fractions={"mlp": 0.3}, steps=4)


# statistics, scores and sets


def test_freq_on_attention(tiny_opt, letters):
    wanted = says("importance='freq' is undefined for", "attn_pre_out", "no activation function", "Use 'abs'")
    stats = sepcap.collect(tiny_opt, letters, tokens=100)
    with pytest.raises(ValueError, match=says("'freq' is undefined for site 'attn_pre_out'", "no activation function", "Use 'abs'")):
        sepcap.score(stats, stats, "freq")
    assert set(sepcap.score(stats, stats, "freq", sites=["mlp"])) == {"mlp"}
    with pytest.raises(ValueError, match=wanted):
        config("local-code", "local-prose", importance="freq", fractions={"mlp": 0.1, "attn_pre_out": 0.1})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_activations(tiny_opt, letters, value):
    with torch.no_grad():
        tiny_opt.blocks[1].mlp.W_in[0, 5] = value
    with pytest.raises(FloatingPointError, match=says("site 'mlp' in layer 1 are NaN or infinite", "dtype='float32'")):
        sepcap.collect(tiny_opt, letters, tokens=100)


@pytest.fixture
def wider():
    """A model of another width."""
    from conftest import tiny_config, tiny_tokenizer
    from transformers import AutoModelForCausalLM

    shape = tiny_config("opt")
    shape.ffn_dim = 80
    return sepcap.load_model(AutoModelForCausalLM.from_config(shape), tokenizer=tiny_tokenizer(), device="cpu")


def test_statistics_of_another_models_shape(tiny_opt, wider, letters):
    mine, theirs = (sepcap.collect(model, letters, tokens=100) for model in (tiny_opt, wider))
    with pytest.raises(ValueError, match=says("'mlp'", "[2, 72]", "[2, 80]", "different models")):
        sepcap.score(mine, theirs)
    with pytest.raises(ValueError, match=says("cannot merge", "of model", "the neurons are not the same")):
        mine.merge(theirs)
    with pytest.raises(ValueError, match=says("cannot merge", "[2, 80]", "[2, 72]")):  # where neither says of which model it is
        sepcap.Statistics(mine).merge(sepcap.Statistics(theirs))
    neurons = sepcap.NeuronSet.random(tiny_opt, {"mlp": 0.1})
    with pytest.raises(ValueError, match=says("'mlp'", "[2, 80]", "[2, 72]")), sepcap.ablate(tiny_opt, neurons, "mean", reference=theirs):
        pass


def test_neurons_of_another_models_shape(tiny_opt, wider):
    theirs = sepcap.NeuronSet.random(wider, {"mlp": 0.1})
    wanted = says("neurons: the mask of site 'mlp' is [2, 80] but this model has [2, 72]", "another model")
    before = tiny_opt(token_ids())
    with pytest.raises(ValueError, match=wanted):
        sepcap.delete(tiny_opt, theirs)
    with pytest.raises(ValueError, match=wanted), sepcap.ablate(tiny_opt, theirs):
        pass
    assert torch.equal(tiny_opt(token_ids()), before)
    with pytest.raises(ValueError, match=says("'mlp'", "[2, 72]", "[2, 80]")):
        sepcap.NeuronSet.random(tiny_opt, {"mlp": 0.1}) | theirs


def test_mean_ablation_without_a_reference(tiny_opt, letters):
    neurons = sepcap.NeuronSet.random(tiny_opt, {"attn_value": 0.1})
    with pytest.raises(ValueError, match=says("kind='mean' needs reference=", "sepcap.collect")), sepcap.ablate(tiny_opt, neurons, "mean"):
        pass
    reference = sepcap.collect(tiny_opt, letters, tokens=100, sites="mlp")
    with (
        pytest.raises(ValueError, match=says("'attn_value'", "Collect it too")),
        sepcap.ablate(tiny_opt, neurons, "mean", reference=reference),
    ):
        pass


def test_constants_that_do_not_fit(tiny_opt):
    neurons = sepcap.NeuronSet.random(tiny_opt, {"mlp": 0.1})
    for constants, came in (({}, "nothing"), ({"mlp": torch.zeros(2, 71)}, "[2, 71]")):
        with (
            pytest.raises(ValueError, match=says("constants of site 'mlp'", came, "[2, 72]")),
            sepcap.ablate(tiny_opt, neurons, constants),
        ):
            pass


# memory


def test_out_of_memory_in_collect_and_evaluate(tiny_opt, letters, monkeypatch):
    measure = {
        "collect": lambda size: sepcap.collect(tiny_opt, letters, tokens=300, batch_size=size)["mlp"].sums["absolute"],
        "evaluate": lambda size: torch.tensor(sepcap.evaluate(tiny_opt, letters, tokens=300, batch_size=size).per_row),
    }
    expected = {name: f(2) for name, f in measure.items()}
    real = type(tiny_opt).forward

    def small_machine(self, ids, *args, **kwargs):
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(self, ids, *args, **kwargs)

    monkeypatch.setattr(type(tiny_opt), "forward", small_machine)
    for name, f in measure.items():
        with pytest.warns(UserWarning, match=says("out of memory: continuing with batch_size=2")):
            assert torch.equal(f(4), expected[name])


def test_nothing_is_hooked_after_any_of_it(tiny_opt, letters):
    before = {name: len(point.fwd_hooks) for name, point in tiny_opt.hook_dict.items()}

    def stop(z, hook):
        raise KeyError("a hook of the user's own")

    with tiny_opt.hooks(fwd_hooks=[(get_site("mlp").hook_name(0), stop)]), pytest.raises(KeyError):
        sepcap.collect(tiny_opt, letters, tokens=100)
    assert {name: len(point.fwd_hooks) for name, point in tiny_opt.hook_dict.items()} == before


def test_wrong_kinds_of_argument_are_named(tiny_opt, letters, tmp_path):
    for call, said in {
        lambda: sepcap.collect("default", letters): "model is a str; give what sepcap.load_model returns",
        lambda: sepcap.evaluate("default", letters): "model is a str",
        lambda: sepcap.delete(tiny_opt, "runs/code"): "neurons='runs/code': give a NeuronSet",
        lambda: sepcap.ablate(tiny_opt, layer=0, kind="resample", reference=["a text"]): "reference=['a text']: give a Statistics",
        lambda: sepcap.Scores.top(sepcap.Scores({}), 0.1): "fractions=0.1: give a mapping",
    }.items():
        with pytest.raises(TypeError, match=says(said)):
            call()
    with pytest.raises(IsADirectoryError, match="is a folder; give a file of neurons"):
        sepcap.NeuronSet.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such file or folder"):
        sepcap.load_task(str(tmp_path / "texts.txt"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(tiny_folders):
    with pytest.raises(ValueError, match=r"device='cuda': torch sees no CUDA device"):
        sepcap.load_model(tiny_folders["opt"], device="cuda")
