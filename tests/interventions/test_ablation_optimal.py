"""Optimal ablation: never worse than its starts, near what a search over a grid finds, and the weights left alone."""

import pytest
import torch
from hooked import FRACTIONS, hooks_of
from plain import Plain, token_ids
from torch.nn.functional import cross_entropy

import sepcap
from sepcap.interventions.constants import CONSTANTS
from sepcap.interventions.optimal import PATIENCE, apart, fit_constants
from sepcap.models.partial import logits_from, residuals
from sepcap.tasks.batches import sample_tokens

KINDS = ("zero", "mean", "median", "peak")


@pytest.fixture
def sample(trained, letters):
    return sample_tokens(sepcap.load_task(letters), "collect", trained.tokenizer, 310, 32)


@pytest.fixture
def reference(trained, letters):
    return sepcap.collect(trained, letters, tokens=310, histogram=True, sites=tuple(FRACTIONS))


def loss_of(plain, sample, neurons, constants):
    """Mean cross-entropy of the plain model with the constants put in, row by row."""

    def put(site, layer, z):
        if site in neurons.masks:
            mask = neurons.masks[site][layer]
            z[..., mask] = constants[site][layer][mask].to(z.dtype)

    losses = []
    for row in map(torch.from_numpy, sample.rows):
        logits = plain.run(row[None], look=put)[0, :-1].double()
        losses.append(cross_entropy(logits, row[1:], reduction="none")[row[1:] != 0])
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("site", FRACTIONS)
@pytest.mark.parametrize("lr", [0.3, 100.0])
def test_never_worse_than_what_it_could_start_from(trained, trained_folder, sample, reference, site, lr):
    plain, neurons = Plain("opt", trained_folder), sepcap.NeuronSet.random(trained, {site: 0.6})
    fitted = fit_constants(trained, neurons, sample, reference=reference, steps=8, lr=lr)
    held = apart(sample)[1]  # on documents that no step was taken for
    others = {kind: loss_of(plain, held, neurons, CONSTANTS[kind](neurons, reference)) for kind in KINDS}
    assert fitted.starts == pytest.approx(others, abs=1e-5)
    assert fitted.loss == pytest.approx(loss_of(plain, held, neurons, fitted.constants), abs=1e-5)
    assert fitted.loss <= min(fitted.starts.values())
    assert fitted.loss == min(*fitted.history, *fitted.starts.values())
    assert fitted.history[0] == pytest.approx(min(others.values()), abs=1e-5)
    assert len(fitted.history) <= 9
    mask = neurons.masks[site]
    low, high = (end[mask].clamp(**zero) for end, zero in ((reference[site].min, {"max": 0}), (reference[site].max, {"min": 0})))
    assert bool(((fitted.constants[site][mask] >= low - 1e-9) & (fitted.constants[site][mask] <= high + 1e-9)).all())


def test_rows_of_one_document_are_on_one_side(trained, letters):
    task = sepcap.load_task(letters)
    sample = sample_tokens(task, "collect", trained.tokenizer, 310, 12, per_document=40)
    fitted, held = apart(sample)
    assert set(fitted.row_documents).isdisjoint(held.row_documents)
    assert len(fitted.rows) + len(held.rows) == len(sample.rows)
    assert held.n_documents == pytest.approx(sample.n_documents / 3, abs=1)
    with pytest.raises(ValueError, match="one document"):
        apart(sample.take([0]))


def test_a_fit_ends_where_held_out_documents_no_longer_gain_and_says_where_it_does_not(trained, sample, reference):
    """Fitting documents that want one constant, held-out ones that want another: no step is kept, and few are tried."""
    neurons = sepcap.NeuronSet.random(trained, {"mlp": 0.5})
    fit, held = (list(part.batches(64)) for part in apart(sample))
    mean, std = reference["mlp"].mean[1].float(), reference["mlp"].std[1].clamp_min(1e-3).float()

    def wanting(direction):
        def forward(batch, hooks):
            z = hooks[1][1](torch.zeros(1, 1, 72), None)[0, 0]
            side = 1.0 if batch.inputs.shape == fit[0].inputs.shape else direction
            wrong = ((z - mean) / std - side)[neurons.masks["mlp"][1]].square().mean()
            return torch.nn.functional.one_hot(batch.inputs.roll(-1, dims=1), 320).float() * (5 - wrong)

        return fit_constants(trained, neurons, fit, held_out=held, reference=reference, steps=30, lr=0.01, forward=forward)

    assert fit[0].inputs.shape != held[0].inputs.shape
    against = wanting(-1.0)
    assert against.converged
    assert len(against.history) == 1 + PATIENCE
    assert against.loss == against.history[0] == min(against.starts.values())
    with pytest.warns(UserWarning, match="have not converged in 30 steps"):
        along = wanting(1.0)
    assert not along.converged
    assert len(along.history) == 31
    assert along.loss < along.history[0]


