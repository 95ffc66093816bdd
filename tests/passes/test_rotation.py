"""Rotations: orthogonal, the same as their matrix, spreading a channel over all others."""

import pytest
import torch

from llmopt.passes._rotation import random_rotation

SIZES = [1, 2, 9, 16, 24, 60, 64, 80, 96, 509, 576, 960, 1536]


def rotation(size, seed=0, *, keeps_mean=False):
    return random_rotation(size, torch.Generator().manual_seed(seed), keeps_mean=keeps_mean)


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_orthogonal(size, keeps_mean):
    matrix = rotation(size, keeps_mean=keeps_mean).matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_the_mean_stays_where_it_must(size):
    ones = torch.ones(1, size, dtype=torch.float64)
    torch.testing.assert_close(rotation(size, keeps_mean=True).apply(ones), ones, rtol=0, atol=1e-12)


@pytest.mark.parametrize("keeps_mean", [False, True])
def test_it_is_its_matrix_block_by_block(keeps_mean):
    turn = rotation(36, keeps_mean=keeps_mean)
    x = torch.randn(5, 3, 72, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = x @ torch.block_diag(turn.matrix(), turn.matrix())
    torch.testing.assert_close(turn.apply(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [64, 576, 960])
def test_where_there_is_a_hadamard_matrix_a_channel_is_spread_evenly(size):
    torch.testing.assert_close(
        rotation(size).matrix().abs(), torch.full((size, size), size**-0.5, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_with_the_mean_kept_no_channel_stays_large():
    """Entries are sums of n signs over n: of a normal distribution with deviation n^-1/2, here at most 6 of them."""
    assert rotation(576, keeps_mean=True).matrix().abs().max() < 6 * 576**-0.5


def test_a_seed_decides():
    assert torch.equal(rotation(60, 1).matrix(), rotation(60, 1).matrix())
    assert not torch.allclose(rotation(60, 1).matrix(), rotation(60, 2).matrix())
