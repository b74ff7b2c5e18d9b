"""One forward pass over a task, reduced to statistics of all requested sites."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sepcap.checks import FROM_0, checked, wrong
from sepcap.errors import warn
from sepcap.models.devices import device_of, layer_device
from sepcap.models.forward import is_out_of_memory, logits_of, measuring, output_in_place, run_hooks
from sepcap.models.sites import Population, get_site, populations
from sepcap.progress import progress, tell
from sepcap.statistics.accumulate import Accumulator, gather
from sepcap.statistics.backward import GradientCollector, check_gradients
from sepcap.statistics.gradients import IG_POINTS, resolve_gradients
from sepcap.statistics.moments import Statistics
from sepcap.statistics.replicates import Draws, ReplicateSums, replicated_sums
from sepcap.statistics.sharded_pass.driver import check_any_right, collect_in_shards
from sepcap.tasks.batches import Batch, TokenSample
from sepcap.tasks.documents import PerDocument
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import sample_task
from sepcap.workers.engines import Engine

T = TypeVar("T")

BATCH_SIZE = 16


@checked(gpus_per_run=FROM_0)
def collect(
    model: Any,
    task: Any,
    *,
    tokens: int = 100_000,
    sites: str | Iterable[str] = ("mlp", "attn_pre_out"),
    batch_size: int = BATCH_SIZE,
    context: int | None = None,
    include_bos: bool = False,
    histogram: bool = False,
    rotation: Any = None,
    seed: int = 0,
    per_document: PerDocument = "row",
    gradients: Any = False,
    k: int = IG_POINTS,
    checkpoint: bool = False,
    positions: Literal["all", "correct"] | Bool[Tensor, "row pos"] = "all",
    replicates: int = 0,
    workers: int | None = None,
    engine: Engine = "processes",
    load: Mapping[str, Any] | None = None,
    threads: int = 1,
    gpus_per_run: float | None = None,
) -> Statistics:
    """Collect activation statistics of every neuron of the sites on a task (METHODS 3).

    One forward pass; activations are reduced inside the hooks, so memory does not grow with `tokens`. The
    evaluation part of the task is not read. A masked language model receives the text as in evaluation, with 15% of its
    tokens hidden; activations at hidden positions are included.

    Args:
        model: what `load_model` returns.
        task: a task name, a path, a `datasets.Dataset`, a list of strings, or a Task.
        tokens: number of token positions, excluding BOS and padding; number of images for an image classifier.
        sites: one or more of "mlp", "attn_pre_out", "attn_value".
        batch_size: rows per forward pass; halved, with a warning, when memory runs out.
        context: tokens per row; default is the model's context, at most 512.
        include_bos: include the activations at BOS (outliers that do not depend on the dataset).
        histogram: also collect a histogram of every neuron's activations, for `.peak`, `.median`, `.quantile(q)` and the
            importances "kl", "js" and "wasserstein": 4 kB more per neuron, and up to 1.6 times the time.
        rotation: the `Rotation` in whose basis attention neurons are measured; the model itself is not changed.
        seed: sets the order of the documents, the positions of excerpts of long ones and, for a masked language model, which tokens are
            hidden; 0 keeps the original order of the documents.
        per_document: maximum number of tokens of one document: "row" (as many as fit in one row), a number, or None for whole documents.
        gradients: also collect gradients of the loss, for `.atp`, `.taylor`, `.fisher`: True. Or names: "atp", "taylor" and "fisher"
            (together one backward pass), "relp" (one more pass), "ig" (k more passes per site), "snip" (gradients of weights).
        k: number of points of "ig".
        checkpoint: keep only the inputs of the blocks for a backward pass, and compute each block again: less memory, more time.
        positions: "correct" keeps only positions at which the model's first choice is the right prediction, found in a pass of its own,
            and gradients are then of the loss of these predictions. For a pruned model give what `correct_positions` found with the
            unpruned one.
        replicates: number of bootstrap replicates over documents, 100 for intervals of scores: 8 bytes per replicate, neuron and sum,
            of which there are 5, and 4 more with gradients. They show how much of a score is due to the texts: `Scores.interval`,
            `Scores.stability`. The draws depend on a document's position in the task and on `seed`; the statistics are not changed.
        workers: cut the rows into eight shards and give them to so many workers; `model` is then a name or a folder, which each of them
            loads. The bits are the same for every number of workers, but not those of one pass: shards are merged in their order.
        engine, load, threads, gpus_per_run: where workers are, what they load the model with, threads and GPUs of each, as for
            `sepcap.sweep`.

    Returns:
        Statistics: site -> NeuronStatistics with `.mean`, `.abs`, `.rms`, … each [layer, neuron] or [layer, head, d_head].

    Raises:
        ValueError: unknown task or site, too little text; gradients of a model of inference tensors or quantised weights, or of a rotation.
        FloatingPointError: NaN or infinite activations or gradients, with layer and site.
        NotImplementedError: an architecture that "relp" or "snip" is not defined for.

    Source: [SP] section 3; METHODS 18 for gradients.

    Example:
        >>> forget = sepcap.collect(model, "local-code", tokens=20_000)  # doctest: +SKIP
        >>> forget["mlp"].abs.shape  # doctest: +SKIP
        torch.Size([6, 1024])
    """
    given = dict(locals())
    if workers is not None:
        where = {name: given.pop(name) for name in ("workers", "engine", "load", "threads", "gpus_per_run")}
        return collect_in_shards(given.pop("model"), given, **where)
    task = load_task(task)
    if not isinstance(positions, str | Tensor):
        raise wrong("positions", positions, "'all', 'correct' or what sepcap.correct_positions returns")
    sample = sample_task(model, task, "collect", tokens, context, seed, per_document)
    only = None if isinstance(positions, str) else positions
    if isinstance(positions, str) and positions == "correct":
        only = correct_in(model, sample, batch_size)
    return collect_sample(
        model,
        sample,
        sites,
        batch_size=batch_size,
        include_bos=include_bos,
        histogram=histogram,
        rotation=rotation,
        gradients=resolve_gradients(gradients),
        k=k,
        checkpoint=checkpoint,
        only=only,
        draws=Draws.of(task, sample, replicates, seed) if replicates else None,
    )


@checked()
def correct_positions(
    model: Any,
    task: Any,
    *,
    tokens: int = 100_000,
    batch_size: int = 16,
    context: int | None = None,
    seed: int = 0,
    per_document: PerDocument = "row",
) -> Bool[Tensor, "row pos"]:
    """The positions of a task's collection texts at which the model's first choice is the right prediction (METHODS 3).

    Find them once with the unpruned model, and pass them to `collect(..., positions=...)` for every pruned one, with the same tokens.

    Args:
        model: what `load_model` returns.
        task, tokens, context, seed, per_document: what is sampled, as for `collect`.
        batch_size: rows per forward pass.

    Returns:
        Bool [row, pos]: whether the prediction made at that position, of the next token, is right. False where nothing is predicted. For
        a masked language model the hidden positions, for an image classifier [image, 1].

    Example:
        >>> right = sepcap.correct_positions(model, "local-code", tokens=20_000)  # doctest: +SKIP
        >>> sepcap.delete(model, neurons)  # doctest: +SKIP
        >>> sepcap.collect(model, "local-code", tokens=20_000, positions=right)  # doctest: +SKIP

    Source: [SEP] section 4.3.3.
    """
    return correct_in(model, sample_task(model, load_task(task), "collect", tokens, context, seed, per_document), batch_size)


def correct_in(model: Any, sample: TokenSample, batch_size: int) -> Bool[Tensor, "row pos"]:
    """`correct_positions` of tokens that are already sampled."""
    return halving_batches(partial(right_in, model, sample), batch_size)


def collect_sample(
    model: Any,
    sample: TokenSample,
    sites: str | Iterable[str],
    *,
    batch_size: int = BATCH_SIZE,
    include_bos: bool = False,
    quiet: bool = False,
    histogram: bool = False,
    rotation: Any = None,
    gradients: tuple[str, ...] = (),
    k: int = IG_POINTS,
    checkpoint: bool = False,
    only: Bool[Tensor, "row pos"] | None = None,
    draws: Draws | None = None,
    part: bool = False,
) -> Statistics:
    """`collect` on tokens that are already sampled; `only` are the positions to which statistics are restricted, if any.

    In a part of a sample, none need be left of them.
    """
    bound = populations(model, sites)
    if rotation is not None and not hasattr(rotation, "activations"):
        raise TypeError(f"rotation is a {type(rotation).__name__}; give the Rotation that sepcap.rotate_values returned")
    if gradients and rotation is not None:
        raise ValueError("gradients= with rotation=: rotate the model itself with sepcap.rotate_values, and collect without rotation=")

    if only is not None:
        check_positions(only, sample, part)

    def one_pass(size: int) -> Statistics:
        accumulators = {site: _accumulators(population, histogram) for site, population in bound.items()}
        drawn = {} if draws is None else _replicated(draws, bound, accumulators, gradients)
        slopes = GradientCollector(model, bound, gradients, k, checkpoint, drawn) if gradients else None
        with ExitStack() as stack:
            how = {"desc": f"collect {sample.task}", "unit": "tok", "unit_scale": True, "quiet": quiet}
            bar = stack.enter_context(progress(total=sample.tokens, **how))
            stack.enter_context(measuring(model))
            if slopes is not None:
                stack.enter_context(slopes.prepared())
            for number, batch in enumerate(sample.batches(size)):
                here = None if only is None else only[number * size : (number + 1) * size, : batch.keep.shape[1]]
                for into in drawn.values():
                    into.begin(number * size, batch.asked if here is None else batch.asked & here)
                there = None if here is None else here.to(device_of(model))
                _collect_batch(model, batch.to(device_of(model)), accumulators, include_bos, rotation, slopes, there, drawn)
                bar.update(batch.size)
        info = info_of(model, sample, include_bos, rotation, only)
        found = {} if slopes is None else slopes.gathered()
        if not part:
            check_gradients(found)
        norms = {site: p.norms() if rotation is None else None for site, p in bound.items()}
        again = {site: into.gathered() for site, into in drawn.items()}
        return Statistics({site: gather(site, a, found.get(site), norms[site], again.get(site)) for site, a in accumulators.items()}, info)

    # inference tensors would have no gradients
    with torch.inference_mode(False):
        return halving_batches(one_pass, batch_size)


def halving_batches(one_pass: Callable[[int], T], batch_size: int) -> T:
    """Run a pass; when memory runs out, restart it with half the batch size."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give at least 1")
    while True:
        try:
            return one_pass(batch_size)
        except Exception as error:
            if not is_out_of_memory(error) or batch_size == 1:
                raise
        batch_size //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warn(f"out of memory: continuing with batch_size={batch_size}")


