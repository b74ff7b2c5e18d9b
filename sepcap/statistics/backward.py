"""Backward passes that are reduced, batch by batch, to sums of gradients by the neurons of the requested sites (METHODS 18)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from sepcap.errors import warn
from sepcap.models.forward import Hook, call, with_hooks
from sepcap.models.kinds import architecture_of
from sepcap.models.linearised import Linearised, checked_rules, linearised, under
from sepcap.models.sites import Population, get_site, n_layers
from sepcap.statistics.gradients import SHARED, GradientSums
from sepcap.statistics.replicates import ReplicateSums
from sepcap.statistics.weight_gradients import WeightGradients, sums_device
from sepcap.tasks.batches import Batch

CHUNK = 256
"""Positions reduced at once on a CPU."""

GRADED_FROM = 1e-4
"""c: factor on the activations above which the points of integrated gradients are spaced geometrically."""

INCOMPLETE = 0.05
"""Share of the change of the loss above which the error of its integral causes a warning."""

Sums = dict[str, list[Tensor]]
"""Name of a sum -> its values in every layer, float64 [neuron]."""

Take = Callable[[Tensor, Tensor], None]
"""Function that receives activations and their gradients, [batch, pos, *neuron] each."""


class _Tap(torch.autograd.Function):
    """Returns `scale` times an activation, and calls `take` with the activation and its gradient in the backward pass.

    `anchor` requires a gradient, so that the backward pass is computed here even if nothing earlier requires one. Its own gradient is None.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, anchor: Tensor, scale: float, take: Take) -> Tensor:
        ctx.save_for_backward(z)
        ctx.scale, ctx.take = scale, take
        return z.clone() if scale == 1 else z * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (z,) = ctx.saved_tensors
        ctx.take(z, grads[0])
        return grads[0] * ctx.scale if ctx.needs_input_grad[0] else None, None, None, None


