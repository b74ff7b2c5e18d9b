"""Fine-tuning: the first step of Adam by hand, the number of tokens seen, adapters that are gone afterwards."""

import pytest
import tiny
import torch

from sepcap.learning.finetune import fine_tuned, low_rank
from sepcap.learning.fitting import Tuning
from sepcap.models.forward import call, measuring
from sepcap.models.kinds import inner
from sepcap.models.weights import EveryWeight, fingerprint
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import sample_task

LR = 1e-3


@pytest.fixture
def model(tiny_opt):
    return tiny_opt


@pytest.fixture
def sample(model):
    return sample_task(model, load_task(tiny.words(0)), "collect", 300)


def gradients(model, sample):
    """The gradient of the mean loss of all rows, in plain torch."""
    (batch,) = sample.batches(len(sample.rows))
    with measuring(model), torch.enable_grad():
        logits = call(model, batch.inputs, batch.mask)
        torch.nn.functional.cross_entropy(logits[batch.asked], batch.answers[batch.asked]).backward()
    found = {name: None if w.grad is None else w.grad.clone() for name, w in model.named_parameters()}
    model.zero_grad()
    return found


def test_the_first_step_moves_every_weight_by_the_rate_against_its_gradient(model, sample):
    before, slopes = {name: w.detach().clone() for name, w in model.named_parameters()}, gradients(model, sample)
    # one step reads all rows
    seen = next(fine_tuned(model, sample, Tuning(LR, step_tokens=sample.tokens, batch_size=4), (1,)))
    assert seen == sample.tokens
    for name, weight in model.named_parameters():
        slope = slopes[name]
        moved = (weight.detach() - before[name]) / LR
        if slope is None:
            assert not moved.any()
            continue
        clear = slope.abs() > 1e-4  # the sign of a smaller one is a matter of rounding
        torch.testing.assert_close(moved[clear], -slope[clear].sign(), atol=0.02, rtol=0)


def test_a_neuron_without_input_and_output_weights_has_no_gradient(model, sample):
    import sepcap

    neurons = sepcap.NeuronSet.random(model, {"mlp": 0.5}, seed=0)
    sepcap.delete(model, neurons)
    list(fine_tuned(model, sample, Tuning(LR, step_tokens=100), (300,)))
    for _, layer, mask in neurons.by_layer():
        mlp = model.blocks[layer].mlp
        assert not mlp.W_out[mask].any()
        assert not mlp.W_in[:, mask].any()


def test_every_checkpoint_is_the_first_whole_step_at_or_above_it(model, sample):
    seen = list(fine_tuned(model, sample, Tuning(LR, step_tokens=60), (1, 100, 250)))
    assert all(0 <= at - asked < 100 for at, asked in zip(seen, (1, 100, 250), strict=True))
    assert seen == sorted(seen)


def test_weights_have_their_bits_after_fine_tuning_that_was_stopped(model, sample):
    before, saved = fingerprint(model), EveryWeight(model)
    wanted = [w.requires_grad for w in model.parameters()]
    for _ in fine_tuned(model, sample, Tuning(LR, step_tokens=60), (60, 120)):
        assert fingerprint(model) != before
        break
    saved.restore()
    assert fingerprint(model) == before
    assert [w.requires_grad for w in model.parameters()] == wanted
    assert all(w.grad is None for w in model.parameters())


def test_adapters_start_as_nothing_are_trained_alone_and_are_gone_afterwards(model, sample):
    before, names = fingerprint(model), [name for name, _ in model.named_modules()]
    (batch,) = sample.batches(len(sample.rows))
    with torch.no_grad():
        whole = call(model, batch.inputs, batch.mask)
    with low_rank(model, 2, seed=0) as trained, torch.no_grad():
        torch.testing.assert_close(call(model, batch.inputs, batch.mask), whole)
        own = {name: w.detach().clone() for name, w in model.named_parameters() if "lora_" not in name}
        list(fine_tuned(model, sample, Tuning(LR, step_tokens=100), (200,), parameters=trained))
        assert not torch.allclose(call(model, batch.inputs, batch.mask), whole)
        assert all(torch.equal(w, own[name]) for name, w in model.named_parameters() if "lora_" not in name)
    assert [name for name, _ in model.named_modules()] == names
    assert not hasattr(inner(model), "peft_config")
    assert fingerprint(model) == before


def test_adapters_are_trained_in_inference_mode_too(model, sample):
    with torch.inference_mode(), low_rank(model, 2, seed=0) as trained:
        assert list(fine_tuned(model, sample, Tuning(LR, step_tokens=100), (200,), parameters=trained))


def test_a_loss_that_is_not_finite_is_an_error(model, sample):
    with torch.no_grad():
        next(iter(model.parameters())).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"lr=0\.001"):
        next(fine_tuned(model, sample, Tuning(LR, step_tokens=60), (60,)))


def test_a_fine_tuning_that_is_dropped_leaves_the_mode_of_the_caller(model, sample):
    points = fine_tuned(model, sample, Tuning(LR, step_tokens=60), (60, 120))
    next(points)
    with torch.inference_mode():
        points.close()
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
