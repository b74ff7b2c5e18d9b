"""Sums of gradients of the loss by every neuron of a site, and the importances computed from them (METHODS 18)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sepcap.checks import checked
from sepcap.errors import unknown

MEASURED: dict[str, tuple[str, ...]] = {
    "atp": ("g", "zg", "zg_abs", "row_squares"),
    "taylor": ("g", "zg", "zg_abs", "row_squares"),
    "fisher": ("g", "zg", "zg_abs", "row_squares"),
    "ig": ("ig",),
    "relp": ("relp_g", "relp_zg"),
    "snip": ("snip",),
}
"""What can be collected -> its sums. The first three share one backward pass and the same sums."""

SHARED = ("atp", "taylor", "fisher")
"""What `gradients=True` collects."""

IG_POINTS = 16
"""Points of integrated gradients."""

PASSES = {"atp": 2, "taylor": 2, "fisher": 2, "relp": 2, "snip": 3, "ig": 2 * IG_POINTS + 2}
"""What is collected -> cost in forward passes over the texts. A backward pass to the activations costs as much as a forward pass, one to
the weights twice that. `ig` runs both for each of its points, and the losses of the whole model and of the one without the site."""


def resolve_gradients(gradients: Any) -> tuple[str, ...]:
    """Names of the gradient measurements asked for, checked, in the order of the table.

    Args:
        gradients: True (atp, taylor and fisher), False or None, a name, or several.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a flag nor names.
    """
    if gradients is None or isinstance(gradients, bool):
        return SHARED if gradients else ()
    names = (gradients,) if isinstance(gradients, str) else gradients
    if not isinstance(names, Iterable) or isinstance(names, Mapping):
        raise TypeError(f"gradients={gradients!r}: give True, False, or names such as ('atp', 'relp')")
    asked = list(names)
    for name in asked:
        if name not in MEASURED:
            raise unknown("gradients", str(name), MEASURED, "wanda and the statistics of activations need none.")
    return tuple(name for name in MEASURED if name in asked)


@dataclass(frozen=True, eq=False)
class GradientSums:
    """Sums over a dataset of the derivatives of its loss by the activations of one site.

    ℓ is the loss summed over all predictions, z an activation, g = ∂ℓ/∂z through everything that is computed from z, at every position
    that is not padding (BOS and positions without a prediction included). Products are formed in float32, or in float64 in a model of
    that precision. Within a block of at most 256 positions of one row, products of float32 are added in float32 (relative to Σ|z·g|, an
    error of at most 1.5e-5 and near 1e-7 in practice); blocks are added in float64. On a GPU, and in other precisions, all are added in
    float64. Blocks never span two rows.

    Attributes:
        predictions: number of predictions N.
        rows: number of rows R.
        loss: ℓ in nats, of the model itself.
        sums: float64 sums by name, each [layer, *neuron]: `g` Σg, `zg` Σz·g, `zg_abs` Σ|z·g|, `row_squares` Σ_rows (Σ z·g)², `relp_g` and
            `relp_zg` the first two from the linearised backward pass, `ig` −∫₀¹ ∂ℓ/∂m dm, and `snip` [layer, *neuron, weight], w·∂ℓ/∂w of
            every weight of the neuron.
        points: number of points of `ig`.
        loss_without: ℓ with all neurons of the site at 0, if `ig` was collected.
    """

    predictions: int
    rows: int
    loss: float
    sums: Mapping[str, Float[Tensor, "..."]]
    points: int | None = None
    loss_without: float | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What was collected, such as ("atp", "taylor", "fisher")."""
        return tuple(name for name, needed in MEASURED.items() if all(part in self.sums for part in needed))

    @property
    def completeness_error(self) -> float:
        """|Σ_n ig(n) − (L without the site − L)| in nats per prediction: the error of the quadrature."""
        if self.loss_without is None:
            raise ValueError("no integrated gradients were collected; collect them with collect(..., gradients=('ig',))")
        return abs(float(self.sums["ig"].sum()) - (self.loss_without - self.loss)) / self.predictions

    def merge(self, other: "GradientSums") -> "GradientSums":
        """Sums of both datasets together, in any order."""
        if self.names != other.names or self.points != other.points:
            mine, theirs = (f"gradients {', '.join(s.names)}{f' with k={s.points}' if s.points else ''}" for s in (self, other))
            raise ValueError(f"cannot merge statistics with {theirs} into those with {mine}: collect both with the same gradients=")
        sums = {name: value + other.sums[name].to(value.device) for name, value in self.sums.items()}
        without = None if self.loss_without is None or other.loss_without is None else self.loss_without + other.loss_without
        counts = self.predictions + other.predictions, self.rows + other.rows, self.loss + other.loss
        return GradientSums(*counts, sums, self.points, without)

    def to(self, device: str | torch.device) -> "GradientSums":
        """The same sums on another device."""
        return replace(self, sums={name: value.to(device) for name, value in self.sums.items()})

    def as_json(self) -> dict[str, Any]:
        """Everything but the tensors, for the header of a file."""
        return {name: getattr(self, name) for name in ("predictions", "rows", "loss", "points", "loss_without")} | {"sums": list(self.sums)}

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor], site: str, header: Mapping[str, Any] | None) -> "GradientSums | None":
        """What was stored for a site, or None."""
        if header is None:
            return None
        own = dict(header)
        return cls(sums={name: tensors[f"{site}.gradients.{name}"] for name in own.pop("sums")}, **own)


