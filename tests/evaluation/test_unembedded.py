"""Ranks and losses from parts of the vocabulary, against those of whole logits; and which models have them."""

import math
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from sepcap.evaluation import unembedded
from sepcap.evaluation.next_token import evaluate_sample, rank_and_loss
from sepcap.evaluation.unembedded import ranks_and_losses
from sepcap.models.blocks import unembedding as module
from sepcap.models.blocks.unembedding import Unembedding, unembedding_of
from sepcap.tasks.batches import TokenSample


def linear(vocabulary: int, width: int, dtype: torch.dtype = torch.float32, bias: bool = False) -> nn.Linear:
    """Small whole numbers as weights: their products are exact, and many are equal."""
    torch.manual_seed(0)
    made = nn.Linear(width, vocabulary, bias=bias)
    for parameter in made.parameters():
        parameter.data = torch.randint(-2, 3, parameter.shape).to(dtype)
    return made


def sample(vocabulary: int = 320, rows: int = 5, length: int = 20) -> TokenSample:
    ids = np.random.default_rng(0).integers(3, vocabulary, size=(rows, length))
    ids[:, 0] = 0
    n = rows * (length - 1)
    return TokenSample("random", "evaluate", tuple(ids), 0, n, n, ([0],), "f")


@pytest.mark.parametrize("part", [1, 7, 16, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_cut_of_the_vocabulary_gives_the_ranks_and_losses_of_whole_logits(part, dtype, monkeypatch):
    monkeypatch.setattr(unembedded, "PART", part)
    monkeypatch.setattr(unembedded, "BLOCK", 13)
    layer = linear(50, 6, dtype, bias=part == 7)
    hidden, targets = torch.randint(-3, 4, (40, 6)).to(dtype), torch.randint(50, (40,))
    with torch.inference_mode():
        ranks, tied, losses = ranks_and_losses(Unembedding(layer), hidden, targets)
        expected = rank_and_loss(layer(hidden), targets)
    assert expected[0].unique().numel() > 10
    assert torch.equal(ranks, expected[0])  # with ties in nearly every row
    assert torch.equal(tied, expected[1])
    torch.testing.assert_close(losses.double(), expected[2].double(), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_logits_that_are_not_finite(monkeypatch):
    monkeypatch.setattr(unembedded, "PART", 2)
    layer = nn.Linear(1, 5)
    layer.weight.data = torch.ones(5, 1)
    layer.bias.data = torch.tensor([0.0, 1.0, -math.inf, -math.inf, 2.0])  # two tokens that cannot come, in a part of their own
    ranks, _, losses = ranks_and_losses(Unembedding(layer), torch.tensor([[0.0], [0.0], [0.0], [math.nan]]), torch.tensor([1, 4, 2, 1]))
    assert ranks[:2].tolist() == [1, 0]
    assert losses[0].item() == pytest.approx(math.log(1 + math.e + math.e**2) - 1, abs=1e-6)
    assert ranks[2:].tolist() == [unembedded.MISS] * 2  # a target that cannot come, and logits that are no numbers


def of_logits(model, sample, monkeypatch):
    """The evaluation from whole logits."""
    with monkeypatch.context() as patched:
        patched.setattr(module, "unembedding_of", lambda model: None)
        return evaluate_sample(model, sample, batch_size=2)


def test_evaluation_is_that_of_whole_logits_and_holds_only_parts(tiny_opt, monkeypatch):
    monkeypatch.setattr(unembedded, "PART", 64)
    expected, made, original = of_logits(tiny_opt, sample(), monkeypatch), [], Unembedding.logits
    first = evaluate_sample(tiny_opt, sample(), batch_size=2)
    head = unembedding_of(tiny_opt)
    assert head is not None
    assert head.seen

    def watched(self, hidden, tokens, out=None):
        made.append(original(self, hidden, tokens, out))
        return made[-1]

    monkeypatch.setattr(Unembedding, "logits", watched)
    monkeypatch.setattr(head.linear, "forward", lambda _: pytest.fail("whole logits"))
    again = evaluate_sample(tiny_opt, sample(), batch_size=2)
    assert max(part.shape[1] for part in made) == 64
    np.testing.assert_array_equal(again.per_row, first.per_row)
    np.testing.assert_array_equal(again.per_row[:, :-1], expected.per_row[:, :-1])
    np.testing.assert_allclose(again.per_row[:, -1], expected.per_row[:, -1], rtol=1e-6)
    assert not head.linear._forward_pre_hooks


def halved(logits, hook):
    return logits / 2


@pytest.mark.parametrize("change", ["hook on logits", "torch hook on the module", "torch hook on the model", "adapter", "cap", "scale"])
def test_logits_that_are_no_product_are_evaluated_as_they_come(tiny_opt, change, monkeypatch):
    plain = evaluate_sample(tiny_opt, sample(), batch_size=2)
    hf_model, layer = tiny_opt.original_model, tiny_opt.unembed.original_component
    if change == "hook on logits":
        tiny_opt.add_hook("unembed.hook_out", halved)
    elif change == "torch hook on the module":
        layer.register_forward_hook(lambda module, inputs, logits: logits / 2)
    elif change == "torch hook on the model":
        hf_model.register_forward_hook(lambda module, inputs, output: output.__class__(logits=output.logits / 2))
    elif change == "adapter":
        layer.__class__ = type("Adapted", (nn.Linear,), {"forward": lambda self, x: nn.functional.linear(x, self.weight) / 2})
    else:
        # of this model's own, so that it is found by the comparison and not by its name
        monkeypatch.setattr(module, "_SEEN", type(module._SEEN)())
        forward, scaled = type(hf_model).forward, change == "scale"

        def changed(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            output.logits = output.logits / 2 if scaled else 5 * torch.tanh(output.logits / 5)
            return output

        monkeypatch.setattr(type(hf_model), "forward", changed)
    found = evaluate_sample(tiny_opt, sample(), batch_size=2)
    np.testing.assert_array_equal(found.per_row, of_logits(tiny_opt, sample(), monkeypatch).per_row)
    assert abs(found.loss - plain.loss) > 1e-3


def test_a_cap_in_the_configuration_is_known_without_a_pass(tiny_opt):
    assert unembedding_of(tiny_opt) is not None
    tiny_opt.original_model.config.final_logit_softcapping = 30.0
    assert unembedding_of(tiny_opt) is None


def test_a_factor_in_the_configuration_is_known_without_a_pass(tiny_opt):
    tiny_opt.original_model.config.logit_scale = 0.8
    assert unembedding_of(tiny_opt) is None


def test_a_head_that_was_replaced_gives_whole_logits(tiny_opt, monkeypatch):
    evaluate_sample(tiny_opt, sample(), batch_size=2)
    hf_model = tiny_opt.original_model
    head = unembedding_of(tiny_opt)
    assert head is not None
    assert head.seen
    hf_model.lm_head = nn.Linear(*reversed(head.linear.weight.shape), bias=False)
    found = evaluate_sample(tiny_opt, sample(), batch_size=2)
    np.testing.assert_array_equal(found.per_row, of_logits(tiny_opt, sample(), monkeypatch).per_row)


def test_what_was_seen_in_one_precision_is_compared_again_in_another(tiny_opt):
    evaluate_sample(tiny_opt, sample(), batch_size=2)
    head = unembedding_of(tiny_opt)
    assert head is not None
    assert head.seen
    tiny_opt.to(torch.bfloat16)
    assert not head.seen


def test_hooks_on_the_modules_around_the_unembedding_are_found(tiny_opt, monkeypatch):
    evaluate_sample(tiny_opt, sample(), batch_size=2)
    linear = tiny_opt.unembed.original_component
    around = nn.Identity()
    monkeypatch.setitem(module._SEEN, linear, (linear.weight.dtype, [weakref.ref(around)]))
    assert unembedding_of(tiny_opt) is not None
    around.register_forward_hook(lambda module, inputs, output: output)
    assert unembedding_of(tiny_opt) is None


@pytest.mark.parametrize("product", [True, False])
def test_every_row_is_run_once(tiny_opt, product, monkeypatch):
    """An ablation may draw random numbers in its hooks, so that a further pass would change what it does."""
    monkeypatch.setattr(module, "_SEEN", type(module._SEEN)())
    monkeypatch.setattr(module, "CAPS", () if product else ("vocab_size",))
    rows = []
    with tiny_opt.hooks(fwd_hooks=[("blocks.0.hook_in", lambda x, hook: rows.append(len(x)))]):
        evaluate_sample(tiny_opt, sample(), batch_size=2)
    assert rows == [2, 2, 1]
