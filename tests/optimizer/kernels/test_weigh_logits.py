"""Logits become weights, with the sum and the largest of every 64."""

import numpy as np
import pytest

from llmopt.optimizer.kernels import GROUP, weigh_logits


@pytest.mark.parametrize("vocab", [5, 16, 64, 100, 1000, 4097])
def test_weights_are_exponentials_of_the_distance_from_the_largest(vocab):
    logits = np.random.default_rng(0).standard_normal((3, vocab), np.float32) * 5
    temperatures = np.array([0.3, 1, 2], np.float32)
    weights, sums, largest = weigh_logits(logits, temperatures)
    exact = np.exp((logits.astype(np.float64) - logits.max(axis=1, keepdims=True)) / temperatures[:, None])
    # The exponential is off by 2e-7, and its argument, up to 100, by 2**-24 of itself twice.
    np.testing.assert_allclose(weights, exact, rtol=2e-5, atol=2e-38)  # exp(-87) and below is 0
    assert np.array_equal(weights.argmax(axis=1), logits.argmax(axis=1))
    assert np.array_equal(weights.max(axis=1), [1, 1, 1])
    starts = np.arange(0, vocab, GROUP)
    np.testing.assert_allclose(sums, np.add.reduceat(weights, starts, axis=1, dtype=np.float64), rtol=1e-6)
    assert np.array_equal(largest, np.maximum.reduceat(weights, starts, axis=1))


def test_what_cannot_be_chosen_weighs_nothing():
    logits = np.full((1, 70), -np.inf, np.float32)
    logits[0, 66:68] = 3, -300
    weights, sums, _ = weigh_logits(logits, np.ones(1, np.float32))
    assert weights[0].nonzero()[0].tolist() == [66]
    assert sums.tolist() == [[0, 1]]


def test_a_row_weighs_the_same_alone():
    logits = np.random.default_rng(1).standard_normal((4, 777), np.float32)
    temperatures = np.array([0.5, 1, 1.5, 0.01], np.float32)
    together = weigh_logits(logits, temperatures)
    for row in range(4):
        alone = weigh_logits(logits[row : row + 1], temperatures[row : row + 1])
        assert all(np.array_equal(a, b[row : row + 1]) for a, b in zip(alone, together, strict=True))
