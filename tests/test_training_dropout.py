"""Training with and without dropout of neurons: what is dropped, what a pair shares, and the paired comparison."""

import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import words

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Configuration, tokenizer and rows of words of letters as prose and words of digits as code."""
    from neuron_dropout import NeuronDropout, prepare

    letters, digits = words(0, n=160, length=15), words(0, n=160, length=15, alphabet="0123456789")
    config = NeuronDropout(
        tmp_path_factory.mktemp("toy"), dropout=0.3, seeds=(0, 1), layers=1, d_model=16, heads=2, vocabulary=300, context=32, batch=8,
        steps=40, learning_rate=1e-2, warmup=4, forget=digits, retain=letters, sites=("mlp",), prune_steps=2, tokens=300, eval_tokens=300,
        baseline_seeds=1,
    )  # fmt: skip
    return config, *prepare({"prose": letters, "python": digits, "cpp": digits}, config)


def test_neurons_are_dropped_with_their_share_and_only_in_training():
    from neuron_dropout import drop_neurons
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 30,
    }
    model = OPTForCausalLM(OPTConfig(**sizes, dropout=0.0, activation_function="gelu", max_position_embeddings=16))
    seen: dict[str, torch.Tensor] = {}
    layer = model.model.decoder.layers[0]
    layer.self_attn.v_proj.register_forward_hook(lambda module, inputs, z: seen.update(value=z))
    drop_neurons(model, 0.25, torch.Generator().manual_seed(0))
    layer.fc2.register_forward_pre_hook(lambda module, inputs: seen.update(dropped=inputs[0]))
    layer.self_attn.v_proj.register_forward_hook(lambda module, inputs, z: seen.update(dropped_value=z))
    layer.fc1.register_forward_hook(lambda module, inputs, z: seen.update(mlp=torch.nn.functional.gelu(z)))
    ids = torch.randint(30, (40, 16), generator=torch.Generator().manual_seed(1))
    model.train()(ids)
    for name, after in (("mlp", "dropped"), ("value", "dropped_value")):
        z, left = seen[name].reshape(-1), seen[after].reshape(-1)
        kept = left != 0
        n = len(z)
        assert int((~kept).sum()) == pytest.approx(0.25 * n, abs=4 * math.sqrt(n * 0.25 * 0.75))
        torch.testing.assert_close(left[kept], z[kept] / 0.75)
    model.eval()(ids)
    torch.testing.assert_close(seen["dropped"], seen["mlp"])
    torch.testing.assert_close(seen["dropped_value"], seen["value"])


def test_a_pair_differs_by_its_dropout_alone(toy, tmp_path):
    from dataclasses import replace

    from neuron_dropout import train_one
    from safetensors.torch import load_file

    config, tokenizer, rows = toy
    few = replace(config, steps=2)
    made = {}
    for name, (p, seed) in {"with": (0.3, 0), "without": (0.0, 0), "again": (0.3, 0), "other": (0.0, 1)}.items():
        made[name] = load_file(train_one(few, tokenizer, rows, p, seed, tmp_path / name) / "model.safetensors")
    same = {name: all(torch.equal(made["with"][key], value) for key, value in weights.items()) for name, weights in made.items()}
    assert same == {"with": True, "without": False, "again": True, "other": False}
    # before the first step, and so in the order of the rows, a pair is the same
    none = replace(config, steps=0)
    start = [load_file(train_one(none, tokenizer, rows, p, 0, tmp_path / f"start{p}") / "model.safetensors") for p in (0.3, 0.0)]
    assert all(torch.equal(start[0][key], start[1][key]) for key in start[0])


def test_paired_differences_by_hand():
    from neuron_dropout import MEASURES, paired

    table = pd.DataFrame(
        [
            {"seed": seed, "arm": arm, "site": "mlp", "direction": "forward", **dict.fromkeys(MEASURES, value)}
            for seed, arm, value in ((0, "with", 1.5), (0, "without", 1.2), (2, "without", 1.0), (1, "with", 1.7), (1, "without", 1.2),
                                     (2, "with", 1.1))
        ]
    )  # fmt: skip
    row = paired(table).iloc[0]
    # 0.3, 0.5 and 0.1: mean 0.3, standard deviation 0.2, standard error 0.1155, t of two degrees of freedom 4.3027
    assert row["difference"] == pytest.approx(0.3)
    half = 4.302653 * 0.2 / math.sqrt(3)
    assert (row["low"], row["high"]) == (pytest.approx(0.3 - half), pytest.approx(0.3 + half))
    assert (row["with"], row["without"]) == (pytest.approx(4.3 / 3), pytest.approx(3.4 / 3))
    assert len(paired(table)) == len(MEASURES)


@pytest.mark.thorough
def test_all_pairs_are_trained_and_pruned_and_nothing_is_made_twice(toy, monkeypatch):
    import neuron_dropout

    config, tokenizer, rows = toy
    (config.out / "models").mkdir(exist_ok=True)
    table, differences = neuron_dropout.compare(config, tokenizer, rows)
    assert len(table) == 2 * 2 * 2  # seeds, arms, directions
    assert set(table["direction"]) == {"forward", "reverse"}
    assert (table["top1_forget"] > 0).all()
    assert np.isfinite(table["area"]).all()
    assert np.isfinite(differences[["difference", "low", "high"]].to_numpy()).all()
    monkeypatch.setattr(neuron_dropout, "batch_at", None)
    again, _ = neuron_dropout.compare(config, tokenizer, rows)
    pd.testing.assert_frame_equal(again, table)