class GradientImportances:
    """The importances of one site that are computed from gradients (METHODS 18); part of `NeuronStatistics`."""

    site: str
    gradients: GradientSums | None

    @checked()
    def require_gradients(self, name: str) -> GradientSums:
        """The sums that an importance needs; if they were not collected, an error that states how to collect them."""
        found = self.gradients
        if found is None or name not in found.names:
            raise ValueError(f"statistics of {self.site!r} hold no {name!r}; collect it with collect(..., gradients=({name!r},))")
        return found

    def _change(self, name: str, prefix: str, a: Any) -> Float[Tensor, "layer *neuron"]:
        found = self.require_gradients(name)
        total = found.sums[f"{prefix}g"]
        constant = torch.as_tensor(a, dtype=torch.float64, device=total.device)
        if constant.dim() and constant.shape != total.shape:
            raise ValueError(f"a has shape {list(constant.shape)}: give a number, or a constant per neuron {list(total.shape)}")
        return (constant * total - found.sums[f"{prefix}zg"]) / found.predictions

    @checked()
    def atp_at(self, a: Any = 0.0) -> Float[Tensor, "layer *neuron"]:
        """(1/N) Σ (a − z)·g: first-order change of the mean loss, in nats, if this neuron alone is set to a.

        Args:
            a: a number, or constants [layer, *neuron] such as `.mean` or `.peak`.

        Source: attribution patching; AtP* (arXiv 2403.00745).
        """
        return self._change("atp", "", a)

    @property
    def atp(self) -> Float[Tensor, "layer *neuron"]:
        """`atp_at(0)`, signed: positive if the loss rises without the neuron."""
        return self.atp_at()

    @checked()
    def relp_at(self, a: Any = 0.0) -> Float[Tensor, "layer *neuron"]:
        """As `atp_at`, with the linearised backward pass of `sepcap.models.linearised`.

        Source: RelP (arXiv 2508.21258).
        """
        return self._change("relp", "relp_", a)

    @property
    def relp(self) -> Float[Tensor, "layer *neuron"]:
        """`relp_at(0)`, signed."""
        return self.relp_at()

    @property
    def taylor(self) -> Float[Tensor, "layer *neuron"]:
        """(1/N) Σ |z·g|.

        Source: Molchanov et al. 2017 (arXiv 1611.06440); Michel et al. 2019 (arXiv 1905.10650).
        """
        found = self.require_gradients("taylor")
        return found.sums["zg_abs"] / found.predictions

    @property
    def fisher(self) -> Float[Tensor, "layer *neuron"]:
        """(1/R) Σ_rows (Σ z·g)²: mean squared derivative of a row's loss by a mask on the neuron.

        Source: Theis et al. 2018 (arXiv 1801.05787); SSD (arXiv 2308.07707).
        """
        found = self.require_gradients("fisher")
        return found.sums["row_squares"] / found.rows

    @property
    def ig(self) -> Float[Tensor, "layer *neuron"]:
        """−∫₀¹ ∂L/∂m dm, with one mask m on all neurons of the site in all layers, signed; they add up to L(without the site) − L.

        Source: Sundararajan et al. 2017 (arXiv 1703.01365).
        """
        found = self.require_gradients("ig")
        return found.sums["ig"] / found.predictions

    @property
    def snip(self) -> Float[Tensor, "layer *neuron"]:
        """Σ_w |w·∂ℓ/∂w| over the weights that the neuron reads and writes with; ℓ is a sum, so that it grows with the dataset.

        Source: SNIP (arXiv 1810.02340); per neuron arXiv 2604.09544.
        """
        return self.require_gradients("snip").sums["snip"].abs().sum(-1)
