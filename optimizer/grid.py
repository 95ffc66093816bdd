"""The numbers a scheme can store: floats to the nearest of them, and back."""

import torch
from torch import Tensor

from llmopt.optimizer.scheme import QuantSpec

__all__ = ["from_grid", "spread", "to_grid"]


def to_grid(x: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    """The stored number nearest to each element, ties to even; what lies outside of the range goes to its end.

    Integers are ``clamp(round(x / scale) + zero)``. Floats are E4M3 without infinities (OCP 8-bit Floating Point
    Specification, revision 1.0): ``x / scale`` with 3 bits behind the leading one, down to steps of 2^-9, up to 448.

    Args:
        x: float32, any shape.
        scale: float32, positive; broadcasts to ``x``.
        zero: Integer zero points that broadcast to ``x``; None when symmetric.
        spec: Bits and type.

    Returns:
        int8 or float8_e4m3fn, of the shape of ``x``.
    """
    steps = x / scale
    if spec.type == "float":
        return steps.clamp(spec.quant_min, spec.quant_max).to(torch.float8_e4m3fn)
    steps = steps.round()
    if zero is not None:
        steps = steps + zero
    return steps.clamp(spec.quant_min, spec.quant_max).to(torch.int8)


def from_grid(values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """What stored numbers stand for: float32 ``(values - zero) * scale``; all broadcast to ``values``."""
    numbers = values.to(torch.float32)
    if zero is not None:
        numbers = numbers - zero.to(torch.float32)
    return numbers * scale


def spread(scale: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """The scale of each element of a matrix whose blocks share one: ``[block rows, block columns]`` -> ``shape``.

    Blocks at the lower and right edge may reach beyond the matrix.
    """
    by_row = scale.repeat_interleave(block[0], 0)[: shape[0]]
    return by_row.repeat_interleave(block[1], 1)[:, : shape[1]]
