"""Model objects as they come: what they compute decides, and what cannot be right is refused in one sentence."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from plain import Plain, token_ids
from tiny import tiny_tokenizer
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertLMHeadModel,
    FalconConfig,
    FalconForCausalLM,
    GPT2LMHeadModel,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

import sepcap
from sepcap.models.kinds import kind_of
from sepcap.models.loading.probe import PASSED, probed
from sepcap.models.wrappers import check_plain_weights, check_tokens
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import sample_task

TINY_BERT = BertConfig(
    vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32
)


class Mine(OPTForCausalLM):
    """A class of the user's own."""


class Odd(BertForMaskedLM):
    """A masked model whose name does not say so."""


@pytest.fixture
def plain(tiny_folders):
    return OPTForCausalLM.from_pretrained(tiny_folders["opt"])


@pytest.fixture(scope="module")
def tokenizer(tiny_folders):
    return AutoTokenizer.from_pretrained(tiny_folders["opt"])


def load(model, tokenizer, dtype="float32"):
    return sepcap.load_model(model, tokenizer=tokenizer, device="cpu", dtype=dtype)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapper_is_taken_off(plain, tokenizer, wrap):
    assert load(wrap(plain), tokenizer).original_model is plain


def test_a_subclass_is_what_it_is_derived_from(tiny_folders, tokenizer, tmp_path):
    hf_model = Mine.from_pretrained(tiny_folders["opt"])
    hf_model.config.architectures = None
    model = load(hf_model, tokenizer)
    assert kind_of(model) == "causal"
    sepcap.save_pretrained(model, tmp_path)
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(sepcap.load_model(tmp_path, device="cpu")(ids), model(ids))


def test_a_masked_model_of_any_name_is_masked():
    assert kind_of(Odd(TINY_BERT)) == "masked"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_that_sees_what_it_is_to_predict_is_refused(dtype):
    torch.manual_seed(0)
    with pytest.raises(NotImplementedError, match="with bidirectional attention"):
        load(BertLMHeadModel(TINY_BERT), tiny_tokenizer(), dtype)
    decoder = BertLMHeadModel(BertConfig(**TINY_BERT.to_diff_dict() | {"is_decoder": True}))
    probed(decoder.to(getattr(torch, dtype)), "the same as a decoder")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_masked_model_that_sees_one_side_only_is_refused(dtype):
    torch.manual_seed(0)
    causal = BertForMaskedLM(BertConfig(**TINY_BERT.to_diff_dict() | {"is_decoder": True}))
    with pytest.raises(NotImplementedError, match="a BertForMaskedLM with causal attention"):
        load(causal, tiny_tokenizer(), dtype)
    probed(BertForMaskedLM(TINY_BERT).to(getattr(torch, dtype)), "one that sees both")


def test_a_bridge_of_the_users_own_is_probed_once(tiny_folders, tokenizer, monkeypatch):
    model = load(OPTForCausalLM.from_pretrained(tiny_folders["opt"]), tokenizer)
    right, passes, share = model.forward, [], 0.0

    def forward(*args, **options):
        passes.append(1)
        logits = right(*args, **options)
        return logits + share * logits[:, -1:]

    monkeypatch.setattr(model, "forward", forward)
    assert sepcap.load_model(model) is model
    assert len(passes) == 0  # it was probed when it was loaded
    PASSED.discard(model)
    with model.hooks(fwd_hooks=[("blocks.0.hook_attn_out", lambda value, hook: value)]):
        assert sepcap.load_model(model) is model
        assert len(passes) == 0  # a hook of the user is not called
    for _ in range(3):
        assert sepcap.load_model(model) is model
    assert len(passes) == 1
    PASSED.discard(model)
    share = 0.1
    with pytest.raises(NotImplementedError, match="with bidirectional attention"):
        sepcap.load_model(model)


@pytest.mark.parametrize(("noise", "refused"), [(0.01, True), (0.2, False)])
def test_rounding_is_no_view_of_later_tokens(noise, refused):
    class Noisy(torch.nn.Embedding):
        """Logits that move by 0.1 with the last token, and by the noise from row to row."""

        def get_input_embeddings(self):
            return self

        def forward(self, ids):
            logits = torch.ones(*ids.shape, 320)
            logits[ids[:, -1] == ids[1, -1]] += 0.1
            logits[::2] += noise
            return SimpleNamespace(logits=logits)

    with pytest.raises(NotImplementedError, match="bidirectional attention") if refused else contextlib.nullcontext():
        probed(Noisy(320, 1), "noisy")


