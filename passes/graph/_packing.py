"""Joins the weights of linears that read the same input into one weight."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from llmopt.optimizer.lazy_tensor import lazy_tensor
from llmopt.passes.graph._rules import attribute, producer

__all__ = ["pack_biases", "pack_weights", "refusal"]


def refusal(weights: Sequence[ir.Value]) -> str | None:
    """Why these MatMul weights cannot become one, or None when they can.

    They can when all are initializers, or all DequantizeLinear of initializers with equal types and attributes.
    """
    if all(weight.is_initializer() for weight in weights):
        return None
    nodes = [producer(weight, "DequantizeLinear") for weight in weights]
    if any(node is None for node in nodes):
        return "some of the linears are quantized and some are not"
    kinds = {_kind(node) for node in nodes if node is not None}
    if len(kinds) > 1:
        return "the linears have different schemes"
    return None


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
