"""Loading: from everywhere, with nothing taken on trust and no waiting for a network that is not there."""

import io
import json
import os
import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import tiny_config, tiny_tokenizer
from plain import Plain, token_ids
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import sepcap
from sepcap.errors import CorruptFile
from sepcap.models.loading.hub import must_be_local, reachable
from sepcap.models.loading.reading import _no_bars
from sepcap.tasks.samples import sample_task


@pytest.fixture
def folder(tiny_folders, tmp_path):
    """A copy of the tiny Llama's folder that a test may spoil."""
    return Path(shutil.copytree(tiny_folders["llama"], tmp_path / "model"))


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to connect fails; gives the list of attempts."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return attempts


@pytest.fixture(params=[True, False], ids=["HF_HUB_OFFLINE", "online"])
def offline(request, monkeypatch):
    """Whether HF_HUB_OFFLINE is set."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", request.param)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    return request.param


@pytest.fixture
def cache(monkeypatch, tmp_path, tiny_folders):
    """An empty cache of hub models; gives a function that puts the tiny Llama into it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(name, without=()):
        home = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(tiny_folders["llama"], home / "snapshots" / "abc", ignore=shutil.ignore_patterns(*without))
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text("abc")

    return put


def test_folder_gives_a_bridge_with_the_plain_models_logits(tiny, family, tiny_folders):
    from transformer_lens.model_bridge import TransformerBridge

    assert isinstance(tiny, TransformerBridge)
    assert not tiny.training
    with torch.no_grad():
        torch.testing.assert_close(tiny(token_ids()), Plain(family, tiny_folders[family]).run(token_ids()), atol=1e-5, rtol=0)
    assert sepcap.load_model(tiny) is tiny


def test_path_object_and_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(sepcap.load_model(folder, device="cpu")(ids), sepcap.load_model("~/model", device="cpu")(ids))


def test_model_object_with_tokenizer(family, tiny_folders):
    hf_model = AutoModelForCausalLM.from_pretrained(tiny_folders[family])
    model = sepcap.load_model(hf_model, tokenizer=AutoTokenizer.from_pretrained(tiny_folders[family]), device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids()), Plain(family, tiny_folders[family]).run(token_ids()), atol=1e-5, rtol=0)


def test_tokenizer_made_in_memory(letters):
    """It has no place from which it could be loaded again."""
    model = sepcap.load_model(AutoModelForCausalLM.from_config(tiny_config("opt")), tokenizer=tiny_tokenizer(), device="cpu")
    assert sepcap.collect(model, letters, tokens=100)["mlp"].count == 100


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", torch.bfloat16])
def test_dtype(tiny_folders, dtype):
    model = sepcap.load_model(tiny_folders["neox"], device="cpu", dtype=dtype)
    want = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {p.dtype for p in model.parameters()} == {want}
    assert model(token_ids()).dtype == want
    assert model.cfg.dtype == want