def _accumulators(population: Population, histogram: bool) -> list[Accumulator]:
    # the device of the activations; Apple's GPUs cannot add in float64
    at = [layer_device(population.model, layer) for layer in population.layers]
    devices = [torch.device("cpu") if device.type == "mps" else device for device in at]
    scratch: dict[torch.device, dict[tuple[int, torch.dtype], Tensor]] = {device: {} for device in devices}
    return [Accumulator(population.shape[1:], device, scratch[device], histogram) for device in devices]


def _replicated(
    draws: Draws, bound: dict[str, Population], accumulators: dict[str, list[Accumulator]], gradients: tuple[str, ...]
) -> dict[str, ReplicateSums]:
    names = replicated_sums(gradients)
    found = {site: ReplicateSums(draws, p.shape, accumulators[site][0].device, names) for site, p in bound.items()}
    size, many = sum(into.nbytes for into in found.values()), len(draws.weights)
    tell(f"{many} replicates over {len(set(draws.documents.values())):,} documents: {size / 1e6:,.0f} MB of memory for their sums")
    return found


def _collect_batch(
    model: Any,
    batch: Batch,
    accumulators: dict[str, list[Accumulator]],
    include_bos: bool,
    rotation: Any = None,
    gradients: GradientCollector | None = None,
    only: Bool[Tensor, "batch _"] | None = None,
    drawn: Mapping[str, ReplicateSums] = MappingProxyType({}),
) -> None:
    keep = batch.real if include_bos else batch.keep
    if only is not None:
        # the loss depends on activations at all earlier positions, so gradients are not restricted but the loss is
        keep, batch = keep & only, replace(batch, asked=batch.asked & only)
    # once per device, not once per layer
    at = {device: keep.to(device) for device in {a.device for layers in accumulators.values() for a in layers}}
    hooks = [
        (
            get_site(site).hook_name(layer),
            partial(_reduce, into=into, keep=at[into.device], turn=_turn(rotation, site, layer), drawn=drawn.get(site), layer=layer),
        )
        for site, layers in accumulators.items()
        for layer, into in enumerate(layers)
    ]
    if gradients is None:
        run_hooks(model, batch.inputs, hooks, batch.mask)
    else:
        gradients.add(batch, hooks)
    _check_finite(accumulators)
    if gradients is not None:
        gradients.check_finite()


