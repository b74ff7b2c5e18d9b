"""Planted models of which it is known how a capability that was cut can come back (METHODS 22).

As in `planted.in_mlp`, word k of each task has one neuron, which writes its successor. Beside the neurons there is a wrong habit: the
unembedding reads the current word and prefers the word after the successor, by a margin that is half of what the neurons give. Without
its neurons a task is therefore wrong at every word, and the margin has to be overcome by fine-tuning, in steps whose size is that of Adam.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import planted
import torch
from planted import LAYERS, Blueprint

import sepcap

WORDS = 8
HABIT = 0.5
"""The wrong habit, relative to what a neuron writes."""
STRENGTH = 20.0
"""Activation of a neuron at its word."""


@dataclass(frozen=True)
class Cut:
    """A model, the neurons of its two tasks, and the same model that never had the circuit of `a`."""

    model: Any
    a: sepcap.NeuronSet
    texts_a: list[str]
    texts_b: list[str]
    never: Any


@torch.no_grad()
def written(folder: Path, tasks: str, seed: int, backup: float = 0.0) -> tuple[Any, torch.Tensor, Blueprint]:
    """A saved and loaded model with circuits of some tasks, and the mask of those of `a`.

    Args:
        backup: what a second neuron per word of `a` writes, relative to the first.
    """
    jobs = [(task, k, 1.0) for task in "ab" for k in range(WORDS)] + [("a", k, backup) for k in range(WORDS)]
    per_layer = -(-len(jobs) // LAYERS)
    blueprint = Blueprint(WORDS, ffn=per_layer)
    places = torch.randperm(LAYERS * per_layer, generator=torch.Generator().manual_seed(seed)).tolist()
    mask = torch.zeros(LAYERS, per_layer, dtype=torch.bool)
    for task in "ab":
        for k in range(WORDS):
            habit = HABIT * blueprint.both_halves(blueprint.see + blueprint.token(task, k))
            blueprint.hf.lm_head.weight[blueprint.token(task, k + 2)] += habit
    for (task, k, gain), place in zip(jobs, places, strict=False):
        if task not in tasks or not gain:
            continue
        layer, n = divmod(place, per_layer)
        fc1, fc2 = blueprint.layers[layer].fc1, blueprint.layers[layer].fc2
        fc1.weight[n] = 1.1 * STRENGTH * blueprint.reader([blueprint.token(task, k)])
        fc1.bias[n] = -0.1 * STRENGTH
        fc2.weight[:, n] = gain * blueprint.both_halves(blueprint.next + blueprint.token(task, k + 1)) / STRENGTH
        mask[layer, n] = task == "a" and gain == 1.0
    blueprint.hf.save_pretrained(folder)
    planted.tokenizer(blueprint.names).save_pretrained(folder)
    return sepcap.load_model(folder, device="cpu"), mask, blueprint


def cut(folder: Path, backup: float = 0.0) -> Cut:
    """The model with both circuits, and one that never had that of `a`."""
    model, mask, _ = written(folder / "both", "ab", 0, backup)
    never, _, _ = written(folder / "b", "b", 1)
    return Cut(model, sepcap.NeuronSet({"mlp": mask}), planted.texts("a", WORDS), planted.texts("b", WORDS), never)


@torch.no_grad()
def output_cut(found: Cut) -> Any:
    """A copy of the model in which the neurons of `a` still fire and write nothing."""
    edited = copy.deepcopy(found.model)
    for layer, mask in enumerate(found.a.masks["mlp"]):
        edited.blocks[layer].mlp.W_out[mask] = 0
    return edited
