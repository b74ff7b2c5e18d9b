"""Sampled continuations, many at a time, with a key-value cache.

Each continuation has its own random numbers: it depends neither on the batch size nor on the other continuations.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sepcap.models.forward import device_of, measuring
from sepcap.progress import progress
from sepcap.statistics.collect import BATCH_SIZE, halving_batches

Ids = list[int]

Beginning = Callable[[list[int]], AbstractContextManager[Any]]
"""Returns a context manager for the pass over the prompts with these numbers; it exits before the first token is drawn."""


def continuations(
    model: Any, prompts: Sequence[Ids], n: int, *, tokens: int = 20, temperature: float = 1.0, seed: int = 0, batch_size: int = BATCH_SIZE
) -> list[Ids]:
    """Token ids of n continuations of prompts taken in turn, without the prompts and without the end-of-text token.

    Args:
        model: a hooked model.
        prompts: token ids of every prompt, BOS included.
        n: number of continuations.
        tokens: maximum number of tokens of each; fewer if an end-of-text token stops it.
        temperature: 0 selects the most likely token at every step.
        seed: the same seed gives the same tokens, whatever the batch size (up to rounding in the model).
        batch_size: continuations per pass, of prompts of one length, so that there is no padding.
    """
    check_room(model, prompts, tokens)
    if temperature == 0 and n > len(prompts):
        raise ValueError(f"n={n}: at temperature=0 every prompt has only one continuation; give at most n={len(prompts)}, one per prompt")
    luck = torch.from_numpy(np.random.default_rng(seed).random((n, tokens)))
    return sampled(model, [prompts[i % len(prompts)] for i in range(n)], luck, temperature, batch_size=batch_size)


def check_room(model: Any, prompts: Sequence[Ids], tokens: int) -> None:
    """Raise if a prompt leaves no room for so many new tokens in the context of a model."""
    for i, ids in enumerate(prompts):
        if len(ids) > model.cfg.n_ctx - tokens:
            raise ValueError(
                f"prompts[{i}] has {len(ids)} tokens; the model's context is {model.cfg.n_ctx}, so there is no room for {tokens} more: "
                "shorten it, or ask for fewer tokens"
            )


def sampled(
    model: Any,
    prompts: Sequence[Ids],
    luck: Float[Tensor, "prompt new"],
    temperature: float,
    *,
    batch_size: int = BATCH_SIZE,
    beginning: Beginning | None = None,
) -> list[Ids]:
    """One continuation of every prompt, drawn with the random numbers of its row.

    Args:
        model: a hooked model.
        prompts: token ids of every prompt, BOS included.
        luck: a uniform random number for every token of every continuation.
        temperature: 0 selects the most likely token at every step.
        batch_size: continuations per pass, of prompts of one length, so that there is no padding. Halved, with a warning, when memory
            runs out.
        beginning: entered around the pass over the prompts only; the cache carries its effect on to the new tokens.
    """
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(i)

    def one_pass(size: int) -> dict[int, Ids]:
        found: dict[int, Ids] = {}
        bar = progress(total=len(prompts), desc="continuations", unit="text")
        with measuring(model), bar:
            for group in by_length.values():
                for chosen in (group[first : first + size] for first in range(0, len(group), size)):
                    ids = torch.tensor([prompts[i] for i in chosen], device=device_of(model))
                    begin = nullcontext() if beginning is None else beginning(chosen)
                    found |= zip(chosen, sample_batch(model, ids, luck[chosen], temperature, begin), strict=True)
                    bar.update(len(chosen))
        return found

    found = halving_batches(one_pass, batch_size)
    return [found[i] for i in range(len(prompts))]


@torch.inference_mode()
def sample_batch(
    model: Any,
    ids: Int[Tensor, "batch pos"],
    luck: Float[Tensor, "batch new"],
    temperature: float,
    begin: AbstractContextManager[Any],
) -> list[Ids]:
    """Tokens that follow every row, up to and without the first end-of-text token; `begin` is active for the prompts only.

    If the tokenizer declares no such token, a row ends with its last random number.
    """
    stop = model.tokenizer.eos_token_id
    with begin:
        logits, cache = model(ids, return_type="logits_and_cache", past_key_values=None, use_cache=True)
    drawn = torch.empty((len(ids), 0), dtype=torch.long)
    for uniform in luck.T:
        if drawn.shape[1]:
            fed = drawn[:, -1:].to(ids.device)
            logits, cache = model(fed, return_type="logits_and_cache", past_key_values=cache, use_cache=True)
        drawn = torch.cat([drawn, draw(logits[:, -1], uniform, temperature)[:, None]], dim=1)
        if stop is not None and bool((drawn == stop).any(dim=1).all()):
            break
    return [list(itertools.takewhile(lambda token: token != stop, row)) for row in drawn.tolist()]


def draw(logits: Float[Tensor, "batch vocab"], uniform: Float[Tensor, " batch"], temperature: float) -> Int[Tensor, " batch"]:
    """One token per row by inverting its cumulative distribution at a uniform random number.

    Computed on the CPU in float64, which some devices lack: the same numbers then give the same tokens on every device.
    """
    logits = logits.cpu().double()
    if logits.isnan().any():
        raise FloatingPointError("the model's logits are NaN: no token can be drawn")
    if temperature == 0:
        return logits.argmax(dim=1)
    cumulative = (logits / temperature).softmax(dim=1).cumsum(dim=1)
    places = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    return places.clamp(max=logits.shape[1] - 1)  # the product can round up to the sum itself
