"""Does dropout of neurons make tasks separable ([SP] section 5.2)? Train small pairs with and without it, prune each, and compare.

    python training/neuron_dropout.py --out runs/neuron-dropout

Both models of a pair have the same seed: the same initial weights and the same rows in the same order. One is trained with dropout of its
mlp neurons (the input of the second matrix) and of its value neurons (the output of the value matrix), the other without any. Every model
is pruned in both directions, by mlp and by value neurons, next to random neurons. The last table is the paired difference over seeds with
its 95% interval (Student's t on seeds − 1). After an interruption the same command resumes: a trained model and a finished run are not
made again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from jaxtyping import Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from train import SHARES, TrainConfig, batch_at, learning_rate, train_texts, train_tokenizer
from transformers import OPTConfig, OPTForCausalLM
from vit import groups

import sepcap
from sepcap.statistics.intervals import t_interval
from sepcap.storage import write_atomically
from sepcap.tasks.batches import pack

MEASURES = ("area", "above_random", "max_drop", "top1_forget", "top1_retain")
"""What is compared: area under the trajectory, the same minus that of random neurons, largest differential drop in points, and the accuracy
of the unpruned model on both tasks."""


@dataclass(frozen=True)
class NeuronDropout:
    """Models, training and pruning."""

    out: Path = Path("runs/neuron-dropout")
    """Folder that receives models, runs and tables."""
    dropout: float = 0.1
    """Share of the mlp and value neurons that is dropped at every position in one model of each pair."""
    seeds: tuple[int, ...] = (0, 1, 2)
    layers: int = 3
    d_model: int = 128
    heads: int = 4
    vocabulary: int = 1024
    context: int = 128
    batch: int = 32
    """Rows per training step."""
    steps: int = 1500
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.1
    max_train_chars: int = 6_000_000
    """Characters of prose; half as many of Python and of C++ each."""
    forget: Any = "local-code"
    retain: Any = "local-prose"
    sites: tuple[str, ...] = ("mlp", "attn_value")
    """Neurons that are pruned, each site in a run of its own."""
    prune_steps: int = 10
    """Pruning steps; together they prune all neurons of the site."""
    tokens: int = 13_000
    """Token positions per task and pruning step from which statistics are collected."""
    eval_tokens: int = 15_000
    """Predictions per task and pruning step."""
    baseline_seeds: int = 3
    """Draws of random neurons, as many per layer as were selected."""
    seed: int = 0
    """Seed of the tokenizer, which all models share."""


def prepare(
    read: dict[str, list[str]], config: NeuronDropout, tokenizer: Any = None
) -> tuple[Any, dict[str, Int[np.ndarray, "row pos"]]]:
    """Tokenizer, trained on these texts unless one is given, and full rows of every kind of text."""
    if tokenizer is None:
        tokenizer = train_tokenizer(read, TrainConfig(vocabulary=config.vocabulary, context=config.context, seed=config.seed))
    found = {}
    for kind in SHARES:
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(read[kind], add_special_tokens=False)
        packed = pack((e.ids for e in encoded), config.context, tokenizer.bos_token_id)
        found[kind] = np.stack([row for row in packed if len(row) == config.context])
    return tokenizer, found


def drop_neurons(model: OPTForCausalLM, p: float, generator: torch.Generator) -> None:
    """Drop mlp and value neurons in training mode: each is 0 with probability p at each position, and the others are divided by 1 − p."""

    def dropped(module: nn.Module, z: Tensor) -> Tensor:
        if not module.training or p == 0:
            return z
        return z * (torch.rand(z.shape, generator=generator) >= p) / (1 - p)

    for layer in model.model.decoder.layers:
        layer.fc2.register_forward_pre_hook(lambda module, inputs: (dropped(module, inputs[0]),))
        layer.self_attn.v_proj.register_forward_hook(lambda module, inputs, z: dropped(module, z))


def train_one(
    config: NeuronDropout, tokenizer: Any, rows: dict[str, Int[np.ndarray, "row pos"]], p: float, seed: int, folder: Path
) -> Path:
    """Train and save one model; the same arguments give the same weights on the same machine.

    Args:
        config: sizes and training settings.
        tokenizer, rows: what `prepare` returns.
        p: dropout of neurons.
        seed: of the initial weights, the order of the rows and the dropped neurons.
        folder: for the model; if it holds one, nothing is trained.
    """
    if (folder / "config.json").exists():
        return folder
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = OPTForCausalLM(
            OPTConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.d_model,
                word_embed_proj_dim=config.d_model,
                ffn_dim=4 * config.d_model,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=config.context,
                dropout=0.0,
                attention_dropout=0.0,
                bos_token_id=tokenizer.bos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    model.set_attn_implementation("eager")
    drop_neurons(model, p, torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(groups(model, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.98))
    order = TrainConfig(batch=config.batch, seed=seed)
    model.train()
    for step in tqdm(range(config.steps), desc=f"train {folder.name}", delay=2, disable=None):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.steps, config)
        ids = batch_at(step, rows, order)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids, use_cache=False).logits
        nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    # config.json is written first by save_pretrained, and tells a finished model: so it is saved beside and renamed
    beside = folder.with_name(f"{folder.name}.part")
    model.eval().save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    beside.rename(folder)
    return folder


def pruned(folder: Path, config: NeuronDropout, out: Path) -> list[dict[str, Any]]:
    """Separability of one model in both directions, by each site."""
    found = []
    for site in config.sites:
        model = sepcap.load_model(folder, device="cpu")
        comparison = sepcap.compare_directions(
            model,
            forget=config.forget,
            retain=config.retain,
            fractions={site: 1 / config.prune_steps},
            steps=config.prune_steps,
            tokens=config.tokens,
            eval_tokens=config.eval_tokens,
            baseline_seeds=config.baseline_seeds,
            out=out / site,
        )
        for direction in ("forward", "reverse"):
            run = getattr(comparison, direction)
            s = run.separability("top1", baseline="per_layer")
            row = {"site": site, "direction": direction, "forget": run.config["forget"]}
            row |= {"area": s.area, "above_random": s.above_random, "max_drop": s.max_drop}
            found.append(row | {"top1_forget": s.forget[0], "top1_retain": s.retain[0]})
    return found


def paired(table: pd.DataFrame) -> pd.DataFrame:
    """With dropout minus without, per site and direction: the mean over seeds with its 95% interval.

    Args:
        table: one row per seed, arm ("with" or "without"), site and direction, with the columns of `MEASURES`.
    """
    rows = []
    for (site, direction), of in table.groupby(["site", "direction"], sort=False):
        arms = {arm: of[of["arm"] == arm].set_index("seed").sort_index() for arm in ("with", "without")}
        for measure in MEASURES:
            difference = (arms["with"][measure] - arms["without"][measure]).to_numpy()
            n = len(difference)
            mean, error = float(difference.mean()), float(difference.std(ddof=1) / n**0.5) if n > 1 else float("nan")
            low, high = t_interval(mean, error, n)
            means = {arm: float(values[measure].mean()) for arm, values in arms.items()}
            rows.append({"site": site, "direction": direction, "measure": measure, **means, "difference": mean, "low": low, "high": high})
    return pd.DataFrame(rows)


def compare(config: NeuronDropout, tokenizer: Any, rows: dict[str, Int[np.ndarray, "row pos"]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train and prune all pairs.

    Returns:
        One row per model, site and direction; and the paired differences.
    """
    found = []
    for seed in config.seeds:
        for arm, p in (("with", config.dropout), ("without", 0.0)):
            name = f"{arm}-{seed}"
            folder = train_one(config, tokenizer, rows, p, seed, config.out / "models" / name)
            found += [{"seed": seed, "arm": arm, **row} for row in pruned(folder, config, config.out / "runs" / name)]
    table = pd.DataFrame(found)
    return table, paired(table)


def main(config: NeuronDropout) -> None:
    """Train and prune all pairs, and write both tables."""
    tokenizer, rows = prepare({kind: list(train_texts(kind, config.max_train_chars)) for kind in SHARES}, config)
    (config.out / "models").mkdir(parents=True, exist_ok=True)
    table, differences = compare(config, tokenizer, rows)
    for name, each in (("models", table), ("differences", differences)):
        write_atomically(config.out / f"{name}.csv", each.to_csv(index=False).encode())
        print(each.to_string(index=False, float_format=lambda x: f"{x:.3f}"), end="\n\n")


if __name__ == "__main__":
    main(tyro.cli(NeuronDropout))
