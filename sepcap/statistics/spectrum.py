"""Singular values of a Jacobian: all of them if it fits into memory, otherwise the leading ones, matrix-free (METHODS 13).

Matrix-free: a block of random directions is multiplied by the Jacobian and its transpose repeatedly, every block is kept, and the singular
values are those of the Jacobian restricted to the span of all blocks (a randomised range finder with power iterations that keeps
all iterates). The i-th value found is at most the true i-th value, and has two bounds: on its distance to the nearest
singular value of the matrix, whatever the index of that value (`errors`), and on how much larger the true i-th value can be
(`remainder`).

Source: Halko, Martinsson and Tropp, "Finding structure with randomness" (2011), sections 4.3 to 4.5; Musco and Musco, "Randomized
block Krylov methods" (2015).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK_BYTES = 256 * 2**20
"""Memory for the products that are computed at once."""

PROBES = 10
"""Random directions that probe the matrix outside the basis: the bound on the remainder fails with probability 10^-10."""

BLOCKS = 12
"""Maximum number of blocks of directions; if they do not suffice, the errors show it."""

OVERSAMPLE = 10
"""Directions beyond the requested number ([Halko et al.] recommend 5 to 10)."""

Function = Callable[[Float[Tensor, "pos width"]], Float[Tensor, "pos width"]]
Count = Callable[[int], Any]


def nothing(products: int) -> None:
    """Default for `count`: do nothing."""


@dataclass(frozen=True, eq=False)
class Products:
    """A matrix given only by its products with vectors.

    Attributes:
        rows, columns: its shape.
        times: [columns, k] -> [rows, k].
        transposed: [rows, k] -> [columns, k].
        dtype, device: of the vectors.
    """

    rows: int
    columns: int
    times: Callable[[Float[Tensor, "columns k"]], Float[Tensor, "rows k"]]
    transposed: Callable[[Float[Tensor, "rows k"]], Float[Tensor, "columns k"]]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of_matrix(cls, matrix: Float[Tensor, "rows columns"]) -> "Products":
        """Products with an explicit matrix."""
        rows, columns = matrix.shape
        return cls(rows, columns, matrix.__matmul__, matrix.T.__matmul__, matrix.dtype, matrix.device)


def jacobian_products(function: Function, at: Float[Tensor, "pos width"], chunk: int, count: Count = nothing) -> Products:
    """Products with the Jacobian of a function, forwards (JVP) and backwards (VJP), several at once.

    Args:
        function: a function that torch can differentiate in both directions.
        at: the point at which it is differentiated.
        chunk: number of products computed at once.
        count: called with the number of products after every chunk.
    """
    backward: Callable[[Tensor], tuple[Tensor]] = torch.func.vjp(function, at)[1]

    def forward(tangent: Float[Tensor, "pos width"]) -> Float[Tensor, "pos width"]:
        derivative = torch.func.jvp(function, (at,), (tangent,))[1]
        assert isinstance(derivative, Tensor)
        return derivative

    def many(one: Callable[[Tensor], Tensor], vectors: Float[Tensor, "size k"]) -> Float[Tensor, "other k"]:
        parts = [vectors.new_zeros(0, at.numel())]
        for some in vectors.T.reshape(vectors.shape[1], *at.shape).split(chunk) if vectors.shape[1] else ():
            parts.append(torch.func.vmap(one)(some).flatten(1))
            count(len(some))
        return torch.cat(parts).T

    return Products(
        at.numel(),
        at.numel(),
        lambda vectors: many(forward, vectors),
        lambda vectors: many(lambda cotangent: backward(cotangent)[0], vectors),
        at.dtype,
        at.device,
    )


def jacobian(function: Function, at: Float[Tensor, "pos width"], chunk: int, count: Count = nothing) -> Float[Tensor, "out in"]:
    """The whole Jacobian, ∂output/∂input with both flattened position by position, by one VJP per row."""
    size = at.numel()
    transposed = jacobian_products(function, at, chunk, count).transposed
    return transposed(torch.eye(size, dtype=at.dtype, device=at.device)).T


def jacobian_blocks(function: Function, at: Float[Tensor, "pos width"], chunk: int, count: Count = nothing) -> Float[Tensor, "pos out in"]:
    """Per-position Jacobians of a function that does not mix positions: one VJP gives one row of all of them."""
    positions, width = at.shape
    rows = torch.eye(width, dtype=at.dtype, device=at.device).repeat(1, positions)
    transposed = jacobian_products(function, at, chunk, count).transposed
    return transposed(rows.T).T.reshape(width, positions, width).transpose(0, 1)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values, largest first.

    Attributes:
        values: all of them, or the leading ones.
        errors: for each value, a bound on the distance to the nearest singular value of the matrix, rounding aside; 0 if all are
            computed. The nearest one need not have the same index: of many close values, the basis may contain only some.
        size: total number of singular values.
        remainder: bound on the norm of the matrix outside the basis; 0 if all are computed.
        squares: sum of the squares of all, the squared Frobenius norm; an estimate if only the leading ones are computed.
        squares_error: its standard error.
        products: number of products with the matrix and its transpose.
        basis: all singular values of the matrix on the basis, including `values`; ranks are counted on these.
    """

    values: Float[Tensor, " value"]
    errors: Float[Tensor, " value"]
    size: int
    remainder: float
    squares: float
    squares_error: float
    products: int
    basis: Float[Tensor, " found"]

    @property
    def complete(self) -> bool:
        """Whether these are all singular values."""
        return len(self.values) == self.size

    def rank(self, threshold: float) -> tuple[int, bool]:
        """Number of singular values above a fraction of the largest one, and whether there may be more.

        With values found s and remainder ε, the true ones are between s and √(s² + ε²) (those not found: between 0 and ε).
        """
        cut = threshold * float(self.basis[0]) if len(self.basis) else 0.0
        found = int((self.basis > cut).sum())
        if self.complete:
            return found, False
        possible = int((self.basis.double().square() + self.remainder**2 > cut**2).sum())
        return found, self.remainder > cut or possible > found

    def stable_rank(self) -> float:
        """‖J‖²_F / σ₁²: the number of singular values equal to σ₁ that would have the same sum of squares.

        If only the leading values are known, random directions give an unbiased estimate of the numerator outside the basis.
        """
        return self.squares / float(self.values[0]) ** 2 if float(self.values[0]) > 0 else math.nan

    def stable_rank_error(self) -> float:
        """Standard error of the stable rank from these directions; 0 if all values are computed."""
        return self.squares_error / float(self.values[0]) ** 2 if float(self.values[0]) > 0 else math.nan

    def participation_ratio(self) -> float:
        """(Σσ²)² / Σσ⁴; NaN if only the leading values are known."""
        if not self.complete or not float(self.values[0]) > 0:
            return math.nan
        powers = (self.values / self.values[0]).square()
        return float(powers.sum() ** 2 / powers.square().sum())

    def effective_rank(self) -> float:
        """exp of the entropy of σ/Σσ (Roy and Vetterli 2007); NaN if only the leading values are known."""
        if not self.complete or not float(self.values[0]) > 0:
            return math.nan
        return float(torch.special.entr(self.values / self.values.sum()).sum().exp())


