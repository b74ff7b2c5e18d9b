"""Spectra: against matrices whose singular values are chosen, and functions whose Jacobian is written down."""

import math

import numpy as np
import pytest
import torch

from sepcap.statistics.spectrum import (
    Products,
    all_values,
    jacobian,
    jacobian_blocks,
    jacobian_products,
    leading_values,
)


def matrix_with(values, rows=200, columns=None, dtype=torch.float64, seed=0):
    """A matrix with exactly these singular values, the others 0."""
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(n, len(values), generator=generator, dtype=torch.float64) for n in (rows, columns or rows)]
    left, right = (torch.linalg.qr(side)[0] for side in sides)
    return ((left * torch.as_tensor(values, dtype=torch.float64)) @ right.T).to(dtype)


SPECTRA = {
    "geometric": np.geomspace(1, 1e-6, 200),
    "harmonic": 1 / np.arange(1, 201),
    "flat": np.linspace(1, 0.5, 200),
    "equal": np.ones(200),
    "low rank": np.linspace(3, 1, 12),
    "one": np.array([2.0]),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_leading_values_are_those_that_were_put_in_within_the_stated_errors(name, dtype, rounding):
    true = np.zeros(200)
    true[: len(SPECTRA[name])] = SPECTRA[name]
    found = leading_values(Products.of_matrix(matrix_with(SPECTRA[name], dtype=dtype)), 20)
    values, errors = (t.double().numpy() for t in (found.values, found.errors))
    np.testing.assert_allclose(values, true[:20], rtol=1e-3, atol=10 * rounding)
    assert (values <= true[:20] + rounding).all()
    nearest = np.abs(values[:, None] - true).min(axis=1)
    assert (nearest <= errors + rounding).all()
    assert (true[:20] <= np.sqrt(values**2 + found.remainder**2) + rounding).all()


def test_the_remainder_bounds_what_the_basis_misses_and_the_squares_are_estimated_with_their_error():
    for seed in range(5):
        true = 1 / np.arange(1, 201)
        found = leading_values(Products.of_matrix(matrix_with(true, seed=seed)), 10, blocks=1, seed=seed)
        assert len(found.basis) == 20
        assert true[20] <= found.remainder
        assert abs(found.squares - (true**2).sum()) < 6 * found.squares_error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [1, 7, 30])
def test_a_known_rank_is_found_exactly_and_known_to_be_all(rank, dtype):
    matrix = matrix_with(np.linspace(1, 0.1, rank), rows=120, dtype=dtype)
    assert all_values(matrix).rank(1e-3) == (rank, False)
    assert leading_values(Products.of_matrix(matrix), 40).rank(1e-3) == (rank, False)


def test_a_rank_beyond_the_basis_is_said_to_be_a_lower_bound():
    found = leading_values(Products.of_matrix(matrix_with(np.ones(150))), 5, blocks=1)
    rank, at_least = found.rank(1e-3)
    assert at_least
    assert rank <= 150
    # and one that stands out of what was missed by far is known
    steep = np.concatenate([np.ones(4), np.full(196, 1e-7)])
    assert leading_values(Products.of_matrix(matrix_with(steep)), 5, blocks=1).rank(1e-2) == (4, False)


def test_matrices_need_not_be_square():
    true = np.geomspace(1, 0.01, 40)
    for shape in ((60, 200), (200, 60)):
        found = leading_values(Products.of_matrix(matrix_with(true, *shape)), 10)
        assert found.size == 60
        np.testing.assert_allclose(found.values.numpy(), true[:10], rtol=1e-3)


def test_nothing_passes_a_matrix_of_zeros():
    for found in (all_values(torch.zeros(8, 8)), leading_values(Products.of_matrix(torch.zeros(8, 8)), 3)):
        assert not found.values.any()
        assert found.rank(1e-3) == (0, False)
        assert math.isnan(found.stable_rank())
    assert math.isnan(all_values(torch.zeros(8, 8)).effective_rank())


CLUSTERED = {
    "a plateau below five": (np.concatenate([np.ones(5), np.full(595, 0.997)]), 10),
    "a slow slope": (np.linspace(1, 0.999, 1000), 64),
}


@pytest.mark.parametrize("name", CLUSTERED)
def test_of_values_close_together_the_stated_bounds_hold_although_the_number_of_a_value_is_not_known(name):
    true, k = CLUSTERED[name]
    found = leading_values(Products.of_matrix(torch.diag(torch.tensor(true))), k, blocks=1)
    values, errors = found.values.numpy(), found.errors.numpy()
    assert (values <= true[:k] + 1e-12).all()
    assert (np.abs(values[:, None] - true).min(axis=1) <= errors + 1e-12).all()
    assert (true[:k] <= np.sqrt(values**2 + found.remainder**2)).all()
    # the error bounds the distance to some value: that to the one with the same number is larger
    assert (true[:k] - values > errors).any()


