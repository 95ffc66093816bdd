"""Rounding a weight matrix to what a scheme stores: the one place where a scale is chosen from a range of values."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmopt.optimizer.grid import spread, to_grid
from llmopt.optimizer.model import QuantTensors
from llmopt.optimizer.scheme import QuantSpec, Scheme

__all__ = ["grid", "grids", "joined", "quantize", "quantize_on", "with_input_scale"]


def grid(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each group from its smallest and largest value.

    Symmetric integer scales are ``max|w| / (2^(bits-1) - 1/2)``, compressed-tensors' choice: it uses the whole range
    ``[-2^(bits-1), 2^(bits-1) - 1]`` and keeps the largest value within half a step. FP8 scales are ``max|w| / 448``.

    Args:
        groups: float32 ``[out, groups, columns]``.
        spec: Bits, type and symmetry.

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


def grids(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """``grid`` of everything in a matrix that shares a scale, in the shape ``spec.scale_shape`` gives.

    Args:
        weight: float32 ``[out, in]``; ``in`` is a multiple of the group size.
        spec: How weights are quantized.
    """
    rows, columns = weight.shape
    if spec.strategy == "tensor":
        return grid(weight.reshape(1, 1, -1), spec)
    if spec.block_structure is None:
        return grid(weight.reshape(rows, -1, spec.group_size or columns), spec)
    height, width = spec.block_structure
    padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
    down, across = padded.shape[0] // height, padded.shape[1] // width
    blocks = padded.reshape(down, height, across, width).transpose(1, 2)
    return grid(blocks.reshape(down, across, -1), spec)


def quantize(weight: Tensor, scheme: Scheme) -> QuantTensors:
    """Round every element to the nearest number of its grid, which is the tightest around what shares its scale.

    Args:
        weight: float32 ``[out, in]``; ``in`` is a multiple of the group size.
        scheme: What its weights become.

    Returns:
        Values whose ``dense()`` differs from ``weight`` by at most half a step of the group; with a zero point
        by at most one step at the ends of the range, where the rounded zero point shifts the grid. In FP8 a step is
        an eighth of the value's leading power of two, and at least ``2^-9`` of the scale.
    """
    return quantize_on(weight, *grids(weight, scheme.weights), scheme)


def quantize_on(weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> QuantTensors:
    """Round every element to the nearest number of grids that are given, as ``grids`` returns them."""
    spec, (rows, columns) = scheme.weights, weight.shape
    if spec.block_structure is not None:
        each = spread(scale, spec.block_structure, (rows, columns))
        points = None if zero is None else spread(zero, spec.block_structure, (rows, columns))
        return QuantTensors(to_grid(weight, each, points, spec), scale, zero, block=spec.block_structure)
    groups = weight.reshape(rows, scale.shape[1], -1)
    values = to_grid(groups, scale[:, :, None], None if zero is None else zero[:, :, None], spec)
    return QuantTensors(values.reshape(rows, columns), scale, zero)


def with_input_scale(tensors: QuantTensors, scheme: Scheme, largest: Tensor) -> QuantTensors:
    """``tensors`` with the scale of inputs that a static scheme stores; as they are under any other.

    Args:
        tensors: Of a weight.
        scheme: What it was rounded to.
        largest: Magnitudes that inputs reach, float32, any shape: their maximum is covered.
    """
    if not scheme.needs_input_scale:
        return tensors
    assert scheme.input_activations is not None
    scale, _ = grid(largest.amax().reshape(1, 1, 1), scheme.input_activations)
    return tensors._replace(input_scale=scale.reshape(1))


def joined(parts: Sequence[QuantTensors], spec: QuantSpec) -> QuantTensors:
    """One weight from parts of its rows, in order, each of which but the last holds whole blocks.

    Parts of a weight with one scale have the same one.
    """
    first, values = parts[0], torch.cat([part.values for part in parts])
    if spec.strategy == "tensor":
        return first._replace(values=values)
    zeros = [part.zero for part in parts if part.zero is not None]
    return first._replace(
        values=values,
        scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat(zeros) if zeros else None,
    )