def test_a_hook_that_the_bridge_would_lose_is_named(tiny_folders, tokenizer):
    plain = GPT2LMHeadModel.from_pretrained(tiny_folders["gpt2"])
    plain.transformer.h[0].attn.register_forward_hook(lambda module, args, out: (out[0] * 3, *out[1:]))
    with pytest.raises(NotImplementedError, match="hook the TransformerBridge"):
        load(plain, tokenizer)


def test_a_hook_that_only_looks_and_is_lost_is_a_warning(tiny_folders, tokenizer):
    plain = GPT2LMHeadModel.from_pretrained(tiny_folders["gpt2"])
    plain.transformer.h[1].attn.register_forward_hook(lambda module, args, out: None)
    with pytest.warns(UserWarning, match=r"torch hooks on transformer\.h\.1\.attn are not called in every pass"):
        load(plain, tokenizer)


def test_loading_says_on_which_device_and_in_what_precision(plain, tokenizer, capsys):
    load(plain, tokenizer, "bfloat16")
    assert capsys.readouterr().out.splitlines()[-1].endswith(" on cpu in bfloat16")


def test_packed_weights_are_not_edited(tiny_opt):
    module = tiny_opt.blocks[1].mlp.out.original_component
    packed = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    module._parameters["weight"] = packed
    with pytest.raises(ValueError, match=r"delete edits weights, but blocks\.1\.mlp\.\S+ of this .* has quantised weights \(torch\.int8\)"):
        check_plain_weights(tiny_opt, ("mlp",), "delete")
    check_plain_weights(tiny_opt, ("attn",), "delete")


def test_a_token_without_an_embedding_is_named(plain):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"QUUX{i}" for i in range(400)])
    with pytest.raises(ValueError, match="320 embeddings"):
        load(plain, tokenizer)


@pytest.mark.parametrize("special", [False, True])
def test_a_vocabulary_with_gaps_is_as_large_as_its_largest_number(plain, special):
    own = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    if special:
        del own["model"]["vocab"]["</s>"]
        next(token for token in own["added_tokens"] if token["content"] == "</s>")["id"] = 5000
    own["model"]["vocab"].pop("Z")
    own["model"]["vocab"]["</s>" if special else "Z"] = 5000
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(own)), bos_token="<s>", eos_token="</s>")
    assert len(tokenizer) <= 320
    with pytest.raises(ValueError, match=r"token 5000, .* has 320 embeddings"):
        load(plain, tokenizer)


def test_a_padding_beyond_the_embedding_concerns_masked_models(plain):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"QUUX{i}" for i in range(320 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "<more>"})
    check_tokens(tokenizer, plain, "causal")
    with pytest.raises(ValueError, match="token 320, '<more>'"):
        check_tokens(tokenizer, BertForMaskedLM(TINY_BERT), "masked")


@pytest.mark.parametrize("site", ["mlp", "attn_value"])
def test_weights_with_a_parametrization_are_not_edited(plain, tokenizer, site):
    class Twice(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    for module in (plain.model.decoder.layers[1].fc1, plain.model.decoder.layers[1].self_attn.v_proj):
        torch.nn.utils.parametrize.register_parametrization(module, "weight", Twice())
    model = load(plain, tokenizer)
    mask = torch.zeros(sepcap.models.sites.site_shape(model, site), dtype=torch.bool)
    mask[:, 0] = True
    gone = sepcap.NeuronSet({site: mask})
    with sepcap.ablate(model, gone, "zero"):
        assert torch.isfinite(model(torch.arange(3, 12)[None])).all()
    with pytest.raises(ValueError, match="merge it first"):
        sepcap.delete(model, gone)
    with pytest.raises(ValueError, match="merge it first"):
        sepcap.models.weights.plain_state_dict(model)


def test_adapters_are_merged_before_an_edit(plain, tokenizer):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["fc1", "v_proj"])
    plain.add_adapter(config)
    model = load(plain, tokenizer)
    with pytest.raises(ValueError, match="merge the adapters"):
        sepcap.delete(model, sepcap.NeuronSet.random(model, {"mlp": 0.5}, seed=0))
    with pytest.raises(ValueError, match="merge the adapters"):
        sepcap.rotate_values(model)


SMALL = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 2}


def quantised(plain):
    return torch.ao.quantization.quantize_dynamic(plain, {torch.nn.Linear})


