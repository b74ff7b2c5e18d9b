"""A few tokens through a model, before and after it is hooked, to check that it can be scored and that its logits are unchanged."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PretrainedConfig

from sepcap.models.blocks.unembedding import unembedding_of, watching
from sepcap.models.forward import is_out_of_memory, logits_of, measuring
from sepcap.models.kinds import inner, is_hooked_transformer, kind_of
from sepcap.models.wrappers import hooked_modules, warn_of_lost_hooks

TOKENS = 6
"""Length of a probe."""
SAME = 1e-4
"""Share of the largest logit by which float32 logits may differ through rounding."""
PASSED: WeakSet[Any] = WeakSet()
"""Hooked models whose attention was seen to be that of their kind."""


@dataclass(eq=False)
class Probe:
    """Logits of the plain model on a small input, for comparison with the hooked one.

    Attributes:
        inputs: four rows of token ids, a, b, b and a, where a and b differ in the last one; or two images.
        logits: logits of the plain model.
        hooked: modules with the user's torch hooks.
    """

    inputs: Tensor
    logits: Tensor
    hooked: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def probed(hf_model: Any, name: str) -> Probe:
    """Run a few short rows through a Hugging Face model that is not hooked yet, in one pass.

    Raises:
        NotImplementedError: a model without logits of tokens, a causal one that attends to the tokens that it is to predict, or a
            masked one that attends to earlier tokens only.
    """
    hf_model.eval()
    inputs, hooked = _inputs(hf_model), hooked_modules(hf_model)
    try:
        logits = getattr(hf_model(inputs), "logits", None)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        raise NotImplementedError(f"model={name!r} cannot be run on {list(inputs.shape)} inputs, before any hook: {error}") from error
    if not isinstance(logits, Tensor):
        raise NotImplementedError(
            f"model={name!r} is a {type(hf_model).__name__}, which gives no logits of tokens; load it with AutoModelForCausalLM or "
            "AutoModelForMaskedLM"
        )
    _check_kind(hf_model, logits, name)
    return Probe(inputs, logits, hooked)


@torch.no_grad()
def check_object(model: Any) -> None:
    """The same for a hooked model that the user has made, in one pass, once: models that passed are in `PASSED`.

    A model with hooks at work is not run: they may count their calls, or draw random numbers.

    Raises:
        NotImplementedError: a model that attends to the tokens that it is to predict, or a masked one with causal attention.
    """
    hooks = (hook for point in model.hook_dict.values() for hook in (*point.fwd_hooks, *point.bwd_hooks))
    # a bridge has permanent hooks of its own
    if model in PASSED or kind_of(model) == "images" or not all(hook.is_permanent for hook in hooks):
        return
    with measuring(model):
        logits = logits_of(model, _inputs(model))
    _check_kind(inner(model), logits, str(model.cfg.model_name))
    PASSED.add(model)


def _check_kind(model: Any, logits: Tensor, name: str) -> None:
    """Raise if logits of earlier positions move with the last token in a causal model, or do not in a masked one."""
    kind = kind_of(model)
    if kind == "images":
        return
    moved, rounding = _moves(logits[:, :-1].float())
    if kind == "causal" and moved > 4 * rounding + SAME * float(logits.abs().max()):
        raise NotImplementedError(
            f"model={name!r} is a {type(model).__name__} with bidirectional attention: its logits at earlier positions change by "
            f"{moved:.2g} with the last token, so that every next token is in the input. Load a causal model (is_decoder=True), or a "
            "masked one by its class, …ForMaskedLM"
        )
    # in half precision a small change may be within the rounding
    if kind == "masked" and moved <= (rounding if logits.dtype.itemsize >= 4 else 0.0):
        raise NotImplementedError(
            f"model={name!r} is a {type(model).__name__} with causal attention: its logits at earlier positions do not change with the "
            "last token, so that a masked token is predicted from one side only. Load a masked model with is_decoder=False, or a causal "
            "one by its class, …ForCausalLM"
        )


@torch.no_grad()
def check_hooked(bridge: Any, before: Probe, name: str) -> None:
    """Compare a hooked model's logits with those of the plain one, in both ways in which sepcap runs it.

    In half precision, rounding and the routing of experts allow no bound that would reveal errors of a bridge; nothing is compared
    then. A HookedTransformer, which sepcap configures itself, is compared with a wide tolerance.

    Raises:
        NotImplementedError: logits that differ by more than rounding.
    """
    lost: set[str] = set()
    passes = []
    unembedding = unembedding_of(bridge)
    with _counted(before.hooked) as called:
        with watching(unembedding) as read:
            passes.append(bridge(before.inputs, return_type="logits"))
        if unembedding is not None:
            unembedding.compare(read, passes[0])
        lost |= before.hooked.keys() - called
        if before.hooked:
            called.clear()
            with measuring(bridge):
                passes.append(logits_of(bridge, before.inputs))
            lost |= before.hooked.keys() - called
    finite = before.logits.isfinite()  # logits that are not finite in the plain model need not be finite here
    off = max(float(torch.where(finite, (logits.view_as(finite) - before.logits).abs(), 0).max()) for logits in passes)
    largest = float(torch.where(finite, before.logits.abs(), 0).max())
    made, whole, own = type(bridge).__name__, before.logits.dtype.itemsize >= 4, is_hooked_transformer(bridge)
    if (whole or own) and not off <= (SAME if whole else 500 * SAME) * largest:
        instead = "; leave out backend, or set 'bridge'" if own else ""
        why = f": its torch hooks on {', '.join(sorted(lost))} are lost; remove them and hook the {made}" if lost else instead
        raise NotImplementedError(
            f"model={name!r}: a {made} computes logits that differ from the plain model's by up to {off:.2g}, where the largest is "
            f"{largest:.2g}{why}"
        )
    warn_of_lost_hooks(lost, made)
    PASSED.add(bridge)


def _inputs(hf_model: Any) -> Tensor:
    device = next(hf_model.parameters()).device
    if kind_of(hf_model) == "images":
        config = hf_model.config
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.randn(2, config.num_channels, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        return pixels.to(device, next(hf_model.parameters()).dtype)
    rows = hf_model.cfg.d_vocab if is_hooked_transformer(hf_model) else inner(hf_model).get_input_embeddings().weight.shape[0]
    ids = (torch.arange(TOKENS + 1) + rows // 2) % rows  # from the middle: special tokens are at the ends
    a, b = ids[:TOKENS], torch.cat([ids[: TOKENS - 1], ids[TOKENS:]])
    return torch.stack([a, b, b, a]).to(device)


def _moves(earlier: Tensor) -> tuple[float, float]:
    """How far logits of earlier positions differ between the two inputs of a probe, and between rows of the same input.

    Rows of the same input measure the rounding, in any precision: a fixed bound on it would be as large as the change of an untrained
    bidirectional model in bfloat16.
    """
    a, b, again_b, again_a = earlier
    between = [float((x - y).abs().max()) for x in (a, again_a) for y in (b, again_b)]
    return min(between), max(float((a - again_a).abs().max()), float((b - again_b).abs().max()))


@contextmanager
def _counted(modules: dict[str, Any]) -> Iterator[set[str]]:
    """Names of the modules that are called inside."""
    called: set[str] = set()
    handles = [m.register_forward_hook(lambda *_, name=name: called.add(name)) for name, m in modules.items()]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def taking_apart(hf_model: Any, name: str) -> Iterator[None]:
    """Raise a one-sentence error if a bridge cannot split a model into its parts, instead of an error from inside the bridge.

    Raises:
        NotImplementedError: a layout that the bridge does not support.
    """
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        unusual = _unusual_settings(hf_model.config)
        settings = f"; its settings that differ from the defaults of its family: {', '.join(unusual)}" if unusual else ""
        raise NotImplementedError(
            f"model={name!r}: TransformerBridge does not support the layout of this {type(hf_model).__name__}{settings}"
        ) from error


def _unusual_settings(config: Any) -> list[str]:
    """Boolean settings specific to a family that differ from the defaults of its configuration class."""
    if getattr(config, "has_no_defaults_at_init", False):
        return []
    usual, common = type(config)().to_dict(), PretrainedConfig().to_dict()
    found = config.to_dict()
    return [f"{key}={found[key]}" for key in usual if key not in common and isinstance(found.get(key), bool) and found[key] != usual[key]]
