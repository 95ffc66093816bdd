"""The search for AWQ's scales: losses are those of real outputs, and no scale is worse than none."""

import pytest
import torch

from llmopt.calibration.scale_search import Consumer, best_scale
from llmopt.optimizer.rounding import quantize
from llmopt.optimizer.scheme import PRESETS

SCHEME = PRESETS["W4A16"].with_group_size(16)


@pytest.fixture
def rows():
    """Inputs with a few channels that are much larger than the others, as transformers have them."""
    values = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    values[:, [3, 17]] *= 30
    return values


def weight_of(seed):
    return torch.randn(24, 32, generator=torch.Generator().manual_seed(seed))


def consumer_of(rows, seed=1):
    return Consumer(weight_of(seed), rows.T @ rows, SCHEME)


def test_the_loss_is_that_of_the_outputs(rows) -> None:
    scale = torch.rand(32, generator=torch.Generator().manual_seed(2)) + 0.5
    weight = weight_of(1)
    scaled = quantize(weight * scale, SCHEME).dense()
    expected = float(((rows / scale) @ scaled.T - rows @ weight.T).square().sum())
    assert consumer_of(rows).loss(scale) == pytest.approx(expected, rel=1e-4)


def test_large_channels_are_scaled_up_and_the_loss_falls(rows) -> None:
    consumers = [consumer_of(rows, 1), consumer_of(rows, 2)]
    activations = rows.square().mean(0).sqrt()
    found = best_scale(consumers, activations, torch.ones(32))
    assert found.before == pytest.approx(sum(each.loss(torch.ones(32)) for each in consumers))
    assert found.loss == pytest.approx(sum(each.loss(found.scale) for each in consumers))
    assert found.loss < 0.7 * found.before
    assert found.scale[[3, 17]].min() > found.scale[[0, 1, 2, 4, 5]].max()


def test_equal_channels_are_left_alone() -> None:
    consumer = Consumer(weight_of(1), torch.eye(32), SCHEME)
    found = best_scale([consumer], torch.ones(32), torch.ones(32))
    assert torch.equal(found.scale, torch.ones(32))
    assert found.loss == found.before


def test_a_channel_that_is_never_active_gets_a_finite_scale(rows) -> None:
    rows[:, 5] = 0
    found = best_scale([consumer_of(rows)], rows.square().mean(0).sqrt(), torch.ones(32))
    assert found.scale.isfinite().all()
    assert (found.scale > 0).all()


def test_shared_channels_are_spread_over_the_columns(rows) -> None:
    """Sixteen channels, each read by two columns."""
    found = best_scale(
        [consumer_of(rows)], torch.rand(16) + 0.1, torch.ones(16), columns=lambda scale: torch.cat([scale, scale])
    )
    assert found.scale.shape == (16,)
    assert found.loss <= found.before
