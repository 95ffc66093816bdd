"""A model's weights as initializers of the standard graph, in the layout MatMul takes: ``[in, out]``."""

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from llmopt.exporters.onnx.builder import GraphBuilder
from llmopt.optimizer.lazy_tensor import lazy_tensor
from llmopt.optimizer.model import DenseWeight, QuantWeight, Weight

__all__ = ["linear_weight", "table", "vector"]

_INTEGERS = {8: ir.DataType.INT8, 4: ir.DataType.INT4}


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().numpy()


def vector(builder: GraphBuilder, name: str, weight: Weight) -> ir.Value:
    """A norm's weight or a linear's bias, float32 ``[n]``."""
    return builder.initializer(lazy_tensor(name, ir.DataType.FLOAT, weight.shape, lambda: _array(weight.dense())))


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
