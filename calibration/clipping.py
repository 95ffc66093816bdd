"""Searching the range that a group is rounded in: a little less than all values often loses less."""

from typing import Literal

import torch
from torch import Tensor

from llmopt.optimizer.rounding import grid, grids
from llmopt.optimizer.scheme import QuantSpec

__all__ = ["Clipping", "chosen_grid", "clipped_grid"]

Clipping = Literal["none", "weights", "activations"]
"""The range of a group: all values fit; least squared error; least squared error with columns as they are activated."""

_FACTORS = tuple(1.08 - 0.02 * step for step in range(27))
"""Of the scale that covers all values: 1.08 to 0.56."""


def chosen_grid(
    weight: Tensor, spec: QuantSpec, clipping: Clipping, importance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The scales and zero points of a weight. Ranges are only searched for integers in groups or rows.

    Args:
        weight: float32 ``[out, in]``.
        spec: How it is quantized.
        clipping: See ``Clipping``.
        importance: How much a column counts, float32 ``[in]``; needed for ``activations``.

    Returns:
        As ``grids``.
    """
    if clipping == "none" or spec.type == "float" or spec.strategy not in ("group", "channel"):
        return grids(weight, spec)
    size = spec.group_size or weight.shape[1]
    groups = weight.reshape(len(weight), -1, size)
    if clipping == "weights":
        return clipped_grid(groups, spec)
    assert importance is not None
    return clipped_grid(groups, spec, importance.reshape(-1, size))


def clipped_grid(groups: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Of some narrower and wider ranges of each group the one with the smallest squared error.

    Args:
        groups: float32 ``[out, groups, columns]``.
        spec: Bits and symmetry of integers.
        importance: How much a column's error counts, float32 ``[groups, columns]``; None: all the same.

    Returns:
        Scale float32 and zero point int8 ``[out, groups]``, as ``grid``; no group has a larger weighted error than with
        ``grid``'s own.
    """
    whole, zero = grid(groups, spec)
    best, best_zero = whole, zero
    smallest = torch.full_like(whole, torch.inf)
    for factor in (1.0, *_FACTORS):
        scale = whole * factor
        shifted = None if zero is None else _zero(groups, scale, spec)
        error = _error(groups, scale, shifted, spec, importance)
        better = error < smallest
        smallest = torch.where(better, error, smallest)
        best = torch.where(better, scale, best)
        if shifted is not None:
            assert best_zero is not None
            best_zero = torch.where(better, shifted, best_zero)
    return best, best_zero


def _zero(groups: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """The zero point that puts the middle of the group's values in the middle of the range."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    middle = (spec.quant_min + spec.quant_max) / 2 - (low + high) / (2 * scale)
    return middle.round().clamp(spec.quant_min, spec.quant_max).to(torch.int8)


def _error(groups: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec, importance: Tensor | None) -> Tensor:
    shift = 0 if zero is None else zero[:, :, None].to(torch.float32)
    steps = (groups / scale[:, :, None]).round_().add_(shift).clamp_(spec.quant_min, spec.quant_max).sub_(shift)
    error = steps.mul_(scale[:, :, None]).sub_(groups).square_()
    return error.sum(-1) if importance is None else (error * importance).sum(-1)