def falcon_40b(plain):
    return FalconForCausalLM(FalconConfig(new_decoder_architecture=True, num_kv_heads=2, **SMALL))


def phi_with_norms(plain):
    return PhiForCausalLM(PhiConfig(qk_layernorm=True, intermediate_size=64, max_position_embeddings=32, pad_token_id=1, **SMALL))


def ordinary_phi_that_breaks(plain):
    phi = PhiForCausalLM(PhiConfig(intermediate_size=64, max_position_embeddings=32, pad_token_id=1, **SMALL))
    phi.model.layers[0].self_attn.q_layernorm = torch.nn.Identity()
    return phi


@pytest.mark.filterwarnings("ignore:.*(quantization|quantize_per_tensor|TypedStorage|deprecated).*")
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (quantised, r"k_proj is a quantised Linear, .*load the model before quantisation"),
        (falcon_40b, r"does not support the layout of this FalconForCausalLM; .*: new_decoder_architecture=True$"),
        (phi_with_norms, r"does not support the layout of this PhiForCausalLM; .*: qk_layernorm=True$"),
        (ordinary_phi_that_breaks, r"does not support the layout of this PhiForCausalLM$"),
        (lambda plain: BertForPreTraining(TINY_BERT), r"is a BertForPreTraining, .*load it with .*AutoModelForMaskedLM$"),
        (lambda plain: plain.to("meta"), r"OPTForCausalLM is on the meta device, without weights"),
    ],
)
def test_what_cannot_be_hooked_is_refused_in_words_of_ones_own(plain, tokenizer, make, sentence):
    with pytest.raises((ValueError, NotImplementedError), match=sentence) as told:
        load(make(plain), tokenizer)
    assert "\n" not in str(told.value)


def adapted(kind, **options):
    def change(plain):
        config = getattr(pytest.importorskip("peft"), kind)
        plain.add_adapter(config(target_modules=["fc1", "fc2", "v_proj"], **options))

    return change


def weight_norm(plain):
    for layer in plain.model.decoder.layers:
        torch.nn.utils.weight_norm(layer.fc1)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        adapted("LoraConfig", r=2, init_lora_weights=False),
        adapted("LoraConfig", r=2, init_lora_weights=False, use_dora=True),
        adapted("IA3Config", feedforward_modules=["fc2"], init_ia3_weights=False),
        weight_norm,
    ],
    ids=["LoRA", "DoRA", "IA3", "weight_norm"],
)
def test_what_computes_with_more_than_its_weight_is_measured_and_ablated(tiny_folders, plain, tokenizer, letters, change):
    ids, other = token_ids(), Plain("opt", tiny_folders["opt"])
    before = other.run(ids)
    for hf_model in (other.hf, plain):
        torch.manual_seed(0)
        change(hf_model)
        with torch.no_grad():
            for name, parameter in hf_model.named_parameters():
                if "ia3" in name or name.endswith("weight_g"):
                    parameter.mul_(1.5)
    model = load(plain, tokenizer)
    gone = sepcap.NeuronSet.random(model, {"mlp": 0.3}, seed=0)
    expected = other.run(ids, zero=gone.masks)
    assert not torch.allclose(other.run(ids), before, atol=1e-2)
    with sepcap.ablate(model, gone, "zero"):
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-4)
    seen = []
    batch = next(iter(sample_task(model, load_task(letters), "collect", 50, 32).batches(8)))
    other.run(batch.inputs, look=lambda site, layer, z: seen.append(z[batch.keep].abs().mean(0)) if site == "mlp" else None)
    found = sepcap.collect(model, letters, sites="mlp", tokens=50, context=32)["mlp"].abs
    torch.testing.assert_close(found.float(), torch.stack(seen), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"merge .*What works: sepcap\.ablate$"):
        sepcap.delete(model, gone)


def test_a_peft_model_says_merge(tiny_folders, plain, tokenizer):
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="merge_and_unload"):
        load(peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["fc1"])), tokenizer)


def test_a_folder_with_adapters_says_merge(tmp_path, plain):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["fc1"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds adapters.*merge_and_unload"):
        sepcap.load_model(tmp_path)


def test_torch_defaults_change_no_logits(tiny_folders, tiny_opt):
    ids = torch.arange(3, 12)[None]
    expected = tiny_opt(ids)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            model = sepcap.load_model(tiny_folders["opt"], device="cpu")
        got = model(ids)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert got.requires_grad
    torch.testing.assert_close(got, expected)
