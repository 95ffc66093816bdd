"""Hadamard matrices: 1 and -1, orthogonal rows, for the widths that models have."""

import math

import pytest
import torch

from llmopt.passes._hadamard import hadamard, hadamard_factors

MADE = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 56, 60, 64, 68, 72, 76, 80, 84, 88, 96, 128, 576, 960]
WIDTHS = [80, 96, 576, 768, 896, 960, 1024, 1152, 1536, 2048, 2304, 2560, 3072, 3584, 4096, 5120, 8192, 14336]


@pytest.mark.parametrize("order", MADE)
def test_rows_of_ones_and_minus_ones_are_orthogonal(order):
    matrix = hadamard(order)
    assert matrix.shape == (order, order)
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))
    assert torch.equal(matrix[:, 0], torch.ones(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [3, 6, 10, 18, 30, 52, 92])
def test_orders_without_a_construction_have_none(order):
    """None exists for numbers over 2 that 4 does not divide; 52 and 92 need other constructions than these."""
    assert hadamard(order) is None


@pytest.mark.parametrize("width", WIDTHS)
def test_the_widths_of_models_are_products_of_small_hadamard_matrices(width):
    factors, rest = hadamard_factors(width)
    assert rest == 1
    assert math.prod(len(factor) for factor in factors) == width
    for factor in factors:
        assert torch.equal(factor @ factor.T, len(factor) * torch.eye(len(factor), dtype=torch.float64))


@pytest.mark.parametrize(("width", "left"), [(1, 1), (9, 9), (18, 9), (52, 13), (509, 509), (46, 23), (90, 45)])
def test_what_no_hadamard_matrix_divides_is_left(width, left):
    factors, rest = hadamard_factors(width)
    assert rest == left
    assert math.prod(len(factor) for factor in factors) * rest == width