def all_values(matrices: Float[Tensor, "*block out in"], products: int = 0) -> Spectrum:
    """Spectrum of an explicit matrix, or of the block-diagonal matrix of several."""
    values = torch.linalg.svdvals(matrices).flatten().sort(descending=True).values
    squares = float(values.double().square().sum())
    return Spectrum(values, torch.zeros_like(values), len(values), 0.0, squares, 0.0, products, values)


def leading_values(
    matrix: Products, k: int, *, tolerance: float = 1e-3, oversample: int = OVERSAMPLE, blocks: int = BLOCKS, seed: int = 0
) -> Spectrum:
    """Lower bounds on the k largest singular values from products, with two bounds on their errors.

    Args:
        matrix: the products.
        k: number of singular values.
        tolerance: the iteration stops when each of the k values is known to be within this relative distance of some singular value
            of the matrix. That does not bound the error at an index: if more values are close together than the basis contains, the
            values after them have too small an index; the true ones are then up to √(σ² + ε²).
        oversample: random directions beyond k in every block.
        blocks: maximum number of blocks; the iteration stops after the last one, whatever the errors.
        seed: seed of the random directions.

    Returns:
        Spectrum: the i-th value found is at most the true i-th value σ, and, except with probability 10^-10, at least
        √(σ² − ε²) with ε the remainder.

    Raises:
        ValueError: k or blocks is too small, or k is larger than the number of singular values.

    Source: the docstring of this module. Errors: with unit vectors u, v and Jᵀu = σv, some singular value of J is within ‖Jv − σu‖/√2
    of σ. Remainder: 10·√(2/π)·max ‖(1 − QQᵀ)Jω‖ over 10 Gaussian ω [Halko et al., equation 4.3].

    Example:
        >>> leading_values(Products.of_matrix(torch.randn(500, 500)), 20).values  # doctest: +SKIP
    """
    size = min(matrix.rows, matrix.columns)
    if not 1 <= k <= size:
        raise ValueError(f"k={k}: the matrix has {size:,} singular values; give 1 to {size:,}")
    if blocks < 1:
        raise ValueError(f"blocks={blocks}: give at least 1")
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def random_image(columns: int) -> Float[Tensor, "rows k"]:
        draw = torch.randn(matrix.columns, columns, generator=generator, dtype=torch.float64)
        return matrix.times(draw.to(matrix.device, matrix.dtype))

    image, products = random_image(min(size, k + oversample)), min(size, k + oversample)
    scale = float(image.abs().max()) or 1.0  # squares of very large or small numbers leave the range of float32
    image = image / scale
    left, right = image.new_zeros(matrix.rows, 0), image.new_zeros(matrix.columns, 0)
    middle = image.new_zeros(0, 0)  # Jᵀ·left = right·middle
    values, errors = image.new_zeros(0), image.new_zeros(0)
    for _ in range(blocks):
        left_new = _new_directions(image, left, values)
        back = matrix.transposed(left_new) / scale
        right_new = _new_directions(back, right, values)
        left, right = torch.cat([left, left_new], dim=1), torch.cat([right, right_new], dim=1)
        middle = torch.nn.functional.pad(middle, (0, 0, 0, right_new.shape[1]))
        middle = torch.cat([middle, right.T @ back], dim=1)
        values, turned = torch.linalg.svd(middle)[1:]
        image = _without(matrix.times(right_new) / scale, left)
        products += left_new.shape[1] + right_new.shape[1]
        # Jv for v = Jᵀu/σ: only the newest block contributes to its part outside the basis
        newest = turned[: len(values), turned.shape[1] - left_new.shape[1] :].T
        residuals = (image @ (right_new.T @ back) @ newest).norm(dim=0)
        errors = torch.where(values > 0, residuals / values / math.sqrt(2), 0)
        exhausted = not _new_directions(image, left, values).shape[1]
        if exhausted or (len(values) >= k and bool((errors[:k] <= tolerance * values[:k]).all())):
            break
    missed = scale * _without(random_image(PROBES) / scale, left).double().norm(dim=0)
    remainder = 10 * math.sqrt(2 / math.pi) * float(missed.max())
    values, errors = scale * values, scale * errors
    lacking = max(0, k - len(values))  # the matrix has fewer directions than requested
    return Spectrum(
        values=torch.nn.functional.pad(values, (0, lacking))[:k],
        errors=torch.nn.functional.pad(errors, (0, lacking), value=remainder)[:k],
        size=size,
        remainder=remainder,
        squares=float(values.double().square().sum() + missed.square().mean()),
        squares_error=float(missed.square().std() / math.sqrt(PROBES)),
        products=products + PROBES,
        basis=values,
    )


def _without(vectors: Float[Tensor, "size k"], basis: Float[Tensor, "size found"]) -> Float[Tensor, "size k"]:
    """The part of vectors outside an orthonormal basis; projected out twice, because once leaves rounding errors."""
    for _ in range(2):
        vectors = vectors - basis @ (basis.T @ vectors)
    return vectors


def _new_directions(
    vectors: Float[Tensor, "size k"], basis: Float[Tensor, "size found"], values: Float[Tensor, " value"]
) -> Float[Tensor, "size new"]:
    """An orthonormal basis of the part of vectors outside a basis; directions as small as rounding are dropped."""
    if not vectors.shape[1]:
        return vectors
    directions, lengths, _ = torch.linalg.svd(_without(vectors, basis), full_matrices=False)
    scale = float(values[0]) if len(values) else float(lengths[0])
    room = vectors.shape[0] - basis.shape[1]
    directions = directions[:, lengths > 10 * torch.finfo(vectors.dtype).eps * scale][:, :room]
    # normalising a direction that was nearly inside the basis magnifies its part inside
    return torch.linalg.qr(_without(directions, basis))[0]
