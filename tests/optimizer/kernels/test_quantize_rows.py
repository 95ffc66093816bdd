"""Rows become integers and their largest magnitudes."""

import numpy as np
import pytest


@pytest.fixture
def quantize(run_kernel):
    return lambda x: run_kernel("QuantizeRows", [x], [np.uint8, np.float32])


@pytest.fixture
def gated(run_kernel):
    return lambda product, scale: run_kernel("QuantizeGatedRows", [product, scale], [np.uint8, np.float32])


@pytest.fixture
def normed(run_kernel):
    def call(*inputs, epsilon=1e-5):
        return run_kernel("QuantizeNormedRows", list(inputs), [np.uint8, np.float32, np.float32], epsilon=epsilon)

    return call


def nearly(integers, largest, rows):
    """Whether integers and magnitudes are those of ``rows``, float64, but for what float32 rounds before."""
    np.testing.assert_allclose(largest, np.abs(rows).max(axis=-1, keepdims=True), rtol=1e-6)
    exact = rows / np.abs(rows).max(axis=-1, keepdims=True) * 127 + 128
    return np.abs(integers - exact).max() <= 0.5 + 127 * 2e-6


@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 5, 576), (200, 40), (2, 7), (1, 1000, 33)])
def test_integers_are_the_nearest_127ths_of_the_largest(quantize, shape):
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    integers, largest = quantize(x)
    assert np.array_equal(largest, np.abs(x).max(axis=-1, keepdims=True))
    exact = x.astype(np.float64) / largest * 127 + 128
    # Half a step, and what rounding the factor and its product moves: 2 of 2**-24 of 127.
    assert np.abs(integers - exact).max() <= 0.5 + 2e-5


def test_a_row_has_the_same_integers_whatever_is_beside_it(quantize):
    x = np.random.default_rng(1).standard_normal((300, 100), np.float32)
    together = quantize(x)
    for row in (0, 150, 299):
        assert all(
            np.array_equal(a, b[row : row + 1]) for a, b in zip(quantize(x[row : row + 1]), together, strict=True)
        )


def test_the_largest_magnitude_is_an_end_of_the_range(quantize):
    integers, _ = quantize(np.array([[2.0, -2.0, 0.0, 1.0]], np.float32))
    assert integers.tolist() == [[255, 1, 128, 192]]


def test_a_row_of_zeros_has_the_magnitude_zero(quantize):
    assert quantize(np.zeros((1, 40), np.float32))[1].tolist() == [[0]]


@pytest.mark.parametrize("column", [0, 20, 39])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_has_no_magnitude(quantize, column, value):
    x = np.ones((2, 40), np.float32)
    x[1, column] = value
    largest = quantize(x)[1]
    assert largest[0] == 1
    assert np.isnan(largest[1])


@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 5, 1536), (200, 40), (2, 7)])
def test_gated_rows(gated, shape):
    generator = np.random.default_rng(2)
    product = generator.standard_normal((*shape[:-1], 2 * shape[-1]), np.float32) * 4
    product[..., 0] = -200  # where silu's exponential leaves the range of floats
    scale = generator.uniform(0.5, 2, (*shape[:-1], 1)).astype(np.float32)
    gate, up = np.split(product.astype(np.float64) * scale, 2, axis=-1)
    assert nearly(*gated(product, scale), gate / (1 + np.exp(-gate)) * up)


@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 5, 576), (200, 40), (2, 7)])
def test_normed_rows(normed, shape):
    generator = np.random.default_rng(3)
    product, residual = generator.standard_normal((2, *shape), np.float32)
    scale = generator.uniform(0.5, 2, (*shape[:-1], 1)).astype(np.float32)
    weight = generator.uniform(-1, 1, shape[-1]).astype(np.float32)
    integers, largest, total = normed(product, scale, residual, weight, epsilon=0.01)
    exact = product.astype(np.float64) * scale + residual
    np.testing.assert_allclose(total, exact, atol=1e-6)
    assert nearly(integers, largest, exact / np.sqrt((exact**2).mean(axis=-1, keepdims=True) + 0.01) * weight)


def test_rows_that_do_not_fit_are_refused(gated, normed):
    x, scale = np.ones((3, 8), np.float32), np.ones((3, 1), np.float32)
    with pytest.raises(Exception, match="gate and up need the same columns, and every row a scale"):
        gated(x, scale[:2])
    with pytest.raises(Exception, match="every row a scale, and every column a weight"):
        normed(x, scale, x, np.ones(7, np.float32))
