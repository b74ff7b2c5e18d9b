"""Train a small ViT on the handwritten digits included in scikit-learn: an image classifier for tests, notebook and figures.

    python training/vit.py --out training/work/vit

Real images of 8×8 pixels in one channel, patches of 2×2; shifted by up to a pixel in training. Only the train part of `local-digits`
is used; its other parts are held out. Printed at the end: accuracy on the evaluation part.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from train import learning_rate
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import sepcap
from sepcap.tasks.images import DigitsSource

SIDE = 8
"""Width and height of an image in pixels."""


@dataclass(frozen=True)
class ViTTraining:
    """Model size and training settings."""

    out: Path = Path("training/work/vit")
    """Folder that receives the model in Hugging Face format, with its image processor."""
    layers: int = 4
    d_model: int = 64
    heads: int = 4
    steps: int = 1200
    batch: int = 64
    """Images per step."""
    learning_rate: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.1
    seed: int = 0


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: weight decay for tensors with more than one dimension, none for the others (biases and norms)."""
    parameters = list(model.parameters())
    decay = [p for p in parameters if p.dim() > 1]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}]


def new_model(config: ViTTraining) -> tuple[ViTForImageClassification, ViTImageProcessorPil]:
    """The model before training, and its image processor."""
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=config.d_model,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.d_model,
            image_size=SIDE,
            patch_size=2,
            num_channels=1,
            num_labels=10,
            initializer_range=0.1,  # the usual 0.02 is for models ten times as wide, and training is four times slower with it here
        )
    )
    processor = ViTImageProcessorPil(do_resize=False, size={"height": SIDE, "width": SIDE}, image_mean=[0.5], image_std=[0.5])
    return model, processor


def shifted(pixels: Float[Tensor, "image 1 8 8"], generator: torch.Generator) -> Float[Tensor, "image 1 8 8"]:
    """Every image shifted by up to one pixel in each direction; the new pixels are background."""
    wide = nn.functional.pad(pixels, (1, 1, 1, 1), value=-1.0)
    down, right = torch.randint(3, (2, len(pixels)), generator=generator)
    rows, columns = (start[:, None] + torch.arange(SIDE) for start in (down, right))
    image = torch.arange(len(pixels))[:, None, None]
    return wide[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def batches(n: int, config: ViTTraining, generator: torch.Generator) -> Iterable[Int[Tensor, " image"]]:
    """Numbers of the images of every step: all images in random order, with a new order in every epoch."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(config.steps):
        if len(order) < config.batch:
            order = torch.cat([order, torch.randperm(n, generator=generator)])
        yield order[: config.batch]
        order = order[config.batch :]


def train_vit(config: ViTTraining) -> Path:
    """Train and save; the same configuration gives the same weights on the same machine.

    Returns:
        The folder, which `sepcap.load_model` takes.
    """
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model, processor = new_model(config)
    images = DigitsSource().documents("train")
    pixels = processor(list(images["image"]), return_tensors="pt")["pixel_values"]
    labels = torch.tensor(images["label"])
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(groups(model, config.weight_decay), lr=config.learning_rate)
    model.train()
    for step, chosen in enumerate(tqdm(batches(len(labels), config, generator), total=config.steps, desc="train", delay=2, disable=None)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.steps, config)
        logits = model(shifted(pixels[chosen], generator)).logits
        nn.functional.cross_entropy(logits, labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(config.out)
    processor.save_pretrained(config.out)
    return config.out


if __name__ == "__main__":
    folder = train_vit(tyro.cli(ViTTraining))
    print(sepcap.evaluate(sepcap.load_model(folder), "local-digits", tokens=450))