def test_a_model_object_is_cast_too():
    hf_model = AutoModelForCausalLM.from_config(tiny_config("gpt2")).to(torch.bfloat16)
    model = sepcap.load_model(hf_model, tokenizer=tiny_tokenizer(), device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_tokenizer_is_the_one_given_with_what_was_added_to_it(tiny_folders):
    """A bridge alone would load it anew from where it came, and the addition would be gone."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folders["opt"])
    tokenizer.add_tokens(["quux"])
    before = dict(tokenizer.init_kwargs)
    model = sepcap.load_model(tiny_folders["opt"], tokenizer=tokenizer, device="cpu")
    assert model.tokenizer("quux", add_special_tokens=False)["input_ids"] == [len(tokenizer) - 1]
    assert tokenizer.init_kwargs == before
    assert model.tokenizer.init_kwargs == before


def test_text_goes_in_behind_one_bos(tiny):
    """`to_tokens` of the bridge knows that this tokenizer does not prepend BOS itself."""
    ids = tiny.tokenizer("fox", add_special_tokens=False)["input_ids"]
    assert tiny.to_tokens("fox", prepend_bos=True).tolist() == [[0, *ids]]
    assert tiny.to_tokens("fox", prepend_bos=False).tolist() == [ids]


def test_no_token_is_invented_where_the_tokenizer_has_neither_bos_nor_eos(tiny_folders, letters):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    model = sepcap.load_model(tiny_folders["llama"], tokenizer=tokenizer, device="cpu")
    assert model.tokenizer.bos_token_id is None
    assert len(model.tokenizer) == len(tiny_tokenizer())
    stats = sepcap.collect(model, letters, tokens=100)  # rows without BOS: every position counts
    assert stats["mlp"].count == 100


def test_unk_is_not_taken_for_bos(tiny_folders):
    """It would open every row, and neither count nor be a target: with two of three tokens unknown most of the statistics were missing."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="<unk>")
    model = sepcap.load_model(tiny_folders["llama"], tokenizer=tokenizer, device="cpu")
    assert (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id, model.tokenizer.unk_token_id) == (None, None, 0)
    rows = sample_task(model, sepcap.load_task(["aäö" * 30 + "b" * i for i in range(60)]), "collect", 100, per_document=None).rows
    assert rows[0][:3].tolist() == [1, 0, 0]
    assert sum(map(len, rows)) == 100


def test_a_folder_needs_no_network(tiny_folders, no_network, family, offline):
    sepcap.load_model(tiny_folders[family], device="cpu")
    assert no_network == []


def test_small_folder_shows_no_bar_and_leaves_bars_as_they_were(tiny_folders, monkeypatch):
    from transformers.utils import logging

    bars = []

    def mine(make, args, kwargs):
        bars.append(kwargs.get("desc"))
        return make(*args, **kwargs)

    before = logging.set_tqdm_hook(mine)
    try:
        sepcap.load_model(tiny_folders["opt"], device="cpu")
        assert bars == []
        assert logging.set_tqdm_hook(mine) is mine
        monkeypatch.setattr("sepcap.models.loading.reading.SMALL", 1000)  # a large one shows transformers' own
        sepcap.load_model(tiny_folders["opt"], device="cpu")
        assert bars
        with pytest.raises(ZeroDivisionError), _no_bars():
            raise ZeroDivisionError
        assert logging.set_tqdm_hook(mine) is mine
    finally:
        logging.set_tqdm_hook(before)


def test_hub_name_without_network_fails_at_once_with_the_ways_out(no_network, offline, cache):
    started = time.perf_counter()
    with pytest.raises(ConnectionError) as error:
        sepcap.load_model("nobody/nothing-1b")
    assert time.perf_counter() - started < 1
    for part in ("'nobody/nothing-1b'", "load_model()", "folder", "HF_HOME", "HF_ENDPOINT"):
        assert part in str(error.value)
    assert bool(no_network) == (not offline)


@pytest.mark.thorough
def test_a_network_that_never_answers_is_given_up(monkeypatch, cache):
    """Resolving a name without network takes ten seconds and more, which no timeout of a socket bounds."""
    ended = threading.Event()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: ended.wait(20) and [])
    started = time.perf_counter()
    try:
        with pytest.raises(ConnectionError, match="does not answer within"):
            sepcap.load_model("nobody/nothing-1b")
    finally:
        ended.set()
    assert time.perf_counter() - started < 2.5


def test_cached_hub_model_loads_without_network(no_network, offline, cache, tiny_folders):
    cache("someone/tiny")
    started = time.perf_counter()
    model = sepcap.load_model("someone/tiny", device="cpu")
    assert time.perf_counter() - started < 5
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids()), Plain("llama", tiny_folders["llama"]).run(token_ids()), atol=1e-5, rtol=0)
    assert model.cfg.model_name == "someone/tiny"


def test_half_cached_hub_model_without_network(no_network, offline, cache):
    cache("someone/half", without=("model.safetensors",))
    with pytest.raises(ConnectionError, match="'someone/half' is incomplete in the local Hugging Face cache"):
        sepcap.load_model("someone/half", device="cpu")