class GradientCollector:
    """Sums of gradients over the batches of a dataset.

    Args:
        model: a hooked model, in evaluation mode, inside `prepared()`.
        sites: the sites, by name.
        names: what to collect, from `resolve_gradients`.
        k: number of points of integrated gradients.
        recompute: keep only the inputs of the blocks, and compute each block again in the backward pass.
        drawn: sums of bootstrap replicates, by site, to which the sums of every row are added.
    """

    def __init__(
        self,
        model: Any,
        sites: Mapping[str, Population],
        names: tuple[str, ...],
        k: int,
        recompute: bool,
        drawn: Mapping[str, ReplicateSums] | None = None,
    ) -> None:
        if k < 1:
            raise ValueError(f"k={k}: give at least 1 point of integration")
        check_differentiable(model)
        self.model, self.sites, self.names, self.recompute, self.drawn = model, sites, names, recompute, drawn or {}
        self.layers = range(n_layers(model))
        self.rows = self.predictions = 0
        self.loss, self.without = 0.0, dict.fromkeys(sites, 0.0)
        self.points = graded_points(k)
        wanted = {part for part, asked in (("g", {*SHARED}), ("relp_g", {"relp"}), ("ig", {"ig"})) if asked & {*names}}
        beside = {"g": ("zg", "zg_abs", "row_squares"), "relp_g": ("relp_zg",), "ig": ()}
        kept = [name for part in wanted for name in (part, *beside[part])]
        self.sums: dict[str, Sums] = {site: {name: self._zeros(site) for name in kept} for site in sites}
        self.weights = WeightGradients(model, tuple(sites)) if "snip" in names else None

    def _zeros(self, site: str) -> list[Tensor]:
        n = math.prod(self.sites[site].shape[1:])
        return [torch.zeros(n, dtype=torch.float64, device=sums_device(self.model, layer)) for layer in self.layers]

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Gradients enabled, except for weights whose own gradient is not needed; the model is restored afterwards."""
        with weights_frozen(self.model), linearised(self.model) if "relp" in self.names else nullcontext() as rules:
            self.rules = rules
            yield

    def add(self, batch: Batch, hooks: Sequence[Hook] = ()) -> None:
        """All passes over one batch; `hooks` are called in the first pass."""
        plain = bool({*SHARED, "snip"} & {*self.names})
        relp = "relp" in self.names
        loss = None
        if plain:
            with nullcontext() if self.weights is None else self.weights.added():
                loss = self._pass(batch, {site: partial(self._take, site) for site in self.sites}, hooks)
        if relp:
            take = {site: partial(self._take, site, prefix="relp_") for site in self.sites}
            loss = self._pass(batch, take, () if plain else hooks, rules=self.rules)
        if loss is None:
            loss = self._loss_alone(batch, hooks)
        if "ig" in self.names:
            for site in self.sites:
                for m, weight in self.points:
                    self._pass(batch, {site: partial(self._integrate, site, -weight)}, scale=m)
                self.without[site] += self._loss_alone(batch, [(name, _zero) for name in self._hook_names(site)])
        self.rows += len(batch.inputs)
        self.predictions += int(batch.asked.sum())
        self.loss += loss

    def _hook_names(self, site: str) -> list[str]:
        return [get_site(site).hook_name(layer) for layer in self.layers]

    def _pass(
        self,
        batch: Batch,
        takes: Mapping[str, Callable[..., None]],
        hooks: Sequence[Hook] = (),
        *,
        scale: float = 1.0,
        rules: Linearised | None = None,
    ) -> float:
        """One forward and one backward pass; the summed loss."""
        missing: dict[str, None] = {name: None for site in takes for name in self._hook_names(site)}
        forward = True

        def first(function: Callable[..., Any]) -> Callable[..., Any]:
            # blocks that are computed again must not be counted again
            return lambda z, hook: function(z.detach(), hook=hook) if forward else None

        taps = [(name, self._tap(name, layer, take, batch, scale, missing)) for name, layer, take in self._places(takes)]
        found = None if rules is None else (rules.activations, rules.patterns)
        with ExitStack() as stack:
            if self.recompute:
                stack.enter_context(_recomputing(self.model, rules))
            stack.enter_context(with_hooks(self.model, [*((name, first(function)) for name, function in hooks), *taps]))
            with under(rules):
                logits = call(self.model, batch.inputs, batch.mask)
            if rules is not None and found == (0, 0):
                checked_rules(self.model, rules)
            loss = summed_loss(logits, batch)
            forward = False
            loss.backward()
        if missing:
            raise NotImplementedError(
                f"gradients at {next(iter(missing))}: no gradient of the loss reaches it in {architecture_of(self.model)}: the loss "
                "does not depend on it by a differentiable path"
            )
        return float(loss.detach())

    def _places(self, takes: Mapping[str, Callable[..., None]]) -> Iterator[tuple[str, int, Callable[..., None]]]:
        for site, take in takes.items():
            for layer, name in zip(self.layers, self._hook_names(site), strict=True):
                yield name, layer, take

    def _tap(
        self, name: str, layer: int, take: Callable[..., None], batch: Batch, scale: float, missing: dict[str, None]
    ) -> Callable[..., Tensor]:
        def taken(z: Tensor, g: Tensor) -> None:
            missing.pop(name, None)
            take(layer, z.flatten(2), g.flatten(2), batch.real)

        def hook(z: Tensor, hook: Any) -> Tensor:
            return _Tap.apply(z, torch.zeros((), device=z.device, requires_grad=True), scale, taken)

        return hook

    def _take(self, site: str, layer: int, z: Tensor, g: Tensor, real: Tensor, prefix: str = "") -> None:
        sums = {name: of_layer[layer] for name, of_layer in self.sums[site].items()}
        if f"{prefix}g" not in sums:  # only snip was asked for
            return
        found = _rows(z, g, real, sums[f"{prefix}g"].device, ("g", "zg") if prefix else ("g", "zg", "zg_abs"))
        if not prefix:
            found["row_squares"] = found["zg"].square()
        for name, of_rows in found.items():
            self._add(site, layer, prefix + name, of_rows)

    def _integrate(self, site: str, weight: float, layer: int, z: Tensor, g: Tensor, real: Tensor) -> None:
        self._add(site, layer, "ig", weight * _rows(z, g, real, self.sums[site]["ig"][layer].device, ("zg",))["zg"])

    def _add(self, site: str, layer: int, name: str, of_rows: Float[Tensor, "row neuron"]) -> None:
        self.sums[site][name][layer] += of_rows.sum(0)
        if site in self.drawn:
            self.drawn[site].add(name, layer, of_rows)

    @torch.no_grad()
    def _loss_alone(self, batch: Batch, hooks: Sequence[Hook]) -> float:
        with with_hooks(self.model, hooks):
            return float(summed_loss(call(self.model, batch.inputs, batch.mask), batch))

    def check_finite(self) -> None:
        """Raise if a gradient was NaN or infinite.

        Raises:
            FloatingPointError: it names the site and the layer.
        """
        for site, sums in self.sums.items():
            for name, of_layer in sums.items():
                finite = torch.stack([torch.isfinite(value).all().to(of_layer[0].device) for value in of_layer]).tolist()
                if not all(finite):
                    raise FloatingPointError(
                        f"gradients ({name}) at site {site!r} in layer {finite.index(False)} are NaN or infinite. Usual cause: overflow in "
                        "float16; load the model with dtype='float32' or 'bfloat16'."
                    )

    def gathered(self) -> dict[str, GradientSums]:
        """The sums of every site."""
        found = {}
        for site in self.sites:
            shape, device = self.sites[site].shape[1:], self._zeros(site)[0].device
            sums = {name: torch.stack([v.to(device).view(shape) for v in values]) for name, values in self.sums[site].items()}
            if self.weights is not None:
                sums["snip"] = self.weights.gathered(site, device)
            ig = "ig" in self.names
            points, without = (len(self.points), self.without[site]) if ig else (None, None)
            found[site] = GradientSums(self.predictions, self.rows, self.loss, sums, points, without)
        return found


def check_gradients(found: Mapping[str, GradientSums]) -> None:
    """Check the sums of whole passes, by site; those of a shard may be of no prediction. An inaccurate integral is a warning.

    Raises:
        ValueError: there is no prediction.
    """
    for site, sums in found.items():
        if not sums.predictions:
            raise ValueError("gradients: the sample has no predictions, so that there is no loss: no row has two tokens that count")
        if sums.loss_without is not None:
            _warn_if_incomplete(site, sums)


def _warn_if_incomplete(site: str, found: GradientSums) -> None:
    assert found.loss_without is not None
    change, error = (found.loss_without - found.loss) / found.predictions, found.completeness_error
    if error > INCOMPLETE * abs(change):
        warn(
            f"integrated gradients of {site!r} add up to the change of the loss without the site, {change:.4g} nats, only to within "
            f"{error:.2g}: give more than k={found.points} points"
        )


def graded_points(k: int) -> list[tuple[float, float]]:
    """Points and weights of a rule for ∫₀¹ f(m) dm: Gauss–Legendre in u, with m = c·((1 + 1/c)^u − 1): even below c, geometric above.

    A norm after a site cancels any factor except 0, so that the loss changes only for m up to about √ε over the root mean square of the
    input of the norm. Equally spaced points miss this range.
    """
    points, weights = np.polynomial.legendre.leggauss(k)
    rate, u = math.log1p(1 / GRADED_FROM), (points + 1) / 2
    m, slope = GRADED_FROM * np.expm1(rate * u), GRADED_FROM * rate * np.exp(rate * u)
    return list(zip(m.tolist(), (weights / 2 * slope).tolist(), strict=True))


def summed_loss(logits: Float[Tensor, "batch ... out"], batch: Batch) -> Float[Tensor, ""]:
    """Cross-entropy in nats, summed over the predictions of a batch, in float32 or wider."""
    logits = logits if logits.dim() == 3 else logits[:, None]
    answers = batch.answers.masked_fill(~batch.asked, -100).flatten().to(logits.device)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return cross_entropy(wide.flatten(0, 1), answers, reduction="sum", ignore_index=-100)


def _zero(z: Tensor, hook: Any) -> Tensor:
    return torch.zeros_like(z)


def _rows(z: Tensor, g: Tensor, real: Tensor, at: torch.device, names: Sequence[str]) -> dict[str, Float[Tensor, "row neuron"]]:
    """Sums of every row over the positions that are not padding, in float64: "g" Σ g, "zg" Σ z·g, "zg_abs" Σ |z·g|.

    On a CPU, rows are reduced one at a time, on a GPU all at once. `at` is the device of the sums.
    """
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    if z.device.type != "cpu":
        z, g = (x.to(at, wide).masked_fill(~real.to(at).expand(x.shape[:2])[..., None], 0) for x in (z, g))
        products = z * g
        # one at a time: a buffer of absolute values is as large as the activations
        return {name: (g if name == "g" else products if name == "zg" else products.abs()).sum(1, dtype=torch.float64) for name in names}
    summed = torch.float64 if z.dtype.itemsize == 2 else wide
    found = {name: torch.zeros(len(z), z.shape[2], dtype=torch.float64) for name in names}
    for i, (one, slope, kept) in enumerate(zip(z, g, real.expand(z.shape[:2]), strict=True)):
        if not bool(kept.all()):
            one, slope = one[kept], slope[kept]
        for a, b in zip(one.split(CHUNK), slope.split(CHUNK), strict=True):
            b = b.to(wide)
            products = a.to(wide) * b
            found["zg"][i] += products.sum(0, dtype=summed)
            if "g" in names:
                found["g"][i] += b.sum(0, dtype=summed)
            if "zg_abs" in names:
                found["zg_abs"][i] += products.abs_().sum(0, dtype=summed)
    return found


def check_differentiable(model: Any) -> None:
    """Raise if no gradient can flow through the model.

    Raises:
        ValueError: inference tensors, or quantised weights; it names the first.
    """
    for name, weight in model.named_parameters():
        name = name.replace("._original_component", "")
        if weight.is_inference():
            raise ValueError(
                f"gradients: {name} is an inference tensor, which has no gradient; load the model outside of torch.inference_mode()"
            )
        if not weight.is_floating_point():
            raise ValueError(
                f"gradients: {name} is of {str(weight.dtype).removeprefix('torch.')}, as in a quantised model, which has no gradients; "
                "load the model before quantisation, in half precision if memory is short: load_model(..., dtype='bfloat16')"
            )


@contextmanager
def weights_frozen(model: Any) -> Iterator[None]:
    """Gradients enabled, except for the weights; what they required, and their gradients, are restored."""
    before = [(weight, weight.requires_grad, weight.grad) for weight in dict.fromkeys(model.parameters())]
    try:
        for weight, _, _ in before:
            weight.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for weight, wanted, gradient in before:
            weight.requires_grad_(wanted)
            weight.grad = gradient


@contextmanager
def _recomputing(model: Any, rules: Linearised | None) -> Iterator[None]:
    """Blocks keep only their inputs for the backward pass, in which they are computed again."""
    how = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), under(rules))}
    before = [block.__dict__.get("forward") for block in model.blocks]
    try:
        for block in model.blocks:
            block.__dict__["forward"] = partial(checkpoint, block.forward, **how)
        yield
    finally:
        for block, forward in zip(model.blocks, before, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = forward
