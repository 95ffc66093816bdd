"""A model's weights as initializers of the standard graph, in the layout MatMul takes: ``[in, out]``."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from llmopt.exporters.onnx.builder import GraphBuilder
from llmopt.optimizer.decoder import Attention
from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.lazy_tensor import StackedTensor, lazy_tensor
from llmopt.optimizer.model import DenseWeight, Model, QuantWeight, Weight
from llmopt.optimizer.scheme import Scheme

__all__ = [
    "cache_scales",
    "expert_weights",
    "input_scale",
    "linear_weight",
    "packed_order",
    "reordered",
    "table",
    "vector",
]

_INTEGERS = {8: ir.DataType.INT8, 4: ir.DataType.INT4, 3: ir.DataType.INT4, 2: ir.DataType.INT4}
"""Opset 24 has no type of 2 or 3 bits; tensors of such numbers say how many they have (``bits_of``)."""


def vector(builder: GraphBuilder, name: str, weight: Weight, *, offset: float = 0.0) -> ir.Value:
    """A norm's weight or a linear's bias, float32 ``[n]``, plus ``offset``."""
    return builder.initializer(
        lazy_tensor(name, ir.DataType.FLOAT, weight.shape, lambda: (weight.dense() + offset).numpy())
    )


def input_scale(builder: GraphBuilder, name: str, weight: QuantWeight) -> ir.Value:
    """The stored scale of a linear's inputs, a float32 scalar; one initializer for equal ones of the same input."""
    scale = weight.load().input_scale
    assert scale is not None
    return builder.constant(scale.numpy().reshape(()), f"{name}.scale")


def cache_scales(builder: GraphBuilder, model: Model, attention: Attention) -> list[ir.Value]:
    """The scales of ``attention``'s cached keys and values, float32 ``[kv_heads * head_dim]``; none in float.

    Args:
        builder: Of the graph.
        model: Has the weights.
        attention: Names them.
    """
    columns = attention.kv_heads * attention.head_dim

    def make(weight: Weight) -> np.ndarray:
        array: np.ndarray = weight.dense().expand(columns).contiguous().numpy()
        return array

    return [
        builder.initializer(lazy_tensor(name, ir.DataType.FLOAT, (columns,), partial(make, model.weights[name])))
        for name in attention.cache_scales
        if name in model.weights
    ]


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

    Each is an initializer, or DequantizeLinear of one along axis 1, with scales ``[experts, groups, out]``.

    Args:
        builder: Of the graph.
        module: Names the initializers.
        experts: Gate, up and down of each, ``[out, in]``.

    Raises:
        UnsupportedError: Experts whose weights are stacked here have different schemes, or quantized activations.
    """
    gate_up, down = [expert[:2] for expert in experts], [expert[2:] for expert in experts]
    return _stacked(builder, f"{module}.gate_up", gate_up), _stacked(builder, f"{module}.down", down)


def _stacked(builder: GraphBuilder, name: str, experts: list[tuple[Weight, ...]]) -> ir.Value:
    """The matrices of each expert side by side, ``[experts, in, out]``; read expert by expert."""
    rows, columns = sum(weight.shape[0] for weight in experts[0]), experts[0][0].shape[1]

    def initializer(suffix: str, kind: ir.DataType, height: int, read: Callable[[Any], Tensor]) -> ir.Value:
        def part(e: int) -> np.ndarray:
            return torch.cat([read(weight) for weight in experts[e]]).T.contiguous().numpy()

        return builder.initializer(StackedTensor(f"{name}{suffix}", kind, (len(experts), height, rows), part))

    scheme = _one_scheme(name, experts)
    if scheme is None:
        return initializer("", ir.DataType.FLOAT, columns, lambda weight: weight.dense())
    spec = scheme.weights
    dtype, size = _INTEGERS[spec.num_bits], spec.group_size or columns
    inputs = [
        initializer("", dtype, columns, lambda weight: weight.load().values),
        initializer("_scale", ir.DataType.FLOAT, columns // size, lambda weight: weight.load().by_row().scale),
    ]
    if not spec.symmetric:
        inputs.append(initializer("_zero_point", dtype, columns // size, lambda weight: weight.load().by_row().zero))
    return builder.op("DequantizeLinear", *inputs, axis=1, block_size=size, name=f"{name}_dequantized")


def _one_scheme(name: str, experts: list[tuple[Weight, ...]]) -> Scheme | None:
    """The scheme of all these weights, None when they are floats."""
    schemes = {weight.scheme if isinstance(weight, QuantWeight) else None for expert in experts for weight in expert}
    if len(schemes) > 1:
        names = sorted("float" if scheme is None else scheme.name for scheme in schemes)
        raise UnsupportedError(
            f"{name}: its experts have different schemes: {', '.join(names)}",
            hint="one scheme for gate and up of all experts of a layer, and one for down",
        )
    (scheme,) = schemes
    if any(weight.has_group_index for expert in experts for weight in expert if isinstance(weight, QuantWeight)):
        raise UnsupportedError(
            f"{name}: experts that were quantized in the order of activations (desc_act) have no graph",
            hint="take a checkpoint without desc_act, or put the pass dequantize first",
        )
    if scheme is not None and scheme.input_activations is not None:
        raise UnsupportedError(
            f"{name}: experts with quantized activations have no graph", hint="quantize their weights only, as in W8A16"
        )
    return scheme


def linear_weight(builder: GraphBuilder, module: str, weight: Weight) -> ir.Value:
    """The float32 ``[in, out]`` that a MatMul multiplies with: an initializer, or DequantizeLinear of one.

    Numbers are ``[in, out]``; where the columns of a group lie apart, they are in the order of the groups, and what
    enters has to be. Per-channel scales are ``[out]``, with DequantizeLinear's axis 1; grouped ones
    ``[groups, out]`` with axis 0 and the group size as block_size. A scale of several outputs is repeated for each.
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