def _turn(rotation: Any, site: str, layer: int) -> Callable[[Tensor], Tensor] | None:
    return None if rotation is None or site == "mlp" else partial(rotation.activations, site, layer)


def _reduce(
    z: Float[Tensor, "batch pos ..."],
    hook: Any,
    into: Accumulator,
    keep: Bool[Tensor, "batch _"],
    turn: Callable[[Tensor], Tensor] | None,
    drawn: ReplicateSums | None,
    layer: int,
) -> None:
    # for an image, one flag covers all its positions
    z = (z if turn is None else turn(z)).to(into.device)
    into.update(z, keep.expand(z.shape[:2]))
    if drawn is not None:
        drawn.add_activations(layer, z, keep.expand(z.shape[:2]))


def _check_finite(accumulators: dict[str, list[Accumulator]]) -> None:
    # Σ(z−z̄)² is NaN or infinite as soon as one activation is; one check per site, because each check synchronises a GPU
    broken = {}
    for site, layers in accumulators.items():
        device = layers[0].device
        finite = torch.stack([torch.isfinite(a.sums[-1]).all().to(device) for a in layers]).tolist()
        if not all(finite):
            broken[site] = finite.index(False)
    if broken:
        # NaN and infinity propagate to all later sites: name the first, in the order of computation within a block
        site = min(broken, key=lambda name: (broken[name], ("attn_value", "attn_pre_out", "mlp").index(name)))
        raise FloatingPointError(
            f"activations of site {site!r} in layer {broken[site]} are NaN or infinite. Usual causes: NaN or infinite weights, "
            "or overflow in float16; load the model with dtype='float32' or 'bfloat16'."
        )


