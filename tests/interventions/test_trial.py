"""An edit is tried on a few tokens before it counts: modules that compute with more than their weight are found by what they do."""

from typing import Any

import pytest
import torch
from conftest import tiny_tokenizer
from torch import nn
from transformers import LlamaForCausalLM, OPTForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import sepcap
from sepcap.interventions import trial
from sepcap.models.sites import SITES, bind
from sepcap.models.weights import fingerprint


@pytest.fixture(autouse=True)
def every_trial_is_made(monkeypatch):
    monkeypatch.setattr(trial, "_try_deletion", trial._try_deletion.__wrapped__)


WHERE = {"mlp": ("fc1", "fc2"), "attn_pre_out": ("self_attn.out_proj",), "attn_value": ("self_attn.v_proj", "self_attn.out_proj")}


class Beside(nn.Linear):
    """Something of low rank is added in forward, as an adapter does."""

    def plant(self):
        generator = torch.Generator().manual_seed(0)
        self.low = [torch.randn(self.in_features, 2, generator=generator) / 20, torch.randn(2, self.out_features, generator=generator) / 20]

    def forward(self, input):
        return super().forward(input) + input @ self.low[0] @ self.low[1]


class Copied(nn.Linear):
    """Half of what it multiplies by is a second copy of the weight."""

    def plant(self):
        self.other = self.weight.detach().clone()

    def forward(self, input):
        return nn.functional.linear(input, (self.weight + self.other) / 2, self.bias)


class Unbiased(nn.Linear):
    """The bias is there and not added."""

    def plant(self):
        pass

    def forward(self, input):
        return nn.functional.linear(input, self.weight)


class Past(LlamaMLP):
    """The output weights are called for show; a copy of them is what counts."""

    hidden: torch.Tensor

    def forward(self, x):
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        self.down_proj(h)
        return nn.functional.linear(h, self.hidden)


class Cached(nn.Linear):
    """The transposed weight is kept from the first pass on."""

    def plant(self):
        self.cached = None

    def forward(self, input):
        if self.cached is None:
            self.cached = self.weight.detach().T.contiguous()
        return input @ self.cached + self.bias


def planted(folder, kind, layer, where):
    """A loaded model with a module of that class in one place."""
    hf_model = OPTForCausalLM.from_pretrained(folder)
    module: Any = hf_model.get_submodule(f"model.decoder.layers.{layer}.{where}")
    module.__class__ = kind
    module.plant()
    return sepcap.load_model(hf_model, tokenizer=tiny_tokenizer(), device="cpu")


def some(model, site):
    return sepcap.NeuronSet.random(model, {site: 0.2}, seed=0)


@pytest.mark.parametrize("kind", [Beside, Copied, Cached])
@pytest.mark.parametrize(("site", "where"), [(site, where) for site, places in WHERE.items() for where in places])
def test_a_module_that_computes_with_more_than_its_weight_is_found(tiny_folders, kind, site, where):
    model = planted(tiny_folders["opt"], kind, 1, where)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=rf"deleting '{site}' neurons of this \w+: in layer 1 the weights do not act.*Nothing was changed"):
        sepcap.delete(model, some(model, site))
    assert fingerprint(model) == before


@pytest.mark.parametrize("kind", [Copied, Cached])
@pytest.mark.parametrize("where", ["self_attn.v_proj", "self_attn.out_proj"])
def test_a_rotation_that_does_not_keep_the_logits_is_taken_back(tiny_folders, kind, where):
    model = planted(tiny_folders["opt"], kind, 0, where)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"rotation of this \w+: in layer 0 the weights do not act.*Nothing was changed"):
        sepcap.rotate_values(model)
    assert fingerprint(model) == before


def test_an_output_bias_that_is_not_added_is_found_before_an_offset(tiny_folders):
    model = planted(tiny_folders["opt"], Unbiased, 1, "fc2")
    before, neurons = fingerprint(model), some(model, "mlp")
    with pytest.raises(ValueError, match="deleting 'mlp' neurons with an offset of this"):
        sepcap.delete(model, neurons, {"mlp": torch.ones(neurons.masks["mlp"].shape)})
    assert fingerprint(model) == before
    sepcap.delete(model, neurons)  # of which it makes a right one


def test_an_mlp_that_goes_past_its_output_weights_is_found(tiny_folders):
    """Hooks and weights agree there: neither does anything."""
    hf_model = LlamaForCausalLM.from_pretrained(tiny_folders["llama"])
    mlp: Any = hf_model.get_submodule("model.layers.0.mlp")
    mlp.__class__ = Past
    mlp.hidden = mlp.down_proj.weight.detach().clone()
    model = sepcap.load_model(hf_model, tokenizer=tiny_tokenizer(), device="cpu")
    with pytest.raises(ValueError, match=r"in layer 0 .* does not reach the residual stream"):
        sepcap.delete(model, some(model, "mlp"))


@pytest.mark.parametrize("site", SITES)
def test_a_trial_leaves_the_model_as_it_was_and_is_made_once(tiny, site, monkeypatch):
    before, grads = fingerprint(tiny), [p.requires_grad for p in tiny.parameters()]
    trial.check_deletion(bind(tiny, site))
    assert fingerprint(tiny) == before
    assert [p.requires_grad for p in tiny.parameters()] == grads
    monkeypatch.setattr(trial, "one_pass", lambda *_: pytest.fail("tried again"))
    trial.check_deletion(bind(tiny, site))


def test_a_trial_that_breaks_off_puts_the_weights_back(tiny_opt, monkeypatch):
    before, passes = fingerprint(tiny_opt), []
    one_pass = trial.one_pass

    def interrupted(*args):
        passes.append(fingerprint(tiny_opt))
        if len(passes) == 3:
            raise KeyboardInterrupt
        return one_pass(*args)

    monkeypatch.setattr(trial, "one_pass", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sepcap.delete(tiny_opt, some(tiny_opt, "mlp"))
    assert passes[2] != before
    assert fingerprint(tiny_opt) == before


def test_the_trial_of_all_sites_is_before_the_first_edit(tiny_folders):
    model = planted(tiny_folders["opt"], Copied, 0, "self_attn.out_proj")
    before = fingerprint(model)
    with pytest.raises(ValueError, match="deleting 'attn_pre_out' neurons"):
        sepcap.delete(model, some(model, "mlp") | some(model, "attn_pre_out"))
    assert fingerprint(model) == before


def test_ablations_that_are_on_are_no_part_of_a_trial(tiny_opt):
    everything = sepcap.NeuronSet.random(tiny_opt, {"mlp": 1.0}, seed=0)
    with sepcap.ablate(tiny_opt, everything, "zero"):
        assert any(z.any() for z in trial.one_pass(bind(tiny_opt, "mlp")).neurons)
