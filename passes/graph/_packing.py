"""Joins linears that read the same input into one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from llmopt.optimizer.lazy_tensor import bits_of, lazy_tensor
from llmopt.passes.graph._rules import attribute, producer

__all__ = ["Linear", "columns", "linear_of", "pack", "refusal"]


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear in a graph: ``x`` times ``weight``, plus ``bias`` where it has one.

    Attributes:
        x: ``[..., in]``.
        weight: ``[in, out]`` where ``refusal`` accepts it.
        bias: ``[out]`` where ``refusal`` accepts it.
        nodes: The MatMul, the Add behind it, and what adds an adapter.
        lora: The last of these.
    """

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    nodes: tuple[ir.Node, ...]
    lora: ir.Node | None = None


def linear_of(value: ir.Value | None) -> Linear | None:
    """The linear whose result ``value`` is, or None; the bias may be either operand of the addition."""
    lora = producer(value, "LoraAdd") or producer(value, "LoraAddBiased")
    if lora is not None:
        inner = linear_of(lora.inputs[0])
        return None if inner is None else replace(inner, nodes=(*inner.nodes, lora), lora=lora)
    addition = producer(value, "Add")
    operands = [value] if addition is None else list(addition.inputs)
    for product, bias in zip(operands, [None] if addition is None else reversed(operands), strict=True):
        matmul = producer(product, "MatMul")
        if matmul is not None and matmul.inputs[0] is not None and matmul.inputs[1] is not None:
            nodes = (matmul,) if addition is None else (matmul, addition)
            return Linear(matmul.inputs[0], matmul.inputs[1], bias, nodes)
    return None


def columns(linear: Linear) -> int:
    """Outputs of a linear that ``refusal`` accepts."""
    assert linear.weight.shape is not None
    return int(linear.weight.shape.numpy()[1])


def refusal(linears: Sequence[Linear], between: Sequence[ir.Node] = ()) -> str | None:
    """Why these linears cannot become one; None when they can.

    They can when they read the same input, all weights are initializers, or all DequantizeLinear of initializers with
    equal types and attributes and a scale for each output, and all biases are initializers with a value for each
    output; and when nothing else reads what they and the nodes ``between`` make, which would keep them computed twice.
    """
    if len({id(linear.x) for linear in linears}) > 1:
        return "the linears read different inputs"
    made = [node.outputs[0] for linear in linears for node in linear.nodes] + [node.outputs[0] for node in between]
    if any(len(value.uses()) > 1 or value.is_graph_output() for value in made):
        return "a linear's result is read by something else too"
    if len({linear.bias is None for linear in linears}) > 1:
        return "some of the linears have a bias and some have none"
    return _weights_refusal([linear.weight for linear in linears]) or _biases_refusal(linears)


def _weights_refusal(weights: Sequence[ir.Value]) -> str | None:
    if any(weight.shape is None or len(weight.shape) != 2 for weight in weights):
        return "a weight is no matrix"
    if any(len(weight.uses()) > 1 for weight in weights):
        return "a weight is read by something else too, and would be stored twice"
    if all(weight.is_initializer() for weight in weights):
        return None
    nodes = [node for weight in weights if (node := producer(weight, "DequantizeLinear")) is not None]
    if len(nodes) < len(weights):
        return "some of the linears are quantized and some are not"
    if any(value is not None and value.const_value is None for node in nodes for value in node.inputs):
        return "a weight is not constant"
    if len({_kind(node) for node in nodes}) > 1:
        return "the linears have different schemes"
    return None if all(_is_per_output(node) for node in nodes) else "the linears' scales are not one per output"


def _biases_refusal(linears: Sequence[Linear]) -> str | None:
    if all(linear.bias is None or _is_bias(linear.bias, linear.weight) for linear in linears):
        return None
    return "an addend is no constant vector with one value per output"


def _is_bias(bias: ir.Value, weight: ir.Value) -> bool:
    return bias.is_initializer() and weight.shape is not None and bias.shape == weight.shape[1:]


def _is_per_output(node: ir.Node) -> bool:
    scale = node.inputs[1]
    rank = len(scale.shape) if scale is not None and scale.shape is not None else 0
    return (rank, attribute(node, "axis", 1)) == ((2, 0) if attribute(node, "block_size", 0) else (1, 1))


def _kind(node: ir.Node) -> tuple[Any, ...]:
    tensors = [value.const_value for value in node.inputs if value is not None]
    dtypes = tuple((tensor.dtype, bits_of(tensor)) for tensor in tensors if tensor is not None)
    return (dtypes, attribute(node, "axis", 1), attribute(node, "block_size", 0))


def pack(op: Any, linears: Sequence[Linear], module: str) -> Any:
    """The results of all linears, which ``refusal`` accepts, side by side along the last axis.

    Args:
        op: The rewriter's builder.
        linears: In the order of their columns.
        module: Names the new initializers.
    """
    weight = _pack_weights(op, [linear.weight for linear in linears], module)
    packed = op.MatMul(linears[0].x, weight, _outputs=[f"{module}.output"])
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if biases:
        packed = op.Add(packed, _joined(op, biases, name=f"{module}.bias"), _outputs=[f"{module}.biased"])
    return _adapted(op, packed, linears, module)


def _adapted(op: Any, packed: Any, linears: Sequence[Linear], module: str) -> Any:
    """``packed`` with the changes of adapters, each in the columns of its linear."""
    first = 0
    for number, linear in enumerate(linears):
        if linear.lora is not None:
            _, *others, part = linear.lora.inputs
            assert part is not None
            assert part.const_value is not None
            moved = part.const_value.numpy() + np.array([0, 0, 0, first, 0, 0])
            name = f"{module}.lora.{number}"
            inputs = (packed, *others, op.initializer(ir.tensor(moved, name=name), name=name))
            names = [f"{module}.adapted.{number}"]
            kind = linear.lora.op_type
            packed = getattr(op, kind)(*inputs, _domain="llmopt", _outputs=names, **linear.lora.attributes)
        first += columns(linear)
    return packed


def _pack_weights(op: Any, weights: Sequence[ir.Value], module: str) -> Any:
    """One weight ``[in, sum of out]`` from weights ``[in, out]``."""
    if all(weight.is_initializer() for weight in weights):
        return _joined(op, weights, name=f"{module}.weight")
    nodes = [node for weight in weights if (node := weight.producer()) is not None]
    suffixes = ("weight", "weight_scale", "weight_zero_point")
    inputs = [
        _joined(op, [value for value in values if value is not None], name=f"{module}.{suffix}")
        for suffix, values in zip(suffixes, zip(*(node.inputs for node in nodes), strict=True), strict=False)
    ]
    return op.DequantizeLinear(*inputs, _outputs=[f"{module}.weight_dequantized"], **nodes[0].attributes)


def _joined(op: Any, values: Sequence[ir.Value], *, name: str) -> Any:
    """An initializer with the values side by side along their last axis, the outputs; read when it is saved."""
    tensors = [tensor for value in values if (tensor := value.const_value) is not None]
    first = tensors[0]
    shape = [*first.shape.numpy()[:-1], sum(tensor.shape.numpy()[-1] for tensor in tensors)]
    joined = lazy_tensor(
        name,
        first.dtype,
        shape,
        lambda: np.concatenate([tensor.numpy() for tensor in tensors], axis=-1),
        bits=bits_of(first),
    )
    return op.initializer(joined, name=name)
