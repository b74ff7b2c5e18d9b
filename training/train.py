"""Train the embedded default model: a small OPT on the train split of the offline tasks.

    python training/train.py --out sepcap/models/assets/default

Prose and code in equal numbers of tokens (code: Python and C++ in equal numbers), byte-level BPE,
dropout, bf16 autocast, AdamW with a cosine schedule. After an interruption the same command resumes
from the last checkpoint. `training/card.py` then evaluates the model and writes the model card.
"""

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import tyro
from jaxtyping import UInt32
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from tqdm.auto import tqdm
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from sepcap.tasks.batches import pack
from sepcap.tasks.sources.local import TRAINED_ON, Kind, documents
from sepcap.tasks.sources.ngrams import common_runs, runs, sampled, united

SHARES: dict[Kind, int] = {"prose": 2, "python": 1, "cpp": 1}
"""Rows of each kind of text per four rows of a batch."""

EXTRA = ("astropy", "dask", "distributed", "django", "matplotlib", "nltk", "skimage", "sklearn", "sphinx", "sqlalchemy", "statsmodels",
         "twisted", "wandb", "xarray")  # fmt: skip
"""Packages used for training only, those of `training/requirements.txt`: with more text, less of it is used in several epochs."""


@dataclass(frozen=True)
class TrainConfig:
    """Model size and training settings."""

    out: Path = Path("sepcap/models/assets/default")
    """Folder that receives the model in Hugging Face format."""
    work: Path = Path("training/work")
    """Folder for the tokenised corpus and the checkpoint."""
    layers: int = 6
    d_model: int = 256
    heads: int = 4
    vocabulary: int = 4096
    context: int = 256
    dropout: float = 0.1
    batch: int = 32
    """Rows per step."""
    tokens: int = 44_000_000
    learning_rate: float = 2e-3
    warmup: int = 300
    weight_decay: float = 0.1
    max_train_chars: int = 45_000_000
    """Per kind of text: Python sources would otherwise be ten times the rest."""
    seed: int = 0
    save_every: int = 250


def train_texts(kind: Kind, chars: int) -> Iterator[str]:
    """Documents of the train split; prose up to so many characters, and half as many of Python and of C++ each."""
    chars = chars * SHARES[kind] // max(SHARES.values())
    for document in documents(kind, "train"):
        yield document["text"]
        chars -= len(document["text"])
        if chars < 0:
            return


