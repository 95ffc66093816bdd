"""The range a group is rounded in: never worse than all of it, and found by trying."""

import pytest
import torch

from llmopt.calibration.clipping import chosen_grid, clipped_grid
from llmopt.optimizer.rounding import grid
from llmopt.optimizer.scheme import QuantSpec


def groups_of(seed=0, tail=3.0):
    """Groups with some values far outside, as weights have."""
    values = torch.randn(6, 5, 32, generator=torch.Generator().manual_seed(seed))
    return values * (1 + tail * (values.abs() > 2))


def error_of(groups, scale, zero, spec, importance=None):
    shift = 0 if zero is None else zero[:, :, None].float()
    q = ((groups / scale[:, :, None]).round() + shift).clamp(spec.quant_min, spec.quant_max)
    error = ((q - shift) * scale[:, :, None] - groups) ** 2
    return (error if importance is None else error * importance).sum(-1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("weighted", [True, False])
def test_no_group_loses_more_than_with_its_whole_range_and_most_lose_less(bits, symmetric, weighted) -> None:
    spec = QuantSpec(num_bits=bits, strategy="group", group_size=32, symmetric=symmetric)
    groups = groups_of()
    importance = torch.rand(5, 32, generator=torch.Generator().manual_seed(1)) if weighted else None
    before = error_of(groups, *grid(groups, spec), spec, importance)
    after = error_of(groups, *clipped_grid(groups, spec, importance), spec, importance)
    assert (after <= before * (1 + 1e-6)).all()
    assert (after < before).float().mean() > 0.5


def test_the_scale_is_the_best_of_those_tried() -> None:
    spec = QuantSpec(num_bits=3, strategy="group", group_size=32)
    groups = groups_of(2)
    scale, _ = clipped_grid(groups, spec)
    whole, _ = grid(groups, spec)
    for row in range(6):
        for group in range(5):
            tried = [float(whole[row, group]) * (1.08 - 0.02 * step) for step in range(27)]
            one = groups[row, group][None, None]
            errors = [float(error_of(one, torch.tensor([[each]]), None, spec)) for each in tried]
            found = float(error_of(one, scale[row, group][None, None], None, spec))
            assert found <= min(errors) * (1 + 1e-5)


def test_a_column_that_is_never_active_may_be_clipped() -> None:
    spec = QuantSpec(num_bits=4, strategy="group", group_size=32)
    weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
    weight[:, 7] = 1.7
    importance = torch.ones(32)
    importance[7] = 0
    narrow, _ = chosen_grid(weight, spec, "activations", importance)
    wide, _ = chosen_grid(weight, spec, "none", None)
    assert (narrow < 0.8 * wide).all()
    assert torch.equal(wide, grid(weight[:, None], spec)[0])
    assert not torch.equal(chosen_grid(weight, spec, "weights", importance)[0], narrow)


def test_groups_of_zeros_stay_zeros() -> None:
    for symmetric in (True, False):
        spec = QuantSpec(num_bits=4, strategy="group", group_size=32, symmetric=symmetric)
        scale, zero = clipped_grid(torch.zeros(2, 1, 32), spec)
        assert (scale > 0).all()
        assert float(error_of(torch.zeros(2, 1, 32), scale, zero, spec).sum()) == 0
