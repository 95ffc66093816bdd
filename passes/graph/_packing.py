"""Joins the weights of linears that read the same input into one weight."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from llmopt.optimizer.lazy_tensor import lazy_tensor
from llmopt.passes.graph._rules import attribute, producer

__all__ = ["columns", "pack_biases", "pack_weights", "refusal"]


def columns(weight: ir.Value) -> int:
    """Outputs of a weight ``[in, out]`` that ``refusal`` accepts."""
    assert weight.shape is not None
    return int(weight.shape.numpy()[1])


def refusal(weights: Sequence[ir.Value], biases: Sequence[ir.Value | None] = ()) -> str | None:
    """Why these MatMul weights, and the biases added to their products, cannot become one; None when they can.

    They can when all weights are initializers, or all DequantizeLinear of initializers with equal types and
    attributes and a scale for each output, and all biases are initializers with a value for each output.
    """
    if any(weight.shape is None or len(weight.shape) != 2 for weight in weights):
        return "a weight is no matrix"
    if not all(_is_bias(bias, weight) for bias, weight in zip(biases, weights, strict=False) if bias is not None):
        return "an addend is no constant vector with one value per output"
    if all(weight.is_initializer() for weight in weights):
        return None
    nodes = [node for weight in weights if (node := producer(weight, "DequantizeLinear")) is not None]
    if len(nodes) < len(weights):
        return "some of the linears are quantized and some are not"
    if len({_kind(node) for node in nodes}) > 1:
        return "the linears have different schemes"
    if any(value is not None and value.const_value is None for node in nodes for value in node.inputs):
        return "a weight is not constant"
    return None if all(_is_per_output(node) for node in nodes) else "the linears' scales are not one per output"


def _is_bias(bias: ir.Value, weight: ir.Value) -> bool:
    return bias.is_initializer() and weight.shape is not None and bias.shape == weight.shape[1:]


def _is_per_output(node: ir.Node) -> bool:
    scale = node.inputs[1]
    rank = len(scale.shape) if scale is not None and scale.shape is not None else 0
    return (rank, attribute(node, "axis", 1)) == ((2, 0) if attribute(node, "block_size", 0) else (1, 1))


def _kind(node: ir.Node) -> tuple[Any, ...]:
    dtypes = tuple(value.dtype for value in node.inputs if value is not None)
    return (dtypes, attribute(node, "axis", 1), attribute(node, "block_size", 0))


def pack_weights(op: Any, weights: Sequence[ir.Value], module: str) -> Any:
    """One weight ``[in, sum of out]`` from weights ``[in, out]`` that ``refusal`` accepts.

    Args:
        op: The rewriter's builder.
        weights: In the order of the packed columns.
        module: Names the new initializers.
    """
    if all(weight.is_initializer() for weight in weights):
        return _joined(op, weights, name=f"{module}.weight")
    nodes = [node for weight in weights if (node := weight.producer()) is not None]
    suffixes = ("weight", "weight_scale", "weight_zero_point")
    columns = zip(*(node.inputs for node in nodes), strict=True)
    inputs = [
        _joined(op, [value for value in values if value is not None], name=f"{module}.{suffix}")
        for suffix, values in zip(suffixes, columns, strict=False)
    ]
    return op.DequantizeLinear(*inputs, **nodes[0].attributes)


def pack_biases(op: Any, biases: Sequence[ir.Value], module: str) -> Any:
    """One bias ``[sum of out]``."""
    return _joined(op, biases, name=f"{module}.bias")


def _joined(op: Any, values: Sequence[ir.Value], *, name: str) -> Any:
    """An initializer with the values side by side along their last axis, the outputs; read when it is saved."""
    tensors = [tensor for value in values if (tensor := value.const_value) is not None]
    first = tensors[0]
    shape = [*first.shape.numpy()[:-1], sum(tensor.shape.numpy()[-1] for tensor in tensors)]
    joined = lazy_tensor(
        name, first.dtype, shape, lambda: np.concatenate([tensor.numpy() for tensor in tensors], axis=-1)
    )
    return op.initializer(joined, name=name)
