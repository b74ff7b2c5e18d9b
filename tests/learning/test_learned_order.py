"""A learned order against known answers: gradients by hand, a planted order that activity gets wrong, and a start that is never lost."""

import dataclasses
import math

import numpy as np
import planted_relearning
import pytest
import torch
from planted import in_mlp

import sepcap
from sepcap.learning import lasting as lasting_module
from sepcap.learning.finetune import drawn, gradients_of
from sepcap.learning.fit import PIECE, learn_order, unigram_loss
from sepcap.learning.fitting import Fitting
from sepcap.learning.held_out import area_of, masked_rows
from sepcap.learning.lasting import Relearned
from sepcap.learning.order import kept, masking_hooks, ranked_of, scores_of, starting_theta, straight_through
from sepcap.models.forward import call, measuring, with_hooks
from sepcap.models.weights import EveryWeight, fingerprint
from sepcap.selection.score import Scores
from sepcap.statistics.backward import summed_loss, weights_frozen
from sepcap.studies.base.folder import Pieces
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.samples import sample_task

QUICK = Fitting(steps=40, step_tokens=150, lr=0.1, check_every=20)
WHOLE = {"mlp": 1.0}


@pytest.fixture(scope="module")
def misled(tmp_path_factory):
    """By activity every neuron is one of the other task: the order of `abs` is exactly the wrong way round."""
    return in_mlp(tmp_path_factory.mktemp("misled"), words=8, misled=2.0)


def samples_of(planted, forget="a"):
    texts = {"forget": planted.a, "retain": planted.b} if forget == "a" else {"forget": planted.b, "retain": planted.a}
    return {role: sample_task(planted.model, sepcap.load_task(given), "collect", 1_000) for role, given in texts.items()}


def by_abs(planted, forget="a"):
    tasks = (planted.a, planted.b) if forget == "a" else (planted.b, planted.a)
    return sepcap.score(*(sepcap.collect(planted.model, task, tokens=1_000, sites="mlp") for task in tasks))


_MADE = {}


def given_of(planted, forget):
    """Samples and scores of a model that no test changes: made once, as most of the tests here learn with the same."""
    key = planted.model.cfg.model_name, forget
    if key not in _MADE:
        _MADE[key] = samples_of(planted, forget), by_abs(planted, forget)
    return _MADE[key]


def learned_of(planted, how=QUICK, forget="a", **options):
    ranked = ranked_of(planted.model, ["mlp"])
    samples, scores = given_of(planted, forget)
    return learn_order(planted.model, ranked, samples, starting_theta(ranked, scores), how=how, largest=WHOLE, **options)


