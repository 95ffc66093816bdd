"""Rounding a model's weight, which may be a table that is too large to hold as floats."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import Model, QuantWeight, Weight
from llmopt.optimizer.rounding import grid, joined, quantize, quantize_on, with_input_scale
from llmopt.optimizer.scheme import QuantSpec, Scheme

__all__ = ["finite", "refuse_damaged", "relative_error", "round_weight"]


def round_weight(name: str, weight: Weight, scheme: Scheme, largest: Tensor | None = None) -> tuple[QuantWeight, float]:
    """The rounded weight and its relative error, made a few rows at a time: a table is never in memory as floats.

    Args:
        name: Of the weight.
        weight: What is rounded.
        scheme: To what.
        largest: Magnitudes that its inputs reach, float32, any shape: a static scheme stores a scale that covers them.

    Raises:
        PassError: A value is not finite.
    """
    spec = scheme.weights
    shared = grid(torch.tensor([_range(name, weight, spec)])[None], spec) if spec.strategy == "tensor" else None
    parts, lost, total = [], 0.0, 0.0
    for block in _finite_blocks(name, weight, spec):
        parts.append(quantize(block, scheme) if shared is None else quantize_on(block, *shared, scheme))
        lost = math.hypot(lost, _norm(parts[-1].dense() - block))
        total = math.hypot(total, _norm(block))
    tensors = joined(parts, spec)
    if largest is not None:
        tensors = with_input_scale(tensors, scheme, largest)
    return QuantWeight.of(tensors, scheme), lost / max(total, 1e-30)


def _finite_blocks(name: str, weight: Weight, spec: QuantSpec) -> Iterator[Tensor]:
    """Rows of the weight, float32; blocks that share a scale are not cut."""
    for block in weight.dense_blocks(multiple=spec.block_structure[0] if spec.block_structure else 1):
        yield finite(name, block)


def _range(name: str, weight: Weight, spec: QuantSpec) -> list[float]:
    """The smallest and the largest value."""
    ends = [block.aminmax() for block in _finite_blocks(name, weight, spec)]
    return [min(float(end.min) for end in ends), max(float(end.max) for end in ends)]


def finite(name: str, values: Tensor) -> Tensor:
    """``values``, a weight's or some of its rows.

    Raises:
        PassError: One of them is not finite.
    """
    if not values.isfinite().all():
        text = f"{name} has values that are not finite"
        raise PassError(text, hint="the checkpoint is damaged, or overflowed while it was trained or merged")
    return values


def refuse_damaged(model: Model) -> None:
    """Look for what makes a model compute no numbers.

    Raises:
        PassError: A weight has values that are not finite.
    """
    for name, weight in model.weights.items():
        for block in weight.dense_blocks():
            finite(name, block)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The norm of what lies between two tensors as a share of that of the second."""
    return _norm(found - expected) / max(_norm(expected), 1e-30)


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
