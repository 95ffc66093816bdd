"""Rounding a changed weight again: no group loses more than on the base's own grid, nor than on a new one."""

import pytest
import torch

from llmopt.calibration.clipping import chosen_grid
from llmopt.optimizer.model import QuantWeight
from llmopt.optimizer.rounding import quantize, quantize_on
from llmopt.optimizer.scheme import PRESETS
from llmopt.passes._requantizing import cost_of, requantized

SCHEMES = {
    "W4A16": PRESETS["W4A16"].with_group_size(16),
    "W4A16_ASYM": PRESETS["W4A16_ASYM"].with_group_size(16),
    "W8A8": PRESETS["W8A8"],
    "FP8_BLOCK": PRESETS["FP8_BLOCK"],
}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_group(error, scheme):
    if scheme.weights.strategy == "block":
        return error.square().sum()
    return error.square().reshape(len(error), -1, scheme.weights.group_size or error.shape[1]).sum(-1)


@pytest.mark.parametrize("size", [0.0, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("name", SCHEMES)
def test_no_group_loses_more_than_on_either_grid(name, size) -> None:
    scheme = SCHEMES[name]
    tensors = quantize(random(24, 64), scheme)
    merged = tensors.dense() + size * random(24, 64, seed=1)
    found = requantized(QuantWeight.of(tensors, scheme), merged)
    error = by_group(found.dense() - merged, scheme)
    for scale, zero in ((tensors.scale, tensors.zero), chosen_grid(merged, scheme.weights, "none", None)):
        other = quantize_on(merged, scale, zero, scheme).dense()
        assert (error <= by_group(other - merged, scheme) + 1e-9).all()
    assert found.scheme == scheme


@pytest.mark.parametrize("name", SCHEMES)
def test_what_was_not_changed_stays_as_it_is(name) -> None:
    tensors = quantize(random(24, 64), SCHEMES[name])
    base = QuantWeight.of(tensors, SCHEMES[name])
    assert torch.equal(requantized(base, base.dense()).dense(), base.dense())


def test_a_change_below_half_a_step_is_lost_and_the_cost_says_so() -> None:
    scheme = SCHEMES["W4A16"]
    base = QuantWeight.of(quantize(random(24, 64), scheme), scheme)
    change = 0.01 * random(24, 64, seed=1)
    merged = base.dense() + change
    error, kept = cost_of(base, merged, requantized(base, merged))
    assert kept < 0.1
    assert error <= float(change.norm() / merged.norm()) + 1e-6, "and no more is lost than the change itself"
    assert cost_of(base, merged, QuantWeight.of(quantize(merged, SCHEMES["W8A8"]), SCHEMES["W8A8"]))[1] > 0.5
