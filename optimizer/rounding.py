"""Rounding a weight matrix to integers: the one place where a scale is chosen from a range of values."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmopt.optimizer.model import QuantTensors
from llmopt.optimizer.scheme import QuantSpec, Scheme

__all__ = ["grid", "joined", "quantize"]


def grid(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each group from its smallest and largest value.

    Symmetric scales are ``max|w| / (2^(bits-1) - 1/2)``, compressed-tensors' choice: it uses the whole range
    ``[-2^(bits-1), 2^(bits-1) - 1]`` and keeps the largest value within half a step.

    Args:
        groups: float32 ``[out, groups, columns]``.
        spec: Bits and symmetry.

    Returns:
        Scale float32 ``[out, groups]``, never 0; zero point int8 ``[out, groups]``, or None when symmetric.
    """
    levels = float(spec.quant_max - spec.quant_min)
    if spec.symmetric:
        scale = groups.abs().amax(-1) / (levels / 2)
        return torch.where(scale > 0, scale, torch.ones_like(scale)), None
    low = groups.amin(-1).clamp(max=0)
    high = groups.amax(-1).clamp(min=0)
    scale = (high - low) / levels
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (spec.quant_min - low / scale).round().clamp(spec.quant_min, spec.quant_max)
    return scale, zero.to(torch.int8)


def quantize(weight: Tensor, scheme: Scheme) -> QuantTensors:
    """Round every element to the nearest value of its group's grid, halves to even. No row looks at another.

    Args:
        weight: float32 ``[out, in]``; ``in`` is a multiple of the group size.
        scheme: Integer weights, one scale per channel or per group.

    Returns:
        Values whose ``dense()`` differs from ``weight`` by at most half a step of the group; with a zero point
        by at most one step at the ends of the range, where the rounded zero point shifts the grid.
    """
    spec = scheme.weights
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, spec.group_size or columns)
    scale, zero = grid(groups, spec)
    steps = (groups / scale[:, :, None]).round()
    if zero is not None:
        steps = steps + zero[:, :, None]
    values = steps.clamp(spec.quant_min, spec.quant_max).to(torch.int8).reshape(rows, columns)
    return QuantTensors(values, scale, zero)


def joined(parts: Sequence[QuantTensors]) -> QuantTensors:
    """One weight from blocks of its rows, in order."""
    values, scales, zeros = zip(*parts, strict=True)
    return QuantTensors(torch.cat(values), torch.cat(scales), None if zeros[0] is None else torch.cat(zeros))
