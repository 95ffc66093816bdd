"""A model's weights as initializers of the standard graph, in the layout MatMul takes: ``[in, out]``."""

from collections.abc import Sequence
from dataclasses import replace

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


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().numpy()


def vector(builder: GraphBuilder, name: str, weight: Weight, *, offset: float = 0.0) -> ir.Value:
    """A norm's weight or a linear's bias, float32 ``[n]``, plus ``offset``."""
    return builder.initializer(
        lazy_tensor(name, ir.DataType.FLOAT, weight.shape, lambda: _array(weight.dense() + offset))
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
    zero = None if weight.zero is None else weight.zero[index]
    return replace(weight, values=weight.values[index], scale=weight.scale[index], zero=zero)


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
        return np.stack([_array(torch.cat([gate.dense(), up.dense()]).T) for gate, up, _ in experts])

    def down() -> np.ndarray:
        return np.stack([_array(expert[2].dense().T) for expert in experts])

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
        rows, columns = weight.shape
        return builder.initializer(
            lazy_tensor(name, ir.DataType.FLOAT, (columns, rows), lambda: _array(weight.dense().T))
        )
    return _dequantized(builder, name, weight, transposed=True)


def table(builder: GraphBuilder, name: str, weight: Weight) -> ir.Value:
    """An embedding table, float32 ``[vocabulary, columns]``: an initializer, or DequantizeLinear of one."""
    if isinstance(weight, DenseWeight):
        return builder.initializer(lazy_tensor(name, ir.DataType.FLOAT, weight.shape, lambda: _array(weight.dense())))
    return _dequantized(builder, name, weight, transposed=False)


def _dequantized(builder: GraphBuilder, name: str, weight: QuantWeight, *, transposed: bool) -> ir.Value:
    """DequantizeLinear of the integers ``[out, in]``, or of their transpose ``[in, out]``."""
    spec = weight.scheme.weights
    dtype = _INTEGERS[spec.num_bits]
    base = name.removesuffix(".weight")
    grouped = spec.group_size is not None

    def laid_out(tensor: Tensor) -> np.ndarray:
        return _array(tensor.T if transposed else tensor)

    def initializer(suffix: str, kind: ir.DataType, tensor: Tensor, *, flat: bool) -> ir.Value:
        shape = (tensor.shape[0],) if flat else tuple(tensor.T.shape if transposed else tensor.shape)
        return builder.initializer(
            lazy_tensor(f"{base}.{suffix}", kind, shape, lambda: _array(tensor[:, 0]) if flat else laid_out(tensor))
        )

    inputs = [
        initializer("weight", dtype, weight.values, flat=False),
        initializer("weight_scale", ir.DataType.FLOAT, weight.scale.to(torch.float32), flat=not grouped),
    ]
    if weight.zero is not None:
        inputs.append(initializer("weight_zero_point", dtype, weight.zero, flat=not grouped))
    if grouped:
        attributes = {"axis": 0 if transposed else 1, "block_size": spec.group_size}
    else:
        attributes = {"axis": 1 if transposed else 0}
    return builder.op("DequantizeLinear", *inputs, name=f"{base}.weight_dequantized", **attributes)