def info_of(model: Any, sample: TokenSample, include_bos: bool, rotation: Any = None, only: Any = None) -> dict[str, Any]:
    """What statistics store of their sample, of the rotation, and of whether positions were left out."""
    info = {
        "context": max(map(len, sample.rows)),
        "include_bos": include_bos,
        "model": str(model.cfg.model_name),
        "task": sample.task,
        "split": sample.split,
        "asked": sample.asked,
        "tokens": sample.tokens,
        "rows": len(sample.rows),
        "documents": list(sample.indices),
        "n_documents": sample.n_documents,
        "sample": sample.fingerprint,
    }
    info |= {} if rotation is None else {"rotation": rotation.fingerprint}
    return info | ({} if only is None else {"positions": "correct"})


def right_in(model: Any, sample: TokenSample, batch_size: int, *, quiet: bool = False) -> Bool[Tensor, "row pos"]:
    """Whether the prediction made at every position of a sample is right; see `sepcap.correct_positions`."""
    parts = []
    bar = progress(total=sample.tokens, desc=f"predict {sample.task}", unit="tok", unit_scale=True, quiet=quiet)
    with measuring(model), output_in_place(model), bar:
        for batch in sample.batches(batch_size):
            parts.append(_right(model, batch.to(device_of(model))).cpu())
            bar.update(batch.size)
    # batches are padded to their own longest row
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


def check_positions(right: Bool[Tensor, "row pos"], sample: TokenSample, part: bool = False) -> None:
    """Check that the positions are of this sample, and that there is at least one, unless the sample is a part of one.

    Raises:
        ValueError: they are not, or nothing is predicted right.
    """
    longest = max(map(len, sample.rows))
    if tuple(right.shape) != (len(sample.rows), longest):
        raise ValueError(
            f"positions: {list(right.shape)}, and the tokens of {sample.task!r} are {[len(sample.rows), longest]}; give those that "
            "sepcap.correct_positions found for the same task, tokens, context and seed"
        )
    if not part:
        check_any_right(bool(right.any()), sample.tokens, sample.task)


@torch.inference_mode()
def _right(model: Any, batch: Batch) -> Bool[Tensor, "batch pos"]:
    logits = logits_of(model, batch.inputs, batch.mask)
    answers, asked = (x.to(logits.device) for x in (batch.answers, batch.asked))
    # row by row: a comparison of all logits at once would double the memory. As in evaluation, a tie is not right, and neither is NaN
    targets = logits.gather(2, answers[..., None])
    better = torch.stack([(row >= target).sum(-1) + row.isnan().any(-1) for row, target in zip(logits, targets, strict=True)])
    return asked & (better == 1) & torch.isfinite(targets[..., 0])