@pytest.mark.parametrize(("lr", "steps", "converged"), [(0.001, 20, False), (0.02, 20, False), (0.1, 60, True), (1e4, 20, False)])
def test_converged_is_what_a_longer_fit_would_not_change(trained, sample, reference, lr, steps, converged):
    """A loss of a hundredth of a nat, quadratic in the constants: steps of 0.001 gain a millionth each, and never arrive."""
    neurons = sepcap.NeuronSet.random(trained, {"mlp": 0.5})
    fit, held = (list(part.batches(64)) for part in apart(sample))
    stats = reference["mlp"]
    varies = neurons.masks["mlp"][1] & (stats.std[1] > 0.01)
    goal = (stats.mean + 0.5 * stats.std).clamp(stats.min, stats.max)[1].float()

    def forward(batch, hooks):
        z = hooks[1][1](torch.zeros(1, 1, 72), None)[0, 0]
        wrong = 0.01 * ((z - goal) / stats.std[1].float())[varies].square().mean()
        # logits whose cross-entropy is this number: the target has the probability exp(-wrong)
        target = torch.nn.functional.one_hot(batch.inputs.roll(-1, dims=1), 320).bool()
        return torch.where(target, -wrong, torch.log(-torch.expm1(-wrong - 1e-6) / 319))

    options = {"held_out": held, "reference": reference, "forward": forward, "quiet": True}
    found = fit_constants(trained, neurons, fit, lr=lr, steps=steps, **options)
    least = fit_constants(trained, neurons, fit, lr=0.05, steps=300, **options).loss
    assert found.converged == converged
    assert (found.loss - least < 0.1 * (found.history[0] - least)) == converged


def test_a_task_is_sampled_as_asked(trained, letters, reference):
    neurons, task = sepcap.NeuronSet.random(trained, {"mlp": 0.3}), sepcap.load_task(letters)
    options = {"reference": reference, "steps": 1, "quiet": True}
    found = set()
    for how in ({}, {"seed": 3}, {"per_document": 12}, {"per_document": None, "seed": 3}):
        sampled = sample_tokens(task, "collect", trained.tokenizer, 310, 32, **how)
        fitted = fit_constants(trained, neurons, task, tokens=310, context=32, **how, **options)
        assert fitted.starts == fit_constants(trained, neurons, sampled, **options).starts
        found.add(fitted.loss)
    assert len(found) == 4


def test_one_neuron_against_a_search_over_a_grid(trained, trained_folder, sample, reference):
    """The constant that a search finds, for a neuron made to matter: its write is 30 times as strong."""
    plain, stats = Plain("opt", trained_folder), reference["mlp"]
    near_zero = stats.mean[1].abs() < 3 * stats.std[1]
    n = int((stats.std[1] * trained.blocks[1].mlp.W_out.norm(dim=1) * near_zero).argmax())
    with torch.no_grad():
        trained.blocks[1].mlp.W_out[n] *= 30
        plain.hf.model.decoder.layers[1].fc2.weight[:, n] *= 30
    neurons = sepcap.NeuronSet.empty(trained, "mlp")
    neurons.masks["mlp"][1, n] = True
    # the same rows on both sides: what is descended is then what is compared with the grid
    batches, (low, high) = list(sample.batches(64)), (((end - stats.mean) / stats.std)[1, n].item() for end in (stats.min, stats.max))
    grid = {u: loss_of(plain, sample, neurons, {"mlp": stats.mean + u * stats.std}) for u in torch.linspace(low, high, 41).tolist()}
    best = min(grid, key=grid.get)
    fitted = fit_constants(trained, neurons, batches, held_out=batches, reference=reference, steps=40)
    (found,) = ((fitted.constants["mlp"] - stats.mean) / stats.std)[neurons.masks["mlp"]].tolist()
    assert fitted.loss <= grid[best] + 1e-5
    assert found == pytest.approx(best, abs=0.5)
    assert max(grid.values()) > grid[best] + 0.003


@pytest.mark.thorough
def test_a_planted_optimum(trained, sample, reference):
    """Logits that say how far the constants are from what was planted, and nothing else."""
    neurons = sepcap.NeuronSet.random(trained, {"mlp": 0.5})
    mask = neurons.masks["mlp"]
    wave = reference["mlp"].mean + torch.sin(torch.arange(144.0)).view(2, 72) * reference["mlp"].std
    planted = wave.clamp(reference["mlp"].min, reference["mlp"].max)  # constants stay where activations are
    seen = []

    def forward(batch, hooks):
        wrong = torch.zeros(())
        for layer, (name, hook) in enumerate(hooks):
            assert name == f"blocks.{layer}.mlp.hook_post"
            z = hook(torch.zeros(1, 1, 72), None)[0, 0]
            away = (z - planted[layer].float()) / reference["mlp"].std[layer].clamp_min(1e-3).float()
            wrong = wrong + away[mask[layer]].square().sum()
        seen.append(batch)
        targets = torch.nn.functional.one_hot(batch.inputs.roll(-1, dims=1), 320).float()
        return targets * (10 - wrong)

    batches = list(sample.batches(8))
    fitted = fit_constants(trained, neurons, batches, held_out=batches, reference=reference, steps=400, lr=0.05, forward=forward)
    varies = mask & (reference["mlp"].std > 0.01)
    away = ((fitted.constants["mlp"] - planted) / reference["mlp"].std)[varies]
    assert away.abs().max() < 0.1
    assert varies.sum() > 30
    assert seen