def test_hub_that_answers_is_asked(monkeypatch, cache):
    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(503 if "broken" in self.path else 404)
            self.end_headers()

        def log_message(self, format, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    huggingface_hub.close_session()
    try:
        assert must_be_local("nobody/nothing", None) is False  # "no such model" is the hub's own answer
        with pytest.raises(ConnectionError):
            must_be_local("nobody/broken", None)
        assert not reachable("http://127.0.0.1:1/x")
    finally:
        server.shutdown()
        server.server_close()
        huggingface_hub.close_session()


def test_code_of_a_checkpoint_is_not_run(folder):
    marker = folder / "was-run"
    code = ["from transformers import PretrainedConfig", f"open({str(marker)!r}, 'w')", "class C(PretrainedConfig): model_type = 'evil'"]
    (folder / "evil.py").write_text("\n".join(code))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        sepcap.load_model(folder, device="cpu")
    assert not marker.exists()


def as_pickle(folder, extra=None):
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    torch.save({**state, **(extra or {})}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_old_checkpoint_of_tensors_loads(folder):
    expected = Plain("llama", folder).run(token_ids())
    as_pickle(folder)
    with torch.no_grad():
        torch.testing.assert_close(sepcap.load_model(folder, device="cpu")(token_ids()), expected, atol=1e-5, rtol=0)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


def test_pickled_code_is_not_run(folder):
    as_pickle(folder, {"x": Evil(str(folder / "was-run"))})
    with pytest.raises(CorruptFile, match="no code in them was run"):
        sepcap.load_model(folder, device="cpu")
    assert not (folder / "was-run").exists()


def test_safetensors_win_over_pickle(folder):
    torch.save({"x": Evil(str(folder / "was-run"))}, folder / "pytorch_model.bin")
    sepcap.load_model(folder, device="cpu")
    assert not (folder / "was-run").exists()


def test_truncated_weights(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFile, match=r"corrupt or truncated"):
        sepcap.load_model(folder, device="cpu")


def test_missing_weights_are_not_made_up(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights .* model\.layers\.1\.mlp\.up_proj\.weight"):
        sepcap.load_model(folder, device="cpu")


def test_a_model_object_that_is_none():
    with pytest.raises(ValueError, match="tokenizer is missing"):
        sepcap.load_model(AutoModelForCausalLM.from_config(tiny_config("opt")))
    with pytest.raises(TypeError, match="model is a BytesIO"):
        sepcap.load_model(io.BytesIO(), tokenizer=tiny_tokenizer())
    with pytest.raises(TypeError, match="OPTModel predicts no tokens"):
        sepcap.load_model(AutoModel.from_config(tiny_config("opt")), tokenizer=tiny_tokenizer())


def test_a_wrapped_model_object_is_refused():
    hf_model = AutoModelForCausalLM.from_config(tiny_config("opt"))
    sepcap.load_model(hf_model, tokenizer=tiny_tokenizer(), device="cpu")
    with pytest.raises(ValueError, match="TransformerBridge wraps this OPTForCausalLM already"):
        sepcap.load_model(hf_model, tokenizer=tiny_tokenizer(), device="cpu")


def test_gpt2_without_scaled_attention_is_refused():
    import transformers as t

    config = t.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=len(tiny_tokenizer()), scale_attn_weights=False)
    with pytest.raises(NotImplementedError, match="scale_attn_weights"):
        sepcap.load_model(t.GPT2LMHeadModel(config), tokenizer=tiny_tokenizer(), device="cpu")


def test_random_weights_are_another_model_of_the_same_configuration(tiny_folders):
    trained = sepcap.load_model(tiny_folders["opt"], device="cpu")
    first, same, other = (sepcap.load_model(tiny_folders["opt"], device="cpu", random_weights=True, seed=seed) for seed in (0, 0, 1))
    weights = [model.blocks[0].mlp.W_in for model in (first, same, other, trained)]
    assert weights[0].shape == weights[3].shape
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])


def test_random_weights_do_not_depend_on_the_precision_of_the_checkpoint(tiny_folders, tmp_path):
    shutil.copytree(tiny_folders["opt"], tmp_path / "half")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    (tmp_path / "half" / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    folders = (tiny_folders["opt"], tmp_path / "half")
    whole, of_half = (sepcap.load_model(folder, device="cpu", random_weights=True, seed=1).blocks[0].mlp.W_in for folder in folders)
    assert whole.dtype == of_half.dtype == torch.float32
    assert torch.equal(whole, of_half)
    assert not torch.equal(whole, whole.bfloat16().float())
    rounded = sepcap.load_model(tmp_path / "half", device="cpu", dtype="bfloat16", random_weights=True, seed=1).blocks[0].mlp.W_in
    assert torch.equal(rounded, whole.bfloat16())


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("DistilBertForMaskedLM", {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}, "does not support it"),
        (
            "SwinForImageClassification",
            {"image_size": 8, "embed_dim": 4, "depths": [1], "num_heads": [1], "window_size": 2},
            "does not support it",
        ),
        ("T5ForConditionalGeneration", {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}, "an encoder and a decoder"),
    ],
)
def test_a_class_without_a_bridge_is_named_with_what_works(kind, options, why, tmp_path):
    import transformers

    hf_model = getattr(transformers, kind)(getattr(transformers, kind).config_class(**options))
    hf_model.save_pretrained(tmp_path)
    said = rf"is a {kind}, which sepcap does not support: .*{why}.*docs/families.md"
    with pytest.raises(NotImplementedError, match=said):
        sepcap.load_model(tmp_path, device="cpu", tokenizer=tiny_tokenizer(), processor=object())
    hf_model.get_output_embeddings = lambda: object()
    with pytest.raises(NotImplementedError, match=said):
        sepcap.load_model(hf_model, device="cpu", tokenizer=tiny_tokenizer(), processor=object())


def test_gpt_neox_without_biases_is_refused(tmp_path):
    import transformers

    config = tiny_config("neox")
    config.attention_bias = False
    with pytest.raises(NotImplementedError, match="no biases in its attention"):
        sepcap.load_model(transformers.AutoModelForCausalLM.from_config(config), tokenizer=tiny_tokenizer(), device="cpu")


def test_a_folder_with_a_short_name_of_the_library_is_loaded_itself(tiny_folders, tmp_path, monkeypatch, caplog, capsys):
    (tmp_path / "neox").symlink_to(tiny_folders["neox"], target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    model = sepcap.load_model("neox", device="cpu")
    assert model.cfg.model_name == "neox"
    said = capsys.readouterr()
    assert "gpt-neox-20b" not in caplog.text + said.out + said.err
