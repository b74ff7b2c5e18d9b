"""The embedded model: loads like any folder, is small, and is good enough to show the phenomenon."""

import json

import pytest
import torch

import sepcap
from sepcap.models.loading.load import default_folder


@pytest.fixture(scope="module")
def model():
    return sepcap.load_model(device="cpu")


def test_it_is_small_and_plain():
    files = list(default_folder().iterdir())
    assert sum(f.stat().st_size for f in files) <= 20e6
    config = json.loads((default_folder() / "config.json").read_text())
    assert config["architectures"] == ["OPTForCausalLM"]
    assert config["activation_function"] == "relu"
    assert config["dropout"] > 0  # trained with dropout
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pkl")]


def test_weights_are_bfloat16_on_disk_and_float32_in_use(model):
    from safetensors import safe_open

    with safe_open(default_folder() / "model.safetensors", "pt") as file:
        assert {file.get_tensor(k).dtype for k in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert model.blocks[0].mlp.W_in.dtype == torch.float32


@pytest.mark.slow
def test_it_is_good_enough(model):
    """The issue's bounds, on fewer tokens than the card: three standard errors of slack."""
    torch.set_num_threads(2)
    for task, bound in (("local-prose", 0.30), ("local-code", 0.50)):
        evaluation = sepcap.evaluate(model, task, tokens=20_000)
        assert evaluation.top1 > bound - 3 * evaluation.se("top1"), (task, evaluation)


def test_the_card_states_what_was_measured():
    card = (default_folder() / "README.md").read_text()
    measured = json.loads((default_folder() / "evaluation.json").read_text())
    assert set(measured) == {"local-prose", "local-code", "local-python", "local-cpp"}
    for task, row in measured.items():
        (line,) = [line for line in card.splitlines() if line.startswith(f"| {task} |")]
        assert f"| {int(row['n']):,} |" in line
        assert f"| {row['top1']:.3f} ± {row['top1_se']:.3f} |" in line
    assert measured["local-prose"]["top1"] >= 0.30
    assert measured["local-code"]["top1"] >= 0.50


@pytest.mark.slow
def test_code_and_prose_are_separable_and_random_pruning_separates_nothing(model, tmp_path):
    """Both directions at least 50%, the random baseline within 10% (issue 2, section 2)."""
    torch.set_num_threads(2)
    budget = {"fractions": {"mlp": 0.1}, "steps": 10, "tokens": 20_000, "eval_tokens": 20_000}
    comparison = sepcap.compare_directions(model, **budget, baselines=("uniform", "per_layer"), baseline_seeds=1, out=tmp_path)
    assert comparison.forward.separability("top1").percent >= 50
    assert comparison.reverse.separability("top1").percent >= 50
    assert abs(comparison.baselines["uniform"]["forward"][0].separability("top1").percent) <= 10
    for run in comparison.selective.values():
        assert run.separability("top1", baseline="per_layer").above_random >= 0.4