def test_weights_and_flags_are_as_they_were(trained, letters, reference):
    neurons = sepcap.NeuronSet.random(trained, FRACTIONS)
    weights = list(trained.original_model.parameters())
    weights[3].requires_grad_(False)
    weights[4].grad = torch.ones_like(weights[4])
    before, flags, hooks = [w.detach().clone() for w in weights], [w.requires_grad for w in weights], hooks_of(trained)

    def check():
        assert [w.requires_grad for w in weights] == flags
        assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
        assert [i for i, w in enumerate(weights) if w.grad is not None] == [4]
        assert bool((weights[4].grad == 1).all())
        assert hooks_of(trained) == hooks

    trained.train()
    fit_constants(trained, neurons, letters, reference=reference, tokens=100, steps=2)
    check()
    assert trained.training

    def fail(batch, hooks):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit_constants(trained, neurons, letters, reference=reference, tokens=100, steps=2, forward=fail)
    check()


def test_ablate_with_it(trained, letters, reference):
    neurons = sepcap.NeuronSet.random(trained, {"attn_pre_out": 0.5})
    fitted = fit_constants(trained, neurons, letters, tokens=310, steps=6)  # statistics of the fitting data by default
    with torch.inference_mode(), sepcap.ablate(trained, neurons, "optimal", source=letters, tokens=310, steps=6):
        inside = trained(token_ids())
    with torch.no_grad(), sepcap.ablate(trained, neurons, fitted.constants):
        assert torch.equal(trained(token_ids()), inside)
    again = fit_constants(trained, neurons, letters, tokens=310, steps=6)
    assert again.history == fitted.history
    given = fit_constants(trained, neurons, letters, tokens=310, steps=6, reference=reference)
    assert given.history == pytest.approx(fitted.history, abs=1e-6)
    assert f"held out, after {len(fitted.history) - 1} steps" in repr(fitted)


def test_batches_of_any_size_and_passes_from_a_later_layer(trained, sample, reference):
    neurons = sepcap.NeuronSet.random(trained, {"mlp": 0.5})
    neurons.masks["mlp"][0] = False
    whole = fit_constants(trained, neurons, sample, reference=reference, steps=5)
    small = fit_constants(trained, neurons, sample, reference=reference, steps=5, batch_size=3)
    assert small.history == pytest.approx(whole.history, abs=1e-5)
    batches, held = (list(part.batches(8)) for part in apart(sample))
    known = {batch.inputs.data_ptr(): residuals(trained, batch.inputs, [1])[1] for batch in [*batches, *held]}

    def forward(batch, hooks):
        return logits_from(trained, known[batch.inputs.data_ptr()], batch.inputs, hooks)

    part = fit_constants(trained, neurons, batches, held_out=held, reference=reference, steps=5, forward=forward)
    assert part.history == pytest.approx(whole.history, abs=1e-5)


def test_under_another_ablation(trained, sample, reference, trained_folder):
    """What is ablated around the fit is part of the model that is fitted."""
    outer, inner = (sepcap.NeuronSet.random(trained, {"mlp": 0.3}, seed=seed) for seed in (1, 2))
    inner = inner - outer
    with sepcap.ablate(trained, outer):
        fitted = fit_constants(trained, inner, sample, reference=reference, steps=2)
    constants = {"mlp": torch.where(outer.masks["mlp"], 0, reference["mlp"].mean)}
    expected = loss_of(Plain("opt", trained_folder), apart(sample)[1], outer | inner, constants)
    assert fitted.starts["mean"] == pytest.approx(expected, abs=1e-5)


def test_bfloat16(trained_folder, letters):
    model = sepcap.load_model(trained_folder, device="cpu", dtype="bfloat16")
    neurons = sepcap.NeuronSet.random(model, FRACTIONS)
    fitted = fit_constants(model, neurons, letters, tokens=310, steps=5)
    assert fitted.loss < min(fitted.starts.values())
    assert all(value.dtype == torch.float64 for value in fitted.constants.values())


def test_what_cannot_be_fitted(trained, letters, sample, reference):
    empty = sepcap.NeuronSet.empty(trained, "mlp")
    some = sepcap.NeuronSet.random(trained, {"mlp": 0.1})
    with pytest.raises(ValueError, match="neurons is empty"):
        fit_constants(trained, empty, letters)
    with pytest.raises(ValueError, match="steps=-1"):
        fit_constants(trained, some, letters, steps=-1)
    with pytest.raises(ValueError, match="histogram=True"):
        fit_constants(trained, some, sample, reference=sepcap.collect(trained, letters, tokens=100))
    with pytest.raises(ValueError, match="reference= and held_out= are needed if the fitting data are batches"):
        fit_constants(trained, some, list(sample.batches(4)))
