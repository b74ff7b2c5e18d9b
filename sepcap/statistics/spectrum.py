"""Singular values of a Jacobian: all of them where it fits into memory, the leading ones by products where it does not (METHODS 13).

Matrix-free: a block of random directions is sent through the Jacobian and back again and again, every block is kept, and the singular
values are those of the Jacobian restricted to what all blocks span (a randomised range finder with power iterations whose iterates are
not thrown away). The value found at every place is then at most the true one there, and comes with two bounds: how far the nearest singular
value of the matrix is from it (`errors`), which does not say which number that one has, and how much larger the true value at its
place can be (`remainder`).

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
"""Random directions that test what the basis misses: the bound on the remainder fails with probability 10^-10."""

BLOCKS = 12
"""Blocks of directions at most: where they do not suffice, the errors say so."""

OVERSAMPLE = 10
"""Directions beyond those asked for ([Halko et al.] recommend 5 to 10)."""

Function = Callable[[Float[Tensor, "pos width"]], Float[Tensor, "pos width"]]
Count = Callable[[int], Any]


def nothing(products: int) -> None:
    """Where nobody counts products."""


@dataclass(frozen=True, eq=False)
class Products:
    """A matrix that is known by its products with vectors only.

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
        """A matrix that is at hand."""
        rows, columns = matrix.shape
        return cls(rows, columns, matrix.__matmul__, matrix.T.__matmul__, matrix.dtype, matrix.device)