class Memory:
    """A store that keeps every checkpoint, and can end the work after one of them."""

    def __init__(self, stop_after=math.inf):
        self.kept, self.left = {}, stop_after

    def get(self, name):
        return self.kept.get(name)

    def put(self, name, tensors, note=None):
        self.kept[name] = ({key: value.clone() for key, value in tensors.items()}, note)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_the_derivative_of_a_mask_is_the_formula():
    theta = torch.tensor([[0.3, -1.0], [0.9, 0.1]], dtype=torch.float64, requires_grad=True)
    mask = straight_through(theta, 2, 0.3)
    assert mask.tolist() == [[0, 1], [0, 1]]  # 0.9 and 0.3 are masked
    weights = torch.tensor([[1.0, 2.0], [-3.0, 0.5]], dtype=torch.float64)
    (mask * weights).sum().backward()
    cut = (0.3 + 0.1) / 2
    sigmoid = [[1 / (1 + math.exp(-(value - cut) / 0.3)) for value in row] for row in theta.tolist()]
    expected = [[-w * s * (1 - s) / 0.3 for w, s in zip(*rows, strict=True)] for rows in zip(weights.tolist(), sigmoid, strict=True)]
    torch.testing.assert_close(theta.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_masking_all_has_a_cut_too():
    assert straight_through(torch.tensor([2.0, 1.0]), 2, 0.3).tolist() == [0, 0]


def test_the_slope_of_a_loss_by_a_mask_is_its_central_difference(tiny_opt, letters):
    """Through hooks, at every site at once, with constants, in float64."""
    model = sepcap.load_model(tiny_opt.cfg.model_name, device="cpu", dtype="float64")
    ranked = ranked_of(model, ["mlp", "heads", "attn_value"])
    constants = {one.site: torch.full(one.population.shape, 0.2, dtype=torch.float64) for one in ranked}
    draw = torch.Generator().manual_seed(0)
    masks = {one.key: torch.rand(one.shape, generator=draw, dtype=torch.float64).requires_grad_(True) for one in ranked}
    batch = next(sample_task(model, sepcap.load_task(letters), "collect", 60).batches(4))

    def loss():
        with weights_frozen(model), measuring(model), with_hooks(model, masking_hooks(ranked, masks, constants)):
            return summed_loss(call(model, batch.inputs, batch.mask), batch)

    slopes = torch.autograd.grad(loss(), list(masks.values()))
    for mask, slope in zip(masks.values(), slopes, strict=True):
        one = int(slope.abs().argmax())
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                mask.flatten()[one] += sign * 1e-5
                ends.append(float(loss()))
                mask.flatten()[one] -= sign * 1e-5
        assert float(slope.flatten()[one]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


def test_a_masked_neuron_is_an_ablated_one(tiny_opt, letters):
    """Losses under masks are those of `ablate`, with zeros and with constants."""
    ranked = ranked_of(tiny_opt, ["mlp", "heads"])
    theta = starting_theta(ranked, sepcap.Scores({one.site: torch.rand(one.population.shape) for one in ranked}))
    constants = {one.site: torch.randn(one.population.shape) for one in ranked}
    sample = sample_task(tiny_opt, sepcap.load_task(letters), "collect", 200)
    share = {"mlp": 0.4, "heads": 0.5}
    for given in (None, constants):
        rows = masked_rows(
            tiny_opt, ranked, theta, {"forget": sample, "retain": sample}, [share], constants=given, batch_size=4
        )["forget"]
        neurons = sepcap.Scores(scores_of(ranked, theta)).top(share)
        assert neurons.count("mlp") == int(0.4 * ranked[0].size)
        assert neurons.count("attn_pre_out") == ranked[1].population.size // 2
        with sepcap.ablate(tiny_opt, neurons, given if given is not None else "zero"):
            again = masked_rows(tiny_opt, ranked, theta, {"forget": sample}, [], constants=None, batch_size=4)["forget"]
        np.testing.assert_allclose(rows[1], again[0], rtol=1e-5)


def test_the_start_has_the_order_of_its_scores_and_normal_quantiles(tiny_opt):
    (ranked,) = ranked_of(tiny_opt, ["mlp"])
    scores = sepcap.Scores({"mlp": torch.rand(ranked.shape, generator=torch.Generator().manual_seed(1))})
    theta = starting_theta([ranked], scores)["mlp"]
    assert torch.equal(theta.flatten().argsort(), scores["mlp"].flatten().argsort())
    # the k-th of n lies at the normal quantile of (k + 1/2)/n
    from scipy.special import ndtr

    places = np.sort(ndtr(theta.numpy().ravel()))
    np.testing.assert_allclose(places, (np.arange(ranked.size) + 0.5) / ranked.size, rtol=1e-12)


def test_equal_scores_keep_the_order_of_a_selection(tiny_opt):
    (ranked,) = ranked_of(tiny_opt, ["mlp"])
    theta = starting_theta([ranked], sepcap.Scores({"mlp": torch.ones(ranked.shape)}))["mlp"]
    assert kept(theta, 3).flatten().nonzero().flatten().tolist() == list(range(3, ranked.size))


def test_scores_are_shares_that_nest(tiny_opt):
    """1 for the first and 1/N for the last; the neurons of a head have one value; every top share contains the smaller ones."""
    mlp, heads = ranked_of(tiny_opt, ["mlp", "heads"])
    draw = torch.Generator().manual_seed(2)
    theta = {one.key: torch.randn(one.shape, generator=draw, dtype=torch.float64) for one in (mlp, heads)}
    scores = sepcap.Scores(scores_of([mlp, heads], theta))
    values = scores["mlp"].flatten()
    assert values[theta["mlp"].flatten().argsort(descending=True)].tolist() == pytest.approx(
        [1 - i / mlp.size for i in range(mlp.size)], rel=1e-12
    )
    torch.testing.assert_close(scores.heads(), scores["attn_pre_out"][..., 0], rtol=1e-12, atol=0)
    assert torch.equal(scores.heads().flatten().argsort(), theta["heads"].flatten().argsort())
    small, large = (scores.top({"mlp": share, "heads": share}) for share in (0.25, 0.5))
    assert len(small - large) == 0
    assert torch.equal(~large.masks["mlp"], kept(theta["mlp"], mlp.count(0.5)))


def test_the_cap_is_the_loss_of_relative_frequencies():
    sample = TokenSample("few", "collect", (np.array([0, 5, 5, 7]), np.array([0, 5])), 0, 4, 4, ([0],), "")
    assert unigram_loss(sample) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), rel=1e-12)
    with pytest.raises(ValueError, match="1 distinct target in"):
        unigram_loss(sample.take([1]))