@pytest.mark.parametrize("scale", [1e-22, 1e-30, 1e19, 1e30])
def test_very_large_and_small_matrices_have_the_same_spectrum_in_float32(scale):
    matrix = matrix_with(1 / np.arange(1, 201), dtype=torch.float32)
    one, other = (leading_values(Products.of_matrix(m), 10, blocks=3) for m in (matrix, matrix * scale))
    np.testing.assert_allclose(other.values.double() / scale, one.values, rtol=1e-5)
    np.testing.assert_allclose(other.errors.double() / scale, one.errors, rtol=1e-2, atol=1e-6)
    assert other.remainder / scale == pytest.approx(one.remainder, rel=1e-4)
    assert other.stable_rank() == pytest.approx(one.stable_rank(), rel=1e-5)
    assert other.stable_rank_error() == pytest.approx(one.stable_rank_error(), rel=1e-3)
    for threshold in (0.4, 0.15, 1e-3):  # between the values 1/n, not at one
        assert other.rank(threshold) == one.rank(threshold)
    assert all_values(matrix * scale).stable_rank() == pytest.approx(all_values(matrix).stable_rank(), rel=1e-5)


def test_the_stable_rank_from_products_is_unbiased_and_its_error_is_that_of_the_random_directions():
    true = np.concatenate([np.geomspace(1, 0.5, 5), np.full(195, 0.2)])
    matrix = Products.of_matrix(matrix_with(true))
    expected = (true**2).sum()
    found = [leading_values(matrix, 1, blocks=3, seed=seed) for seed in range(60)]
    off = np.array([spectrum.stable_rank() * float(spectrum.values[0]) ** 2 - expected for spectrum in found])
    assert abs(off.mean()) < 4 * off.std() / math.sqrt(len(off))
    errors = np.array([spectrum.stable_rank_error() for spectrum in found])
    assert 0.7 < math.sqrt((errors**2).mean()) / off.std() < 1.4


def test_measures_of_rank_by_hand():
    equal = all_values(torch.diag(torch.tensor([2.0, 2.0, 2.0, 0.0])))
    for measure in (equal.stable_rank, equal.participation_ratio, equal.effective_rank):
        assert measure() == pytest.approx(3)
    two = all_values(torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)))
    assert two.stable_rank() == pytest.approx(10 / 9)
    assert two.participation_ratio() == pytest.approx(100 / 82)
    assert two.effective_rank() == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    leading = leading_values(Products.of_matrix(matrix_with(1 / np.arange(1, 201))), 5)
    assert math.isnan(leading.participation_ratio())
    assert math.isnan(leading.effective_rank())


def mixing(x):
    """Of 3 positions and 4 coordinates: position t gets the squares of those up to t."""
    return torch.cumsum(x**2, dim=0) @ torch.arange(16, dtype=x.dtype).reshape(4, 4)


def test_the_jacobian_is_the_one_that_is_written_down():
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.arange(16, dtype=torch.float64).reshape(4, 4)
    expected = torch.zeros(3, 4, 3, 4, dtype=torch.float64)
    for t in range(3):
        for s in range(t + 1):
            expected[t, :, s, :] = (2 * x[s][:, None] * weight).T
    expected = expected.reshape(12, 12)
    for chunk in (1, 5, 100):
        torch.testing.assert_close(jacobian(mixing, x, chunk), expected)
    products = jacobian_products(mixing, x, 5)
    v = torch.randn(12, 7, dtype=torch.float64)
    torch.testing.assert_close(products.times(v), expected @ v)
    torch.testing.assert_close(products.transposed(v), expected.T @ v)
    assert products.times(v[:, :0]).shape == (12, 0)


def test_blocks_of_a_function_that_does_not_mix_positions_are_the_diagonal_of_its_jacobian():
    def alone(x):
        return torch.relu(x @ torch.arange(16, dtype=x.dtype).reshape(4, 4)) ** 2

    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole, blocks = jacobian(alone, x, 4), jacobian_blocks(alone, x, 3)
    torch.testing.assert_close(torch.block_diag(*blocks), whole)
    torch.testing.assert_close(all_values(blocks).values, all_values(whole).values)


def test_products_are_counted_as_they_are_made():
    x, made = torch.ones(3, 4, dtype=torch.float64), []
    jacobian(mixing, x, 5, made.append)
    assert made == [5, 5, 2]
    made.clear()
    assert leading_values(jacobian_products(mixing, x, 5, made.append), 2).products == sum(made)


def test_the_same_seed_gives_the_same_bits_and_the_global_generator_is_left_alone():
    products = Products.of_matrix(matrix_with(1 / np.arange(1, 201)))
    state = torch.get_rng_state()
    first, again, other = (leading_values(products, 10, blocks=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.basis, again.basis)
    assert first.remainder == again.remainder
    assert not torch.equal(first.basis, other.basis)


@pytest.mark.parametrize(("options", "said"), [({"k": 0}, "k=0"), ({"k": 201}, "give 1 to 200"), ({"k": 3, "blocks": 0}, "blocks=0")])
def test_bad_input_is_named(options, said):
    with pytest.raises(ValueError, match=said):
        leading_values(Products.of_matrix(torch.eye(200)), **options)
