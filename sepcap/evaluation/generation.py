"""Sampled continuations of a prompt: what numbers cannot show."""

from typing import Any

import torch

from sepcap.models.forward import device_of
from sepcap.tasks.batches import separator_of

PROMPTS = {
    "code": "import os\n\n\ndef read_lines(path):\n",
    "prose": "The function returns the number of",
}
"""One prompt per kind of text of the offline tasks, for a look before and after pruning."""


def continuation(model: Any, prompt: str, *, tokens: int = 60, temperature: float = 0.5, seed: int = 0) -> str:
    """The model's continuation of a prompt, sampled with a seed.

    Args:
        model: a hooked model.
        prompt: text to continue.
        tokens: most tokens to generate; fewer where the context or an end-of-text token stops it.
        temperature: 0 takes the most likely token every time.
        seed: the same seed gives the same text; the global random state is left alone.

    Returns:
        The continuation alone, without the prompt.
    """
    ids = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start = separator_of(model.tokenizer)
    ids = ids if start is None else [start, *ids]
    room = model.cfg.n_ctx - len(ids)
    if room < 1:
        raise ValueError(f"prompt has {len(ids)} tokens; this model sees at most {model.cfg.n_ctx}, so there is no room to continue")
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