@pytest.mark.thorough
@pytest.mark.parametrize("forget", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_an_order_that_activity_gets_wrong_is_learned(misled, forget):
    """`abs` prunes the retain task first, an area of 0; learned, every neuron of forget comes before every one of retain: 2."""
    learned = learned_of(misled, forget=forget)
    assert learned.held_out[0] == pytest.approx(0, abs=1e-9)
    assert learned.held_out[learned.step] == pytest.approx(2, abs=1e-9)
    theta, truth = learned.theta["mlp"], {kind: neurons.masks["mlp"] for kind, neurons in misled.truth.items()}
    other = "b" if forget == "a" else "a"
    assert theta[truth[forget]].min() > theta[truth[other]].max()


@pytest.mark.thorough
def test_a_harmful_step_size_returns_the_start(tmp_path):
    """The start is the planted order; steps of 50 standard deviations shuffle it, and the held-out texts refuse them."""
    planted = in_mlp(tmp_path, words=8)
    ranked = ranked_of(planted.model, ["mlp"])
    start = starting_theta(ranked, by_abs(planted))
    how = dataclasses.replace(QUICK, steps=3, lr=50.0, check_every=1)
    learned = learn_order(planted.model, ranked, samples_of(planted), start, how=how, largest=WHOLE)
    assert learned.step == 0
    assert torch.equal(learned.theta["mlp"], start["mlp"])
    assert set(learned.held_out) == {0, 1, 2, 3}
    assert learned.held_out[0] == max(learned.held_out.values())


def test_the_order_kept_is_the_best_on_the_held_out_texts(misled):
    learned = learned_of(misled, dataclasses.replace(QUICK, steps=12, check_every=4))
    assert learned.held_out[learned.step] == max(learned.held_out.values())


@pytest.mark.thorough
@pytest.mark.parametrize("stopped", [2, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 3))])
def test_an_interrupted_fit_resumes_with_equal_bits(misled, stopped):
    how = dataclasses.replace(QUICK, steps=12, check_every=4)
    whole = learned_of(misled, how)
    store = Memory(stopped)
    with pytest.raises(KeyboardInterrupt):
        learned_of(misled, how, store=store)
    store.left = math.inf
    assert same(learned_of(misled, how, store=store), whole)
    assert same(learned_of(misled, how, store=store), whole)  # finished


def same(a, b):
    return (
        torch.equal(a.theta["mlp"], b.theta["mlp"])
        and torch.equal(a.history, b.history)
        and all(getattr(a, n) == getattr(b, n) for n in ("step", "held_out", "cap", "forward_tokens", "backward_tokens", "check_tokens"))
    )


def test_a_checkpoint_on_disk_is_the_same(misled, tmp_path):
    how = dataclasses.replace(QUICK, steps=4)
    pieces = Pieces(tmp_path, "0" * 64)
    first = learned_of(misled, how, store=pieces)
    assert pieces.get(PIECE) is not None
    assert same(learned_of(misled, how, store=pieces), first)


