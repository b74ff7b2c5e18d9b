"""Measure the embedded model on the evaluation split and write its model card.

python training/card.py
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import tyro

import sepcap
from sepcap.evaluation.generation import continuation, prompt_of
from sepcap.models.loading.load import default_folder
from sepcap.tasks.samples import sample_task

TASKS = ("local-prose", "local-code", "local-python", "local-cpp")
SHOWN = ("local-prose", "local-python", "local-cpp")
"""Tasks from which the prompts of the samples are taken."""


@dataclass(frozen=True)
class CardConfig:
    """Folder of the model, and size of the evaluation."""

    folder: Path = field(default_factory=default_folder)
    tokens: int = 60_000
    """Predictions per task."""


def main(config: CardConfig) -> None:
    """Evaluate, and write README.md and evaluation.json next to the weights."""
    model = sepcap.load_model(config.folder)
    training = json.loads((config.folder / "training.json").read_text())
    parameters = sum(p.numel() for p in model.original_model.parameters())
    rows, results = [], {}
    for task in TASKS:
        e = sepcap.evaluate(model, task, tokens=config.tokens)
        results[task] = e.as_row()
        rows.append(
            f"| {task} | {e.n:,} | {e.n_documents:,} | {e.top1:.3f} ± {e.se('top1'):.3f} | {e.top10:.3f} ± {e.se('top10'):.3f} "
            f"| {e.loss:.3f} ± {e.se('loss'):.3f} |"
        )
    prompts = {task: prompt_of(sample_task(model, sepcap.load_task(task), "evaluate", 100), model.tokenizer) for task in SHOWN}
    samples = "\n\n".join(f"{task}:\n\n```\n{prompt}⟶{continuation(model, prompt)}\n```" for task, prompt in prompts.items())
    corpus = ", ".join(f"{kind} {tokens / 1e6:.1f} M" for kind, tokens in training["corpus_tokens"].items())
    (config.folder / "README.md").write_text(f"""# The embedded model of sepcap

A small OPT ({training["layers"]} layers, d_model {training["d_model"]}, {training["heads"]} heads, ReLU, biases, context {training["context"]},
{parameters / 1e6:.1f} M parameters, stored as bfloat16) with a byte-level BPE of {training["vocabulary"]} tokens. With it every
function of the package can be tried, tested and demonstrated without a network. It was trained on the prose and code of one Python
installation and is of no use for anything else.

## Training

`make model`, in an environment with the packages of `training/requirements.txt`: {training["steps"]:,} steps of
{training["batch"]} rows ({training["tokens"] / 1e6:.0f} M tokens, half prose, a quarter Python, a quarter C++), AdamW, learning rate {training["learning_rate"]:g} with
{training["warmup"]} steps of warm-up and a cosine, weight decay {training["weight_decay"]:g}, dropout {training["dropout"]:g} on both residual branches, bf16 autocast, seed {training["seed"]}.
The data is the `train` split of `local-prose`, `local-python` and `local-cpp` in that environment ({corpus} tokens of text): docstrings, package
descriptions and the language reference; Python sources without docstrings and comments; the C++ headers of torch without
comments. A file's split is determined by a hash of its package-relative path. Lines that share 13 consecutive words with a document of the evaluation or
collection split are removed from the training text. `trained_on.safetensors` contains a sixteenth of the 13-grams of the remaining text, hashed: a document of any installation that has more than 5% of its own among them is not used as held-out text.

## Evaluation

Made by `python training/card.py` on the `evaluate` split of the installation on which it was run: mean ± standard error over documents, in rows of {training["context"]} tokens.

| task | predictions | documents | top-1 | top-10 | loss (nats) |
|---|---|---|---|---|---|
{chr(10).join(rows)}

## Samples (temperature 0.5, seed 0)

{samples}
""")
    (config.folder / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    main(tyro.cli(CardConfig))