def _array(tensor: Tensor) -> np.ndarray:
    """The same memory for numpy, which knows FP8 by ml_dtypes only."""
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    array: np.ndarray = tensor.numpy()
    return array


def _dequantized(builder: GraphBuilder, name: str, weight: QuantWeight, *, transposed: bool) -> ir.Value:
    """DequantizeLinear of the integers ``[out, in]``, or of their transpose ``[in, out]``."""
    spec = weight.scheme.weights
    dtype = ir.DataType.FLOAT8E4M3FN if spec.type == "float" else _INTEGERS[spec.num_bits]
    base = name.removesuffix(".weight")
    size = spec.group_size or (None if spec.block_structure is None else spec.block_structure[1])
    rows, columns = weight.shape

    def initializer(suffix: str, kind: ir.DataType, part: Literal["values", "scale", "zero"]) -> ir.Value:
        if part != "values" and size is None:
            shape: tuple[int, ...] = (rows,)
        else:
            width = columns if part == "values" else weight.groups
            shape = (width, rows) if transposed else (rows, width)

        def make() -> np.ndarray:
            tensors, _ = weight.load().by_group()
            tensor: Tensor = getattr(tensors.by_row(), part)
            return _array((tensor.T if transposed else tensor).contiguous()).reshape(shape)

        return builder.initializer(lazy_tensor(f"{base}.{suffix}", kind, shape, make, bits=spec.num_bits))

    inputs = [initializer("weight", dtype, "values"), initializer("weight_scale", ir.DataType.FLOAT, "scale")]
    if not spec.symmetric:
        inputs.append(initializer("weight_zero_point", dtype, "zero"))
    if size is not None:
        attributes = {"axis": 0 if transposed else 1, "block_size": size}
    else:
        attributes = {"axis": 1 if transposed else 0}
    return builder.op("DequantizeLinear", *inputs, name=f"{base}.weight_dequantized", **attributes)