@pytest.mark.thorough
def test_bits_depend_on_the_seed_alone(misled):
    """Neither on grad mode, inference mode, default dtype nor on torch's own generator."""
    how = dataclasses.replace(QUICK, steps=4)
    expected = learned_of(misled, how)
    torch.manual_seed(99)
    for mode in (torch.no_grad, torch.inference_mode):
        _MADE.clear()  # samples and scores too
        with mode():
            assert same(learned_of(misled, how), expected)
    _MADE.clear()  # made in inference mode
    assert not torch.equal(learned_of(misled, dataclasses.replace(how, seed=1)).history, expected.history)


@pytest.mark.thorough
def test_batches_change_rounding_only(misled):
    how = dataclasses.replace(QUICK, steps=3, cap=100.0)  # beyond every loss, so that no pass is left out
    one, other = (learned_of(misled, dataclasses.replace(how, batch_size=size)) for size in (16, 2))
    torch.testing.assert_close(one.history, other.history, rtol=1e-5, atol=1e-6)


def test_above_the_cap_forget_has_no_gradient(misled):
    """With a cap of nearly 0 no backward pass over forget is made: half of those of an unreachable cap."""
    how = dataclasses.replace(QUICK, steps=3)
    none, every = (learned_of(misled, dataclasses.replace(how, cap=cap)) for cap in (1e-9, 1e9))
    assert none.forward_tokens == every.forward_tokens == every.backward_tokens
    assert none.backward_tokens < every.backward_tokens


def test_models_without_gradients_are_refused(misled, tiny_opt, tiny_folders):
    with torch.inference_mode():
        weight = torch.nn.Parameter(tiny_opt.original_model.lm_head.weight.detach().clone())
    tiny_opt.original_model.lm_head.weight = weight
    with pytest.raises(ValueError, match="inference tensor"):
        learn_order(tiny_opt, [], {}, {}, how=QUICK, largest=WHOLE)


@pytest.mark.parametrize(
    ("keys", "said"),
    [((), "give one or more"), (("mlp", "mlp"), "different sites"), (("heads", "attn_pre_out"), "one or the other"), (("mpl",), "mlp")],
)
def test_bad_sites_are_named(tiny_opt, keys, said):
    with pytest.raises(ValueError, match=said):
        ranked_of(tiny_opt, keys)


def test_bad_starts_are_named(tiny_opt):
    ranked = ranked_of(tiny_opt, ["mlp"])
    for scores, said in (
        ({"attn_value": torch.ones(2, 4, 8)}, "no site 'mlp'"),
        ({"mlp": torch.ones(2, 7)}, r"\[2, 7\], but this model has"),
        ({"mlp": torch.full(ranked[0].shape, torch.nan)}, "NaN and cannot be ranked"),
    ):
        with pytest.raises(ValueError, match=said):
            starting_theta(ranked, sepcap.Scores(scores))


def test_an_area_needs_accuracy():
    rows = {role: np.zeros((2, 3, 7)) + np.eye(7)[0] for role in ("forget", "retain")}
    with pytest.raises(ValueError, match="top1 of the unpruned model is 0 on the forget task"):
        area_of(rows)


def lasting(steps, how=QUICK, lr=3e-2):
    return dataclasses.replace(how, objective="lasting", lasting_steps=steps, lasting_lr=lr)


@pytest.mark.thorough
def test_a_lasting_objective_without_steps_is_the_plain_one(misled):
    how = dataclasses.replace(QUICK, steps=6, check_every=3)
    plain, zero = learned_of(misled, how), learned_of(misled, lasting(0, how))
    assert torch.equal(plain.theta["mlp"], zero.theta["mlp"])
    assert torch.equal(plain.history, zero.history)
    assert (plain.held_out, plain.forward_tokens, plain.check_tokens) == (zero.held_out, zero.forward_tokens, zero.check_tokens)


@pytest.mark.thorough
def test_simulated_fine_tuning_lowers_the_loss_on_forget_and_the_weights_have_their_bits(misled):
    before, wanted = fingerprint(misled.model), [w.requires_grad for w in misled.model.parameters()]
    how = dataclasses.replace(QUICK, steps=4, check_every=4)
    plain, later = learned_of(misled, how), learned_of(misled, lasting(3, how, lr=1e-3))
    # the first step masks the same neurons, before anything is learned
    assert later.history[0, 1] == plain.history[0, 1]
    assert later.history[0, 2] < plain.history[0, 2]
    assert later.forward_tokens > plain.forward_tokens
    assert fingerprint(misled.model) == before
    assert [w.requires_grad for w in misled.model.parameters()] == wanted
    assert all(w.grad is None for w in misled.model.parameters())


