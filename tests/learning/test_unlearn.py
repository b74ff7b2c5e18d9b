"""Losses and steps of unlearning, each against a second computation in plain torch."""

import math

import pytest
import tiny
import torch

from sepcap.learning.finetune import Term, fine_tuned
from sepcap.learning.fitting import Tuning
from sepcap.learning.unlearn import NegativePreference, Passes, TaskVector, counted, reference_of
from sepcap.models.forward import call, measuring
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


@pytest.fixture
def other(model):
    return sample_task(model, load_task(tiny.words(1, alphabet="stuvwxyz")), "collect", 300)


def slopes(model, *weighted):
    """Gradient of a weighted sum of the mean losses of samples, in plain torch."""
    total = torch.zeros(())
    with measuring(model), torch.enable_grad():
        for weight, sample in weighted:
            (batch,) = sample.batches(len(sample.rows))
            logits = call(model, batch.inputs, batch.mask)
            total = total + weight * torch.nn.functional.cross_entropy(logits[batch.asked], batch.answers[batch.asked])
        total.backward()
    found = {name: None if w.grad is None else w.grad.clone() for name, w in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("retain_weight", [0.0, 0.5])
def test_one_step_of_ascent_by_sgd_is_minus_the_rate_times_the_gradient(model, sample, other, retain_weight):
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    expected = slopes(model, (-1.0, sample), *([(retain_weight, other)] if retain_weight else []))
    terms = [Term(sample, -1.0), *([Term(other, retain_weight)] if retain_weight else [])]
    how = Tuning(LR, step_tokens=max(sample.tokens, other.tokens), batch_size=4, optimiser="sgd")
    seen = next(fine_tuned(model, terms, how, (1,)))
    assert seen == sum(term.sample.tokens for term in terms)
    for name, weight in model.named_parameters():
        if expected[name] is not None:
            torch.testing.assert_close(weight.detach() - before[name], -LR * expected[name], atol=1e-7, rtol=1e-3)


def test_ascent_raises_the_loss(model, sample):
    (batch,) = sample.batches(len(sample.rows))

    def loss():
        with torch.no_grad():
            logits = call(model, batch.inputs, batch.mask)
        return float(torch.nn.functional.cross_entropy(logits[batch.asked], batch.answers[batch.asked]))

    first = loss()
    list(fine_tuned(model, [Term(sample, -1.0)], Tuning(1e-2, step_tokens=300, optimiser="sgd"), (1_500,)))
    assert loss() > first + 0.01


def test_negative_preference_by_hand():
    # log(π/π_ref) of -1 and 2 with β = 0.5: -(2/0.5)·(log σ(0.5) + log σ(-1))
    loss = NegativePreference(0.5, torch.tensor([0.0, -3.0, -5.0]))
    found = loss.of_rows(torch.tensor([-4.0, -3.0]), [1, 2])
    by_hand = 4 * (math.log1p(math.exp(-0.5)) + math.log1p(math.exp(1.0)))
    assert float(found) == pytest.approx(by_hand, rel=1e-6)


def test_the_gradient_of_negative_preference_is_that_of_ascent_with_the_published_weight():
    beta, reference = 0.7, torch.tensor([-3.0, -2.0])
    found = torch.tensor([-4.0, -1.0], requires_grad=True)
    NegativePreference(beta, reference).of_rows(found, [0, 1]).backward()
    # W = 2π^β / (π^β + π_ref^β); ascent has 1 in its place
    of, ref = (found.detach() * beta).exp(), (reference * beta).exp()
    torch.testing.assert_close(found.grad, 2 * of / (of + ref))


def test_for_a_small_beta_negative_preference_is_ascent(model, sample):
    (batch,) = sample.batches(len(sample.rows))
    reference = reference_of(model, sample, 4)
    with torch.no_grad():
        logits = call(model, batch.inputs, batch.mask) + torch.randn(3, generator=torch.Generator().manual_seed(0)).sum() * 0.01
    moved = logits * 0.9
    loss = NegativePreference(1e-4, reference)
    found = loss.summed(moved, batch, range(len(sample.rows))) / len(sample.rows)
    log_probability = torch.log_softmax(moved, -1).gather(-1, batch.answers[..., None])[..., 0].masked_fill(~batch.asked, 0).sum(-1)
    constant = 2 / 1e-4 * math.log(2)
    assert float(found) == pytest.approx(constant + float((log_probability - reference).mean()), abs=0.05)


def test_a_reference_is_the_log_probability_of_every_row(model, sample):
    (batch,) = sample.batches(len(sample.rows))
    with torch.no_grad():
        logits = call(model, batch.inputs, batch.mask).double()
    expected = torch.log_softmax(logits, -1).gather(-1, batch.answers[..., None])[..., 0].masked_fill(~batch.asked, 0).sum(-1)
    torch.testing.assert_close(reference_of(model, sample, 3).double(), expected, atol=1e-3, rtol=1e-5)


def test_negative_preference_starts_as_ascent_of_rows(model, sample):
    """At the reference the weight of every row is 1, so that the first step is that of ascent on the log-loss of rows."""
    before, reference = {name: w.detach().clone() for name, w in model.named_parameters()}, reference_of(model, sample, 4)
    rows = len(sample.rows)
    predictions = len(sample.targets())
    expected = slopes(model, (-predictions / rows, sample))
    how = Tuning(LR, step_tokens=sample.tokens, batch_size=4, optimiser="sgd")
    next(fine_tuned(model, [Term(sample, 1.0, NegativePreference(0.1, reference))], how, (1,)))
    for name, weight in model.named_parameters():
        if expected[name] is not None:
            torch.testing.assert_close(weight.detach() - before[name], -LR * expected[name], atol=2e-6, rtol=2e-2)


def test_a_task_vector_is_linear_in_its_scale_and_0_is_the_model_before(model, sample):
    before, saved = fingerprint(model), EveryWeight(model)
    vector = TaskVector(model)
    list(fine_tuned(model, sample, Tuning(LR, step_tokens=100), (300,)))
    tuned = [w.detach().clone() for w in vector.weights]
    vector.take()
    at = {}
    for scale in (1.0, 2.0, -1.0):
        vector.subtract(scale)
        at[scale] = [w.detach().clone() for w in vector.weights]
    for old, new, once, twice, added in zip(vector.before, tuned, at[1.0], at[2.0], at[-1.0], strict=True):
        torch.testing.assert_close(twice - once, once - old, atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(once, 2 * old - new, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(added, new, atol=1e-6, rtol=1e-5)
    vector.subtract(0.0)
    assert fingerprint(model) == before
    saved.restore()


def test_the_count_is_that_of_the_calls_and_hooks_are_gone(model, sample, monkeypatch):
    """The forward pass of the class is wrapped: it sees every call, however it is made."""
    seen, forward = [], type(model).forward

    def watched(self, *args, **kwargs):
        seen.append((args[0].numel(), torch.is_grad_enabled()))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", watched)
    passes = Passes()
    with counted(model, passes):
        reference = reference_of(model, sample, 4)
        terms = [Term(sample, 1.0, NegativePreference(0.1, reference)), Term(sample, 0.5)]
        list(fine_tuned(model, terms, Tuning(LR, step_tokens=100, batch_size=2), (300,)))
    assert passes.forward == sum(n for n, _ in seen)
    assert passes.backward == sum(n for n, slope in seen if slope)
    assert 0 < passes.backward < passes.forward
    count = passes.forward
    reference_of(model, sample, 4)
    assert passes.forward == count
