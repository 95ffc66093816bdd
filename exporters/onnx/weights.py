"""A model's weights as initializers of the standard graph, in the layout MatMul takes: ``[in, out]``."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from llmopt.exporters.onnx.builder import GraphBuilder
from llmopt.optimizer.decoder import Attention
from llmopt.optimizer.lazy_tensor import lazy_tensor
from llmopt.optimizer.model import DenseWeight, QuantWeight, Weight

__all__ = ["expert_weights", "linear_weight", "packed_order", "reordered", "table", "vector"]

_INTEGERS = {8: ir.DataType.INT8, 4: ir.DataType.INT4}


def vector(builder: GraphBuilder, name: str, weight: Weight, *, offset: float = 0.0) -> ir.Value:
    """A norm's weight or a linear's bias, float32 ``[n]``, plus ``offset``."""
    return builder.initializer(
        lazy_tensor(name, ir.DataType.FLOAT, weight.shape, lambda: (weight.dense() + offset).numpy())
    )


def packed_order(attention: Attention) -> np.ndarray:
    """The rows of a packed linear, grouped by KV head, in the order query, key, value: int64 ``[rows]``."""
    per_group = attention.heads // attention.kv_heads
    rows = np.arange((attention.heads + 2 * attention.kv_heads) * attention.head_dim)
    groups = rows.reshape(attention.kv_heads, per_group + 2, attention.head_dim)
    return np.concatenate([groups[:, :per_group].ravel(), groups[:, -2].ravel(), groups[:, -1].ravel()])


def reordered(weight: Weight, order: np.ndarray) -> Weight:
    """The weight with its rows in another order: row i is row ``order[i]`` of ``weight``."""
    index = torch.from_numpy(order)
    if isinstance(weight, DenseWeight):
        return replace(weight, load=lambda: weight.load()[index])
    return replace(weight, load=lambda: weight.load().rows(index))


def expert_weights(
    builder: GraphBuilder, module: str, experts: Sequence[tuple[Weight, ...]]
) -> tuple[ir.Value, ir.Value]:
    """Gate and up of all experts, ``[experts, hidden, 2*inner]``, and down, ``[experts, inner, hidden]``, float32.

    Args:
        builder: Of the graph.
        module: Names the initializers.
        experts: Gate, up and down of each, ``[out, in]``.
    """
    (inner, hidden), count = experts[0][0].shape, len(experts)

    def gate_up() -> np.ndarray:
        array = np.empty((count, hidden, 2 * inner), np.float32)
        for into, (gate, up, _) in zip(array, experts, strict=True):
            _fill(into[:, :inner].T, gate)
            _fill(into[:, inner:].T, up)
        return array

    def down() -> np.ndarray:
        array = np.empty((count, inner, hidden), np.float32)
        for into, expert in zip(array, experts, strict=True):
            _fill(into.T, expert[2])
        return array

    return (
        builder.initializer(lazy_tensor(f"{module}.gate_up", ir.DataType.FLOAT, (count, hidden, 2 * inner), gate_up)),
        builder.initializer(lazy_tensor(f"{module}.down", ir.DataType.FLOAT, (count, inner, hidden), down)),
    )


def linear_weight(builder: GraphBuilder, module: str, weight: Weight) -> ir.Value:
    """The float32 ``[in, out]`` that a MatMul multiplies with: an initializer, or DequantizeLinear of one.

    Integers are ``[in, out]``. Per-channel scales are ``[out]``, with DequantizeLinear's axis 1; grouped ones
    ``[groups, out]`` with axis 0 and the group size as block_size.
    """
    name = f"{module}.weight"
    if isinstance(weight, DenseWeight):
        return _floats(builder, name, weight, transposed=True)
    return _dequantized(builder, name, weight, transposed=True)


def table(builder: GraphBuilder, name: str, weight: Weight) -> ir.Value:
    """An embedding table, float32 ``[vocabulary, columns]``: an initializer, or DequantizeLinear of one."""
    if isinstance(weight, DenseWeight):
        return _floats(builder, name, weight, transposed=False)
    return _dequantized(builder, name, weight, transposed=False)


def _floats(builder: GraphBuilder, name: str, weight: Weight, *, transposed: bool) -> ir.Value:
    """An initializer of the weight's values or of their transpose, which alone is in memory when it is written."""
    shape = weight.shape[::-1] if transposed else weight.shape

    def make() -> np.ndarray:
        array = np.empty(shape, np.float32)
        _fill(array.T if transposed else array, weight)
        return array

    return builder.initializer(lazy_tensor(name, ir.DataType.FLOAT, shape, make))


def _fill(array: np.ndarray, weight: Weight) -> None:
    """Write the weight's values into float32 ``[out, in]``, a few rows at a time."""
    rows, first = torch.from_numpy(array), 0
    for block in weight.dense_blocks():
        rows[first : first + len(block)] = block
        first += len(block)


def _dequantized(builder: GraphBuilder, name: str, weight: QuantWeight, *, transposed: bool) -> ir.Value:
    """DequantizeLinear of the integers ``[out, in]``, or of their transpose ``[in, out]``."""
    spec = weight.scheme.weights
    dtype = _INTEGERS[spec.num_bits]
    base = name.removesuffix(".weight")
    grouped = spec.group_size is not None
    rows, columns = weight.shape

    def initializer(suffix: str, kind: ir.DataType, part: Literal["values", "scale", "zero"]) -> ir.Value:
        if part != "values" and not grouped:
            shape: tuple[int, ...] = (rows,)
        else:
            width = columns if part == "values" else weight.groups
            shape = (width, rows) if transposed else (rows, width)

        def make() -> np.ndarray:
            tensor: Tensor = getattr(weight.load(), part)
            return (tensor.T if transposed else tensor).contiguous().numpy().reshape(shape)

        return builder.initializer(lazy_tensor(f"{base}.{suffix}", kind, shape, make))

    inputs = [initializer("weight", dtype, "values"), initializer("weight_scale", ir.DataType.FLOAT, "scale")]
    if not spec.symmetric:
        inputs.append(initializer("weight_zero_point", dtype, "zero"))
    if grouped:
        attributes = {"axis": 0 if transposed else 1, "block_size": spec.group_size}
    else:
        attributes = {"axis": 1 if transposed else 0}
    return builder.op("DequantizeLinear", *inputs, name=f"{base}.weight_dequantized", **attributes)