def test_simulated_fine_tuning_is_that_of_the_masked_model(misled):
    """Fine-tuning a model whose neurons are deleted gives the same weights, but for those of the neurons that are masked here."""
    sample = samples_of(misled)["forget"]
    ranked = ranked_of(misled.model, ["mlp"])
    mask = torch.ones(ranked[0].shape)
    mask[0, 0] = mask[1, 1] = 0
    how = lasting(3, lr=1e-2)
    saved = EveryWeight(misled.model)
    with Relearned(misled.model, ranked, sample, how, None, 64).at({"mlp": mask}, 2) as tokens:
        found = [block.mlp.W_out.detach().clone() for block in misled.model.blocks]
        assert not any(w.requires_grad for w in misled.model.parameters())
    try:
        sepcap.delete(misled.model, sepcap.NeuronSet({"mlp": mask == 0}))
        weights = list(dict.fromkeys(misled.model.parameters()))
        for weight in weights:
            weight.requires_grad_(True)
        adam, count = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0), 0
        n = len(sample.rows)
        each = round(how.step_tokens * n / sample.tokens)
        for step in range(6, 9):
            (batch,) = sample.take(drawn(n, each, step, (how.seed, 2))).batches(n)
            adam.zero_grad()
            with measuring(misled.model), torch.enable_grad():
                (summed_loss(call(misled.model, batch.inputs, batch.mask), batch) / batch.asked.sum()).backward()
            adam.step()
            count += batch.real.numel()
        for layer, block in enumerate(misled.model.blocks):
            kept_rows = mask[layer].bool()
            torch.testing.assert_close(found[layer][kept_rows], block.mlp.W_out.detach()[kept_rows], atol=1e-5, rtol=1e-3)
        assert tokens == count
    finally:
        saved.restore()


def test_an_interrupt_during_simulated_fine_tuning_restores_the_model(misled, monkeypatch):
    before, calls = fingerprint(misled.model), []

    def stop(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return gradients_of(*args)

    monkeypatch.setattr(lasting_module, "gradients_of", stop)
    with pytest.raises(KeyboardInterrupt):
        learned_of(misled, lasting(2))
    assert fingerprint(misled.model) == before


@pytest.mark.thorough
def test_a_dormant_circuit_is_found_by_the_lasting_objective_alone(tmp_path):
    """Neurons that read the words of a and write nothing: the plain loss does not depend on them, fine-tuning would use them."""
    found = planted_relearning.cut(tmp_path, backup=0.4)
    sizes = torch.stack([block.mlp.W_out.detach().norm(dim=-1) for block in found.model.blocks])
    dormant = (sizes > 0) & (sizes < 0.6 * sizes.max())
    assert int(dormant.sum()) == planted_relearning.WORDS
    with torch.no_grad():
        for block, mask in zip(found.model.blocks, dormant, strict=True):
            block.mlp.W_out[mask] = 0
    ranked = ranked_of(found.model, ["mlp"])
    scores = Scores({"mlp": 3.0 * found.a.masks["mlp"] + 1.0 * ~dormant + torch.arange(24).view(2, 12) / 1e3}, {})
    start = starting_theta(ranked, scores)
    texts = {"forget": found.texts_a, "retain": found.texts_b}
    samples = {role: sample_task(found.model, sepcap.load_task(given), "collect", 600) for role, given in texts.items()}
    moved = {}
    for how in (QUICK, lasting(3, lr=3e-3)):
        store = Memory()
        how = dataclasses.replace(how, steps=10, check_every=10, cap=5.0)
        learn_order(found.model, ranked, samples, start, how=how, largest=WHOLE, store=store)
        moved[how.objective] = (store.kept[PIECE][0]["theta/mlp"] - start["mlp"])[dormant]
    assert not moved["plain"].any()
    assert (moved["lasting"] > 0).all()