def train_tokenizer(texts: dict[str, list[str]], config: TrainConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE on equal amounts of prose and code."""
    rng = np.random.default_rng(config.seed)
    sample: list[str] = []
    for kind, share in SHARES.items():
        budget = share * 2_000_000
        for i in rng.permutation(len(texts[kind])):
            budget -= len(texts[kind][i])
            sample.append(texts[kind][i])
            if budget < 0:
                break
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=config.context,
        clean_up_tokenization_spaces=False,
    )


def prepare(config: TrainConfig) -> tuple[PreTrainedTokenizerFast, dict[str, np.ndarray]]:
    """Tokenizer and packed rows per kind of text, made once and stored in the work folder."""
    config.work.mkdir(parents=True, exist_ok=True)
    rows_files = {kind: config.work / f"{kind}.npy" for kind in SHARES}
    tokenizer_folder = config.work / "tokenizer"
    if not all(f.exists() for f in rows_files.values()):
        texts: dict[str, list[str]] = {}
        for kind in SHARES:
            texts[kind], chars = [], 0
            for row in tqdm(documents(kind, "train", more=EXTRA), desc=f"reading {kind}", unit=" documents"):
                texts[kind].append(row["text"])
                chars += len(row["text"])
                if chars > config.max_train_chars:
                    break
        tokenizer = train_tokenizer(texts, config)
        tokenizer.save_pretrained(tokenizer_folder)
        save_file({"runs": seen(texts)}, config.work / TRAINED_ON.name)
        for kind, file in rows_files.items():
            encoded = (e.ids for e in tokenizer.backend_tokenizer.encode_batch(texts[kind], add_special_tokens=False))
            rows = [r for r in pack(encoded, config.context, tokenizer.bos_token_id) if len(r) == config.context]
            np.save(file, np.stack(rows).astype(np.uint16))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    return tokenizer, {kind: np.load(file) for kind, file in rows_files.items()}


def seen(texts: dict[Kind, list[str]]) -> UInt32[np.ndarray, " run"]:
    """Sampled 13-grams of all texts, without idiom: documents of another installation that contain them are not held out."""
    parts = []
    for of_a_kind in texts.values():
        own = [united([runs(text)]) for text in of_a_kind]
        parts.append(np.setdiff1d(united(own), common_runs(own), assume_unique=True))
    return sampled(united(parts))


@lru_cache(maxsize=8)
def order_of(kind: str, epoch: int, size: int, seed: int) -> np.ndarray:
    """Order of the rows of one kind in one epoch."""
    return np.random.default_rng([seed, epoch, *kind.encode()]).permutation(size)


def batch_at(step: int, rows: dict[str, np.ndarray], config: TrainConfig) -> torch.Tensor:
    """The rows of one step: every kind has its share, in a new random order in each epoch."""
    chosen = []
    for kind, share in SHARES.items():
        n = config.batch * share // sum(SHARES.values())
        for k in range(step * n, (step + 1) * n):
            epoch, position = divmod(k, len(rows[kind]))
            chosen.append(rows[kind][order_of(kind, epoch, len(rows[kind]), config.seed)[position]])
    return torch.from_numpy(np.stack(chosen).astype(np.int64))


class PooledDropout:
    """Dropout on the two residual branches of every block, with masks that are slices of one random pool.

    The compiled random numbers of `nn.Dropout` take a third of a training step on a CPU; slices of a
    pool that is redrawn every few steps take almost no time and drop as many activations.
    """

    def __init__(self, model: OPTForCausalLM, p: float, numel: int, generator: torch.Generator) -> None:
        self.p, self.numel, self.generator = p, numel, generator
        self.masks: list[torch.Tensor] = []
        self.pool = torch.empty(0)
        self.places = 0
        for layer in model.model.decoder.layers:
            for module in (layer.self_attn, layer.fc2):
                module.register_forward_hook(self._hook(self.places))
                self.places += 1

    def _hook(self, place: int):
        def drop(module: nn.Module, inputs: object, output: object) -> object:
            if not self.masks:
                return output
            if isinstance(output, tuple):
                return (output[0] * self.masks[place].view(output[0].shape), *output[1:])
            return output * self.masks[place].view(output.shape)

        return drop

    def draw(self, step: int) -> list[torch.Tensor]:
        """One mask per residual branch for this step."""
        if step % 20 == 0 or not len(self.pool):
            keep = torch.rand(2 * self.numel, generator=self.generator) >= self.p
            self.pool = keep.to(torch.bfloat16) / (1 - self.p)
        offsets = torch.randint(0, self.numel, (self.places,), generator=self.generator).tolist()
        return [self.pool[o : o + self.numel] for o in offsets]


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Linear warm-up, then cosine decay to a twentieth of the maximum."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    return config.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def main(config: TrainConfig) -> None:
    """Prepare the corpus, train and save the model."""
    tokenizer, rows = prepare(config)
    per_step = config.batch * config.context
    steps = config.tokens // per_step
    print({k: f"{v.size / 1e6:.1f} M tokens" for k, v in rows.items()}, f"{steps} steps of {per_step} tokens", flush=True)

    torch.manual_seed(config.seed)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.d_model,
            word_embed_proj_dim=config.d_model,
            ffn_dim=4 * config.d_model,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.context,
            dropout=0.0,  # done by PooledDropout
            attention_dropout=0.0,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.set_attn_implementation("eager")  # at context 256 its compiled backward is faster than the CPU's flash kernel
    model.train()
    generator = torch.Generator().manual_seed(config.seed)
    dropout = PooledDropout(model, config.dropout, per_step * config.d_model, generator)
    decay = [p for p in model.parameters() if p.dim() > 1]
    other = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)

    def loss_of(ids: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
        dropout.masks = masks
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(ids, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden)
        targets = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    compiled = torch.compile(loss_of, dynamic=False)
    checkpoint = config.work / "checkpoint.pt"
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        first = state["step"]
        dropout.draw(0)
    log = (config.work / "log.jsonl").open("a")
    started, recent = time.time(), []
    for step in tqdm(range(first, steps), initial=first, total=steps, mininterval=30):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, config)
        loss = compiled(batch_at(step, rows, config), dropout.draw(step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            speed = (step + 1 - first) * per_step / (time.time() - started)
            log.write(json.dumps({"step": step + 1, "loss": float(np.mean(recent)), "tokens_per_second": round(speed)}) + "\n")
            log.flush()
            recent = []
        if (step + 1) % config.save_every == 0 or step + 1 == steps:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(),
                "step": step + 1,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    model.config.dropout = config.dropout
    model.to(torch.bfloat16).save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)
    shutil.copy(config.work / TRAINED_ON.name, config.out)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    settings["corpus_tokens"] = {kind: int(v.size) for kind, v in rows.items()}
    settings["steps"] = steps
    (config.out / "training.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(TrainConfig))
