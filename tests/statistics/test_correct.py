"""Statistics at right predictions alone (METHODS 3; [SEP] 4.3.3)."""

import numpy as np
import pytest
import torch
from encoders import images, save_masked, save_vit
from encoders import load as load_encoder
from tiny import fresh, words

import sepcap
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.models.forward import call
from sepcap.statistics.collect import collect_sample, correct_in
from sepcap.tasks.samples import sample_task

TOKENS = 400


@pytest.fixture
def sample(trained, letters):
    return sample_task(trained, sepcap.load_task(letters), "collect", TOKENS, 32)


def test_the_right_positions_are_those_of_the_plain_model(trained, sample):
    right = correct_in(trained, sample, 3)
    assert right.shape == (len(sample.rows), max(map(len, sample.rows)))
    for row, found in zip(sample.rows, right, strict=True):
        with torch.no_grad():
            best = trained(torch.from_numpy(row)[None], return_type="logits")[0].argmax(-1).numpy()
        expected = (best[:-1] == row[1:]) & (row[1:] != sample.bos)
        np.testing.assert_array_equal(found[: len(row)].numpy(), [*expected, False])
    assert torch.equal(right, correct_in(trained, sample, 100))  # padding and the size of batches have no influence


@pytest.mark.parametrize("kind", ["causal", "masked", "image"])
def test_their_share_is_the_accuracy_of_the_evaluation(kind, trained, tmp_path, letters):
    model = {"causal": lambda: trained, "masked": lambda: load_encoder(save_masked("roberta", tmp_path))}.get(
        kind, lambda: load_encoder(save_vit(tmp_path))
    )()
    task = images() if kind == "image" else letters
    sample = sample_task(model, sepcap.load_task(task), "collect", 120, None)
    evaluated = evaluate_sample(model, sample)
    right = correct_in(model, sample, 16)
    assert int(right.sum()) == pytest.approx(evaluated.top1 * evaluated.n)
    assert int(right.sum()) > 0
    stats = collect_sample(model, sample, ("mlp",), only=right)["mlp"]
    assert stats.count == int(right.sum()) * (1 if kind != "image" else stats.count // int(right.sum()))
    assert stats.count < collect_sample(model, sample, ("mlp",))["mlp"].count


def test_statistics_are_those_of_the_right_positions_by_hand(trained, sample, letters):
    right = correct_in(trained, sample, 4)
    found = sepcap.collect(trained, letters, tokens=TOKENS, positions="correct", batch_size=4)
    for site, name in (("mlp", "mlp.hook_post"), ("attn_pre_out", "attn.hook_z")):
        for layer in range(2):
            kept = []
            for row, here in zip(sample.rows, right, strict=True):
                with torch.no_grad():
                    _, cache = trained.run_with_cache(torch.from_numpy(row)[None])
                z = cache[f"blocks.{layer}.{name}"][0].double()
                kept.append(z[here[: len(row)] & torch.from_numpy(row != sample.bos)])
            z = torch.cat(kept)
            assert found[site].count == len(z)
            torch.testing.assert_close(found[site].abs[layer], z.abs().mean(0), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(found[site].std[layer], z.std(0, correction=0), rtol=1e-4, atol=1e-6)
    assert found.info["positions"] == "correct"
    assert "positions" not in sepcap.collect(trained, letters, tokens=TOKENS).info


def test_a_pruned_model_is_measured_where_the_unpruned_one_was_right(trained, letters):
    right = sepcap.correct_positions(trained, letters, tokens=TOKENS)
    sepcap.delete(trained, sepcap.NeuronSet.random(trained, {"mlp": 0.9}))
    theirs = sepcap.collect(trained, letters, tokens=TOKENS, positions=right)
    own = sepcap.collect(trained, letters, tokens=TOKENS, positions="correct")
    assert theirs["mlp"].count != own["mlp"].count
    assert theirs["mlp"].count == int(right[:, 1:].sum())  # BOS predicts too, and its activations do not count
    assert sepcap.collect(trained, letters, tokens=TOKENS, positions=right, include_bos=True)["mlp"].count == int(right.sum())


def test_gradients_are_of_the_loss_of_the_right_predictions(trained_folder, letters):
    model = fresh(trained_folder, "float64")
    sample = sample_task(model, sepcap.load_task(letters), "collect", 100, 32)
    right = correct_in(model, sample, 4)
    found = collect_sample(model, sample, ("mlp",), gradients=("atp",), only=right)["mlp"]
    assert found.gradients is not None
    assert found.gradients.predictions == int(right.sum())
    # the loss by a mask on the neurons, which has the derivative −N·atp at 1, by central differences
    neurons, loss = [(0, 3), (1, 40)], {}

    def at(layer, neuron, value):
        def hook(z, hook):
            scale = torch.ones_like(z)
            scale[..., neuron] = value
            return z * scale

        total = 0.0
        for row, here in zip(sample.rows, right, strict=True):
            with model.hooks(fwd_hooks=[(f"blocks.{layer}.mlp.hook_post", hook)]), torch.no_grad():
                logits = call(model, torch.from_numpy(row)[None])[0, :-1]
            each = torch.nn.functional.cross_entropy(logits, torch.from_numpy(row[1:]), reduction="none")
            total += float(each[here[: len(row) - 1]].sum())
        return total

    for layer, neuron in neurons:
        slope = (at(layer, neuron, 1 + 1e-4) - at(layer, neuron, 1 - 1e-4)) / 2e-4
        assert float(found.gradients.sums["zg"][layer, neuron]) == pytest.approx(slope, rel=1e-5, abs=1e-8)
        loss[layer] = at(layer, neuron, 1.0)
    # attention of OPT is computed in float32, rounded differently in batches of other lengths
    assert found.gradients.loss == pytest.approx(loss[0], rel=1e-7)


def test_bad_positions_are_named(trained, letters):
    right = sepcap.correct_positions(trained, letters, tokens=TOKENS)
    with pytest.raises(ValueError, match=r"positions: \[\d+, 32\], and the tokens of .* are .*correct_positions"):
        sepcap.collect(trained, letters, tokens=TOKENS // 2, positions=right)
    with torch.no_grad():
        trained.original_model.get_output_embeddings().weight.zero_()  # every logit is the same: ties are not right
    with pytest.raises(ValueError, match=r"predicts none of 400 tokens of .* right"):
        sepcap.collect(trained, words(0), tokens=TOKENS, positions="correct")
