"""Changes the type that a graph's floats have, from float32 to 16 bits and back."""

from typing import Literal, TypeAlias

import ml_dtypes
import numpy as np
import onnx_ir as ir

from llmopt.optimizer.errors import PassError
from llmopt.optimizer.lazy_tensor import StackedTensor, lazy_tensor

__all__ = ["Precision", "set_precision"]

Precision: TypeAlias = Literal["float32", "float16", "bfloat16"]

_FLOATS = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
_NUMBERS = {
    ir.DataType.FLOAT: np.dtype(np.float32),
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
_LIMITS = {kind: ml_dtypes.finfo(numbers) for kind, numbers in _NUMBERS.items()}  # type: ignore[no-untyped-call]
_Role: TypeAlias = Literal["weight", "scale", "constant"]
"""What a number that would become 0 is: a weight may; a scale may not; a constant, which often keeps a divisor from
being 0, becomes the smallest number that no GPU takes for 0."""

_RESULT_TYPES = ("to", "output_dtype", "dtype")
"""Attributes that name the type of a node's result."""
_SCALED = ("QuantizeLinear", "DequantizeLinear")


def set_precision(graph: ir.Model, precision: Precision) -> int:
    """Give every float of the graph one type: weights, scales, constants, caches and what is computed.

    Numbers are rounded to the nearest; of large initializers that happens when they are read, as of all that is lazy.
    Scales of Q/DQ of 8 bits stay in float32, where 16 bits would move a whole channel, except those of groups: TensorRT
    takes them, as those of 4 bits, in the result's type only. The graph's float outputs keep their type if they are no
    caches: a Cast makes it.

    Args:
        graph: Without local functions. Changed in place.
        precision: What its floats become.

    Returns:
        How many values changed their type.

    Raises:
        PassError: A number is beyond the type's range, or a scale below it. For lazy tensors raised when they are read.
    """
    kind = _FLOATS[precision]
    kept = [
        (value, value.dtype)
        for value in graph.graph.outputs
        if value.dtype in _NUMBERS and not str(value.name).startswith("present.")
    ]
    changed = sum(_set_initializer(value, kind) for value in graph.graph.initializers.values())
    changed += sum(_set_type(value, kind) for value in graph.graph.inputs)
    for node in graph.graph:
        _set_attributes(node, kind)
        if node.op_type == "DequantizeLinear" and _has_wide_scales(node):
            node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", kind.value)
        changed += sum(_set_type(value, kind) for value in node.outputs)
    for value, dtype in kept:
        if dtype is not None and dtype != kind:
            _cast_back(graph.graph, value, kind, dtype)
    return changed


def _set_type(value: ir.Value, kind: ir.DataType) -> int:
    """How many values were changed: one or none."""
    if value.dtype not in _NUMBERS or value.dtype == kind:
        return 0
    value.dtype = kind
    return 1


def _set_initializer(value: ir.Value, kind: ir.DataType) -> int:
    tensor = value.const_value
    scales = [use.node for use in value.uses() if use.node.op_type in _SCALED and use.idx == 1]
    if tensor is None or tensor.dtype not in _NUMBERS or tensor.dtype == kind:
        return 0
    if scales and all(_has_wide_scales(node) for node in scales):
        return 0
    is_scalar = value.shape is not None and value.shape.rank() == 0
    value.const_value = _converted(tensor, kind, role="scale" if scales else "constant" if is_scalar else "weight")
    return _set_type(value, kind)


def _has_wide_scales(node: ir.Node) -> bool:
    """Whether the scales of a Q or DQ stay in float32: of numbers of 8 bits, without groups of columns."""
    attribute = node.attributes.get("block_size")
    has_groups = attribute is not None and attribute.as_int() > 0
    return not has_groups and node.inputs[0] is not None and node.inputs[0].dtype != ir.DataType.INT4


_INFINITE = 1e30
"""A constant as large stands for more than any number, as in masks, and becomes the largest there is."""


def _converted(tensor: ir.TensorProtocol, kind: ir.DataType, *, role: _Role) -> ir.TensorProtocol:
    """The tensor in another type."""
    name, shape = str(tensor.name), tensor.shape.numpy()
    if isinstance(tensor, StackedTensor):
        part = tensor.part
        return StackedTensor(name, kind, shape, lambda i: _rounded(name, part(i), kind, role=role))
    if isinstance(tensor, ir.LazyTensor | ir.ExternalTensor):
        return lazy_tensor(name, kind, shape, lambda: _rounded(name, tensor.numpy(), kind, role=role))
    return ir.tensor(_rounded(name, tensor.numpy(), kind, role=role), dtype=kind, name=name)


def _rounded(name: str, array: np.ndarray, kind: ir.DataType, *, role: _Role) -> np.ndarray:
    """The nearest numbers of the type.

    Raises:
        PassError: There is none, or only zero and that will not do.
    """
    numbers = _NUMBERS[kind]
    with np.errstate(over="ignore", under="ignore"):
        rounded = array.astype(numbers)
    beyond = np.isinf(rounded) & np.isfinite(array)
    if beyond.any():
        if role != "constant" or np.abs(array[beyond]).min() < _INFINITE:
            largest = float(np.abs(array[beyond]).max())
            raise PassError(f"{name} holds {largest:.4g}, which is beyond {numbers.name}", hint="take bf16")
        rounded = np.where(beyond, np.sign(array).astype(numbers) * _LIMITS[kind].max, rounded)
    vanished = (rounded == 0) & (array != 0)
    if vanished.any() and role != "weight":
        if role == "scale":
            smallest = float(np.abs(array[vanished]).min())
            raise PassError(f"{name} holds {smallest:.4g}, which becomes 0 in {numbers.name}", hint="take bf16")
        rounded = np.where(vanished, np.sign(array).astype(numbers) * _LIMITS[kind].smallest_normal, rounded)
    return rounded


def _set_attributes(node: ir.Node, kind: ir.DataType) -> None:
    """Types and constants in a node's attributes."""
    floats = {each.value for each in _NUMBERS}
    for name in _RESULT_TYPES:
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.as_int() in floats:
            node.attributes[name] = ir.AttrInt64(name, kind.value)
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in _NUMBERS:
            node.attributes[name] = ir.AttrTensor(name, _converted(attribute.as_tensor(), kind, role="constant"))


def _cast_back(graph: ir.Graph, value: ir.Value, kind: ir.DataType, dtype: ir.DataType) -> None:
    """Give the graph's output ``value``, now of type ``kind``, the type ``dtype`` again under its own name."""
    node = value.producer()
    assert node is not None
    cast = ir.node("Cast", [value], {"to": dtype.value})
    graph.insert_after(node, cast)
    (made,) = cast.outputs
    made.shape, made.type = value.shape, ir.TensorType(dtype)
    value.name, made.name = f"{value.name}.{_NUMBERS[kind].name}", value.name
    graph.outputs[:] = [made if output is value else output for output in graph.outputs]
