"""Sampled continuations of a prompt, for qualitative comparison."""

from typing import Any

import numpy as np
import torch

from sepcap.models.forward import device_of
from sepcap.tasks.batches import TokenSample, separator_of
from sepcap.tasks.documents import Spelling

PROMPT_TOKENS = 16


def prompt_of(sample: TokenSample, tokenizer: Any) -> str:
    """The beginning of a task's first evaluation text: at most 16 tokens, and at most a quarter of the text in its row."""
    row = sample.rows[0] if sample.bos is None else sample.rows[0][1:]
    ends = np.flatnonzero(row == sample.bos)
    text = row[: ends[0]] if len(ends) else row
    return tokenizer.decode(text[: min(PROMPT_TOKENS, max(1, len(text) // 4))].tolist(), skip_special_tokens=True)


def continuation(model: Any, prompt: str, *, tokens: int = 60, temperature: float = 0.5, seed: int = 0) -> str:
    """The model's continuation of a prompt, sampled with a seed.

    Args:
        model: a hooked model.
        prompt: text to continue; a string like a special token in it is treated as text.
        tokens: maximum number of tokens to generate; fewer if the context or an end-of-text token stops it.
        temperature: 0 selects the most likely token at every step.
        seed: the same seed gives the same text; the global random state is not changed.

    Returns:
        The continuation alone, without the prompt.
    """
    ids = Spelling(model.tokenizer).ids(prompt)
    start = separator_of(model.tokenizer)
    ids = ids if start is None else [start, *ids]
    room = model.cfg.n_ctx - len(ids)
    if room < 1:
        raise ValueError(f"prompt has {len(ids)} tokens; the model's context is {model.cfg.n_ctx}, so there is no room to continue")
    device = device_of(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(seed)
        out = model.generate(
            torch.tensor([ids], device=device),
            max_new_tokens=min(tokens, room),
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            prepend_bos=False,
            return_type="tokens",
            verbose=False,
        )
    return model.tokenizer.decode(out[0, len(ids) :].tolist(), skip_special_tokens=True)