def jacobian_products(function: Function, at: Float[Tensor, "pos width"], chunk: int, count: Count = nothing) -> Products:
    """Products with the Jacobian of a function, forwards (JVP) and backwards (VJP), several at once.

    Args:
        function: a function that torch can differentiate in both directions.
        at: where.
        chunk: products at once.
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
    """The Jacobians of single positions of a function that does not mix them: one VJP gives a row of all of them at once."""
    positions, width = at.shape
    rows = torch.eye(width, dtype=at.dtype, device=at.device).repeat(1, positions)
    transposed = jacobian_products(function, at, chunk, count).transposed
    return transposed(rows.T).T.reshape(width, positions, width).transpose(0, 1)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values, largest first.

    Attributes:
        values: all of them, or the leading ones.
        errors: for each, a distance within which some singular value of the matrix lies, rounding aside; 0 where all are computed. It
            need not be the one with the same number: of many that lie close together, the basis may hold only some.
        size: how many there are in all.
        remainder: bound on the norm of what the basis misses; 0 where all are computed.
        squares: sum of the squares of all, the squared Frobenius norm; an estimate where only the leading ones are computed.
        squares_error: its standard error.
        products: products with the matrix and its transpose that were made.
        basis: all singular values of the matrix on the basis, `values` among them; what ranks are counted on.
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
        """How many singular values are above a share of the largest one, and whether there may be more.

        With s the found values and ε the remainder, the true ones lie between s and √(s² + ε²) (those not found: 0 and ε).
        """
        cut = threshold * float(self.basis[0]) if len(self.basis) else 0.0
        found = int((self.basis > cut).sum())
        if self.complete:
            return found, False
        possible = int((self.basis.double().square() + self.remainder**2 > cut**2).sum())
        return found, self.remainder > cut or possible > found

    def stable_rank(self) -> float:
        """‖J‖²_F / σ₁²: how many directions as strong as the strongest have the same sum of squares.

        Where only the leading values are known, what the basis misses of the numerator is estimated without bias by random directions.
        """
        return self.squares / float(self.values[0]) ** 2 if float(self.values[0]) > 0 else math.nan

    def stable_rank_error(self) -> float:
        """Standard error of the stable rank from these directions; 0 where all values are computed."""
        return self.squares_error / float(self.values[0]) ** 2 if float(self.values[0]) > 0 else math.nan

    def participation_ratio(self) -> float:
        """(Σσ²)² / Σσ⁴; NaN where only the leading values are known."""
        if not self.complete or not float(self.values[0]) > 0:
            return math.nan
        powers = (self.values / self.values[0]).square()
        return float(powers.sum() ** 2 / powers.square().sum())

    def effective_rank(self) -> float:
        """exp of the entropy of σ/Σσ (Roy and Vetterli 2007); NaN where only the leading values are known."""
        if not self.complete or not float(self.values[0]) > 0:
            return math.nan
        return float(torch.special.entr(self.values / self.values.sum()).sum().exp())


def all_values(matrices: Float[Tensor, "*block out in"], products: int = 0) -> Spectrum:
    """The spectrum of a matrix at hand, or of the block-diagonal matrix of several."""
    values = torch.linalg.svdvals(matrices).flatten().sort(descending=True).values
    squares = float(values.double().square().sum())
    return Spectrum(values, torch.zeros_like(values), len(values), 0.0, squares, 0.0, products, values)


def leading_values(
    matrix: Products, k: int, *, tolerance: float = 1e-3, oversample: int = OVERSAMPLE, blocks: int = BLOCKS, seed: int = 0
) -> Spectrum:
    """The k largest singular values by products: lower bounds of them, with two bounds on what they miss.

    Args:
        matrix: the products.
        k: how many.
        tolerance: it is done when some singular value of the matrix is known to lie within this share of every one of the k. That
            does not bound the error at a place: where more values than the basis holds lie close together, those after them count up
            too early; the true ones are then up to √(σ² + ε²).
        oversample: random directions beyond k in every block.
        blocks: blocks at most; with the last one it ends, with whatever errors there are by then.
        seed: of the random directions.

    Returns:
        Spectrum: the value found at every place is at most the true one there, and, but for a probability of 10^-10, at least
        √(σ² − ε²) with ε the remainder.

    Raises:
        ValueError: k or blocks that are too small, or a k larger than the matrix.

    Source: the header of this module. Errors: with unit vectors u, v and Jᵀu = σv, some singular value of J lies within ‖Jv − σu‖/√2
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
        # Jv for v = Jᵀu/σ: what of it lies outside the basis comes from the newest block alone
        newest = turned[: len(values), turned.shape[1] - left_new.shape[1] :].T
        residuals = (image @ (right_new.T @ back) @ newest).norm(dim=0)
        errors = torch.where(values > 0, residuals / values / math.sqrt(2), 0)
        exhausted = not _new_directions(image, left, values).shape[1]
        if exhausted or (len(values) >= k and bool((errors[:k] <= tolerance * values[:k]).all())):
            break
    missed = scale * _without(random_image(PROBES) / scale, left).double().norm(dim=0)
    remainder = 10 * math.sqrt(2 / math.pi) * float(missed.max())
    values, errors = scale * values, scale * errors
    lacking = max(0, k - len(values))  # the matrix has fewer directions than were asked for
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
    """Their part outside an orthonormal basis; taken away twice, because once leaves rounding errors in it."""
    for _ in range(2):
        vectors = vectors - basis @ (basis.T @ vectors)
    return vectors


def _new_directions(
    vectors: Float[Tensor, "size k"], basis: Float[Tensor, "size found"], values: Float[Tensor, " value"]
) -> Float[Tensor, "size new"]:
    """An orthonormal basis of what vectors add to a basis; what is small enough to be rounding adds nothing."""
    if not vectors.shape[1]:
        return vectors
    directions, lengths, _ = torch.linalg.svd(_without(vectors, basis), full_matrices=False)
    scale = float(values[0]) if len(values) else float(lengths[0])
    room = vectors.shape[0] - basis.shape[1]
    directions = directions[:, lengths > 10 * torch.finfo(vectors.dtype).eps * scale][:, :room]
    # a direction that was nearly inside is so again after it was made longer
    return torch.linalg.qr(_without(directions, basis))[0]
