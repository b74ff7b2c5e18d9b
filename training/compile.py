"""Make the compiled models of sepcap/assets/compiled, or measure how well `abs` finds their neurons (METHODS 20).

python training/compile.py                  # the same files again, byte by byte
python training/compile.py --out FOLDER     # elsewhere
python training/compile.py --scores         # AUROC of every importance on every shipped model, as a table
"""

import argparse
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from circuits import circuit_of
from compiler import SPECIAL, Weights
from safetensors.numpy import save
from tokenizers import Tokenizer, models, pre_tokenizers

import sepcap
from sepcap.compiled.load import FOLDER, LABELS
from sepcap.compiled.programs import PAIRS
from sepcap.storage import save_tensors, write_atomically

CARD = """# {name}

An OPT model of {layers} layers, {width} dimensions and {ffn} hidden units a layer, compiled from two programs by `training/compile.py`:
it computes both exactly for all inputs of at most the stated length, and every neuron belongs to a known step (`program.json`).

| | program | input | answers with | example |
|---|---|---|---|---|
{programs}

{joined}{variant}

| label | used by | mlp | attention values |
|---|---|---|---|
{labels}

`sepcap.load_compiled("{name}")` gives the model, both tasks and the labels (`labels.safetensors`). Definitions: METHODS 20.
"""

USED_BY = {"forget": "{forget} alone", "retain": "{retain} alone", "shared": "both", "unused": "neither"}

VARIANTS = {
    "": "",
    "rotated": " The values of every attention head are in a random orthogonal basis, in which each neuron carries several steps.",
    "noisy": " Neurons and heads without effect are added: most have the activity of a step, some a higher one in one of the programs.",
}


def compile_model(name: str, out: Path) -> None:
    """Write one folder."""
    pair = PAIRS[name]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    circuit = circuit_of(pair)
    circuit.find_users()
    if pair.variant == "noisy":
        circuit.add_noise(rng)
    weights = Weights(circuit, rng, rotated=pair.variant == "rotated")
    labels = weights.labels()
    programs = {
        role: {
            "name": program.name, "meaning": program.meaning, "letters": list(program.letters), "keys": list(program.keys),
            "letters_of_an_input": [program.shortest, program.longest], "answers": sorted(circuit.answers[program.name]),
        }
        for role, program in (("forget", pair.forget), ("retain", pair.retain))
    }  # fmt: skip
    config = {
        "activation_function": "relu", "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 0,
        "do_layer_norm_before": True, "dropout": 0.0, "dtype": "float16", "enable_bias": True, "eos_token_id": 2, "ffn_dim": weights.ffn,
        "hidden_size": weights.width, "layer_norm_elementwise_affine": True, "layerdrop": 0.0,
        "max_position_embeddings": circuit.context, "model_type": "opt", "num_attention_heads": weights.n_heads,
        "num_hidden_layers": weights.layers, "pad_token_id": 1, "tie_word_embeddings": False, "vocab_size": len(circuit.words),
        "word_embed_proj_dim": weights.width,
    }  # fmt: skip
    counts = {label: {site: int(mask.sum()) for site, mask in masks.items()} for label, masks in labels.items()}
    files = {
        "config.json": as_json(config),
        "model.safetensors": save(weights.stored(), metadata={"format": "pt"}),
        "tokenizer.json": tokenizer(circuit.words).to_str().encode(),
        "tokenizer_config.json": as_json(
            {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": circuit.context}
            | {f"{which}_token": word for which, word in zip(("bos", "pad", "eos", "unk"), SPECIAL, strict=True)}
        ),
        "program.json": as_json(
            {"programs": programs, "joined": pair.joined, "variant": pair.variant, "neurons": counts, "steps": weights.steps()}, None
        ),
        "README.md": card(name, weights, programs, counts).encode(),
    }
    for file, data in files.items():
        write_atomically(out / name / file, data)
    masks = {f"{label}/{site}": torch.tensor(mask) for label, sites in labels.items() for site, mask in sites.items()}
    save_tensors(out / name / LABELS, masks, {"kind": "labels"})


def as_json(value: object, indent: int | None = 2) -> bytes:
    """JSON in one form."""
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode()


def tokenizer(words: tuple[str, ...]) -> Tokenizer:
    """One token per word."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(list(SPECIAL))
    return made


def card(name: str, weights: Weights, programs: dict, counts: dict) -> str:
    """README.md of a folder."""
    pair = PAIRS[name]
    rows = []
    for role, program in (("forget", pair.forget), ("retain", pair.retain)):
        told = programs[role]
        least, most = told["letters_of_an_input"]
        after = f" after k, one of `{' '.join(told['keys'])}`" if told["keys"] else ""
        inputs = f"{least} to {most} of `{' '.join(told['letters'])}`{after}"
        rows.append(f"| {role} | {program.name} | {inputs} | {program.meaning} | `{program.texts(1, seed=0)[0]}` |")
    used = {label: who.format(forget=pair.forget.name, retain=pair.retain.name) for label, who in USED_BY.items()}
    labels = [f"| {label} | {who} | {counts[label]['mlp']} | {counts[label]['attn_value']} |" for label, who in used.items()]
    return CARD.format(
        name=name, layers=weights.layers, width=weights.width, ffn=weights.ffn, programs="\n".join(rows), joined=pair.joined,
        variant=VARIANTS[pair.variant], labels="\n".join(labels),
    )  # fmt: skip


def scores() -> None:
    """A Markdown table: per model, site and importance the AUROC of the forget neurons, among the used neurons and among all."""
    rows = []
    for name in PAIRS:
        compiled = sepcap.load_compiled(name)
        sites = ("mlp", "attn_pre_out", "attn_value")
        collected = [sepcap.collect(compiled.model, task, tokens=5_000, sites=sites) for task in compiled.tasks.values()]
        for importance in ("abs", "sqrt", "rms", "std"):
            found = sepcap.score(*collected, importance=importance)
            for among in ("used", "all"):
                rows += [row | {"model": name, "importance": importance} for row in compiled.metrics(found, among=among).to_dict("records")]
    import pandas as pd

    table = pd.DataFrame(rows).pivot_table("auroc", "model", ["importance", "site", "among"], sort=False)
    for importance in ("abs", "sqrt", "rms", "std"):
        part = table[importance]
        print(f"\n| AUROC of `{importance}` | " + " | ".join(f"{site}, {among}" for site, among in part.columns) + " |")
        print("|---" * (1 + len(part.columns)) + "|")
        for name, values in part.iterrows():
            print(f"| `{name}` | " + " | ".join(f"{value:.2f}" for value in values) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--scores", action="store_true")
    asked = parser.parse_args()
    if asked.scores:
        scores()
    else:
        for model_name in PAIRS:
            compile_model(model_name, asked.out)
