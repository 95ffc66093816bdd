"""What rounding a linear's inputs does to them: the definitions that engines are measured against, in float32."""

import torch
from torch import Tensor

from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.grid import from_grid, to_grid
from llmopt.optimizer.scheme import QuantSpec

__all__ = ["SMALLEST_SCALE", "quantize_activations", "quantize_per_token"]

SMALLEST_SCALE = 2.0**-126
"""Of inputs rounded to FP8: the smallest normal float32, so that a row of zeros stays zero."""


def quantize_per_token(x: Tensor) -> Tensor:
    """Round each row to 255 levels between its largest magnitudes, as the W8A8 kernels do while they run.

    Args:
        x: Floats ``[..., in]``; each row of the last dimension is one token.

    Returns:
        Floats ``[..., in]``: ``q * m / 127`` with m the row's largest magnitude and q an integer in -127..127, ties to
        even. No element moves by more than ``m / 254``. A row of zeros stays zero.
    """
    largest = x.abs().amax(dim=-1, keepdim=True)
    steps = x / torch.where(largest > 0, largest, torch.ones_like(largest)) / (1 / 127)
    return steps.round() * (largest / 127)


def quantize_activations(x: Tensor, spec: QuantSpec, scale: Tensor | None = None) -> Tensor:
    """Round the inputs of a linear and return what the rounded numbers stand for.

    - int8, per token, dynamic: ``quantize_per_token``.
    - FP8 E4M3, per token or per group of columns, dynamic: ``e4m3(x / s) * s`` with s the largest magnitude of the row
      or of its group over 448, at least ``SMALLEST_SCALE``. The last group may be narrower.
    - per tensor, static: ``q * s`` with the scale that is stored; q is ``x / s`` rounded to an integer in -128..127, or
      to E4M3. What lies outside of the range goes to its end.

    Args:
        x: Floats ``[..., in]``; each row of the last dimension is one token.
        spec: How inputs are quantized.
        scale: float32 ``[1]``, of static specs.

    Returns:
        Floats ``[..., in]``.

    Raises:
        UnsupportedError: No engine rounds inputs in this way.
    """
    is_dynamic = spec.dynamic and scale is None
    if is_dynamic and (spec.type, spec.num_bits, spec.strategy, spec.symmetric) == ("int", 8, "token", True):
        return quantize_per_token(x)
    if is_dynamic and spec.type == "float" and spec.strategy in ("token", "group"):
        return _quantize_groups(x, spec, spec.group_size or x.shape[-1])
    if scale is not None and not spec.dynamic and (spec.num_bits, spec.strategy, spec.symmetric) == (8, "tensor", True):
        return from_grid(to_grid(x, scale, None, spec), scale, None)
    raise UnsupportedError(
        f"activations cannot be quantized to {spec}",
        hint="int8 dynamic per token, FP8 dynamic per token or per group, either static per tensor; all symmetric",
    )


def _quantize_groups(x: Tensor, spec: QuantSpec, size: int) -> Tensor:
    columns = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -columns % size))
    groups = padded.reshape(*x.shape[:-1], -1, size)
    scale = (groups.abs().amax(-1, keepdim=True) / spec.quant_max).clamp(min=SMALLEST_SCALE)
    return from_grid(to_grid(groups, scale, None, spec), scale, None).flatten(-2)[..., :columns]
