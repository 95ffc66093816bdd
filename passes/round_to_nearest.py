"""Round-to-nearest weights: the baseline that every cleverer quantizer must beat."""

import math
from collections.abc import Iterator

import torch

from llmopt.optimizer.assignment import SchemeQuantPass
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import Model, QuantWeight, Weight
from llmopt.optimizer.rounding import grid, joined, quantize, quantize_on
from llmopt.optimizer.scheme import QuantSpec, Scheme

__all__ = ["RoundToNearest"]


class RoundToNearest(SchemeQuantPass):
    """Quantize the linears without looking at data: each scale comes from the weights it covers."""

    def run(self, model: Model, context: PassContext) -> Model:
        """See ``WeightPass.run``. Records the relative error of every module's weight."""
        assigned = self.assign(model)
        changed: dict[str, Weight] = {}
        errors: dict[str, float] = {}
        for done, (module, scheme) in enumerate(assigned.items(), start=1):
            name = model.weight_of(module)
            rounded, errors[module] = _round(name, model.weights[name], scheme)
            changed |= context.keep({name: rounded})
            context.progress(done, len(assigned))
        context.detail("errors", errors)
        return model.with_weights(changed) if changed else model


def _round(name: str, weight: Weight, scheme: Scheme) -> tuple[QuantWeight, float]:
    """The rounded weight and its relative error, made a few rows at a time: a table is never in memory as floats.

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
    return QuantWeight.of(joined(parts, spec), scheme), lost / max(total, 1e-30)


def _finite_blocks(name: str, weight: Weight, spec: QuantSpec) -> Iterator[torch.Tensor]:
    """Rows of the weight, float32; blocks that share a scale are not cut."""
    for block in weight.dense_blocks(multiple=spec.block_structure[0] if spec.block_structure else 1):
        if not block.isfinite().all():
            text = f"{name} has values that are not finite"
            raise PassError(text, hint="the checkpoint is damaged, or overflowed while it was trained or merged")
        yield block


def _range(name: str, weight: Weight, spec: QuantSpec) -> list[float]:
    """The smallest and the largest value."""
    ends = [block.aminmax() for block in _finite_blocks(name, weight, spec)]
    return [min(float(end.min) for end in ends), max(float(end.max) for end in ends)]


def _norm(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
