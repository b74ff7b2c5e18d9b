"""Train a small RoBERTa on the train split of the offline tasks: a masked language model for the notebook and figures.

    python training/roberta.py --out training/work/roberta

The byte-level BPE has a small vocabulary, so that a small model learns the contexts of its tokens in minutes. Rows of prose and code are as
in `training/train.py`; some tokens of each row are predicted, others every time the row is used. Printed at the end: accuracy on the
evaluation part of each task, and the share of the most frequent predicted token, which is the accuracy of always predicting it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from train import SHARES, TrainConfig, batch_at, learning_rate, train_texts, train_tokenizer
from transformers import RobertaConfig, RobertaForMaskedLM
from vit import groups

import sepcap
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.evaluation.result import Evaluation
from sepcap.tasks.batches import pack
from sepcap.tasks.samples import sample_task


@dataclass(frozen=True)
class RobertaTraining:
    """Model size and training settings."""

    out: Path = Path("training/work/roberta")
    """Folder that receives the model in Hugging Face format, with its tokenizer."""
    layers: int = 4
    d_model: int = 128
    heads: int = 4
    vocabulary: int = 1024
    context: int = 64
    """Tokens per row, beginning and end token included."""
    batch: int = 32
    """Rows per step."""
    steps: int = 2400
    learning_rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.05
    share: float = 0.3
    """Share of the tokens that are predicted in training: twice that of evaluation, because each predicted token is a training signal."""
    max_train_chars: int = 4_000_000
    """Characters of prose; half as many of Python and of C++ each."""
    seed: int = 0


def prepare(config: RobertaTraining) -> tuple[Any, dict[str, Int[np.ndarray, "row pos"]]]:
    """Tokenizer, and full rows per kind of text in the format of `MaskedSample`."""
    read = {kind: list(train_texts(kind, config.max_train_chars)) for kind in SHARES}
    tokenizer = train_tokenizer(read, TrainConfig(vocabulary=config.vocabulary - 1, context=config.context, seed=config.seed))
    tokenizer.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"})
    begin, end, found = tokenizer.cls_token_id, tokenizer.sep_token_id, {}
    for kind in SHARES:
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(read[kind], add_special_tokens=False)
        rows = np.stack([row for row in pack((e.ids for e in encoded), config.context - 1, begin) if len(row) == config.context - 1])
        rows[:, 1:][rows[:, 1:] == begin] = end
        found[kind] = np.pad(rows, ((0, 0), (0, 1)), constant_values=end)
    return tokenizer, found


def hide(
    rows: Int[Tensor, "row pos"], share: float, special: Int[Tensor, " id"], mask: int, generator: torch.Generator
) -> tuple[Int[Tensor, "row pos"], Bool[Tensor, "row pos"]]:
    """The model's input, and which tokens it predicts: of these, 80% are masked, 10% random and 10% unchanged."""
    asked = (torch.rand(rows.shape, generator=generator) < share) & ~torch.isin(rows, special)
    draw = torch.rand(rows.shape, generator=generator)
    others = torch.randint(int(special.max()) + 1, mask, rows.shape, generator=generator)  # special ids come first, the mask last
    seen = torch.where(asked & (draw < 0.8), mask, torch.where(asked & (draw >= 0.9), others, rows))
    return seen, asked


def waves(positions: int, width: int, scale: float) -> Float[Tensor, "position dimension"]:
    """Sines and cosines of the position, with wavelengths from 2π to 64π: a shift by one position is always the same rotation."""
    angles = torch.arange(positions)[:, None] / 32 ** torch.linspace(0, 1, width // 2)
    return scale * 2**0.5 * torch.cat([angles.sin(), angles.cos()], dim=1)


def train_roberta(config: RobertaTraining) -> Path:
    """Train and save; the same configuration gives the same weights on the same machine.

    Returns:
        The folder, which `sepcap.load_model` takes.
    """
    tokenizer, rows = prepare(config)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = RobertaForMaskedLM(
            RobertaConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.d_model,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=4 * config.d_model,
                max_position_embeddings=config.context + tokenizer.pad_token_id + 1,
                type_vocab_size=1,
                initializer_range=0.05,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                bos_token_id=tokenizer.cls_token_id,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.sep_token_id,
            )
        )
    with torch.no_grad():  # attention to neighbours is learned in a tenth of the steps needed with random initial values
        positions = model.roberta.embeddings.position_embeddings.weight
        positions.copy_(waves(*positions.shape, model.config.initializer_range))
    model.set_attn_implementation("eager")  # twice as fast here as the CPU's fused kernel in bf16
    generator = torch.Generator().manual_seed(config.seed)
    special = torch.tensor([i for i in tokenizer.all_special_ids if i != tokenizer.mask_token_id])
    optimizer = torch.optim.AdamW(groups(model, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.98))
    model.train()
    for step in tqdm(range(config.steps), desc="train", delay=2, disable=None):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.steps, config)
        whole = batch_at(step, rows, config)
        seen, asked = hide(whole, config.share, special, tokenizer.mask_token_id, generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.roberta(seen).last_hidden_state
            logits = model.lm_head(hidden[asked])  # the unembedding is the most expensive part
        nn.functional.cross_entropy(logits.float(), whole[asked]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)
    return config.out


def measured(folder: Path, task: str, tokens: int = 50_000) -> tuple[Evaluation, float]:
    """The evaluation of a trained model on a task, and the share of the most frequent of the predicted tokens."""
    model = sepcap.load_model(folder)
    sample = sample_task(model, sepcap.load_task(task), "evaluate", tokens)
    return evaluate_sample(model, sample), float(np.bincount(targets := sample.targets()).max() / len(targets))


if __name__ == "__main__":
    folder = train_roberta(tyro.cli(RobertaTraining))
    for task in ("local-prose", "local-code"):
        evaluation, most_frequent = measured(folder, task)
        print(f"{evaluation}; its most frequent token: {most_frequent:.4f}")
