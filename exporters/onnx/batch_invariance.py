"""Tells whether an engine gives a sequence the same bits whatever else is in its batch, by the kernels it uses."""

import onnx_ir as ir

from llmopt.optimizer import kernels
from llmopt.optimizer.instructions import LARGEST_BLOCK, host_instructions

__all__ = ["batch_dependent"]

_INTEGER_ACTIVATIONS = 4
"""The accuracy level of MatMulNBits that rounds rows to integers; at others, rows depend on how many there are."""

_INVARIANT = frozenset(
    {"FusedMatMul", "GatherBlockQuantized", "GroupQueryAttention", "MatMulIntegerToFloat", "MoE", "QMoE", "QuickGelu"}
    | {"RotaryEmbedding", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}
)
"""ONNX Runtime's own operators whose kernels compute a row from that row alone, as the lowering uses them."""

_MIXING = frozenset({"Attention", "Conv", "DynamicQuantizeLinear", "Einsum", "Gemm", "LSTM", "MatMulInteger", "Scan"})
"""Standard operators that mix rows, or whose kernels do not promise to sum one row as several. What is not here makes
single elements or rows, or is MatMul, whose float kernels were measured (docs/architecture.md)."""


def batch_dependent(model: ir.Model) -> list[str]:
    """The nodes of a lowered graph that may compute a row differently when others are beside it.

    Returns:
        For each, ``operator name: why``; empty where results are the same bits alone and in any batch.
    """
    found = []
    for node in model.graph.all_nodes():
        if node.domain == "com.microsoft" and node.op_type == "MatMulNBits":
            reason = _blocks(node)
        elif node.domain == kernels.DOMAIN:
            reason = None  # each computes a row from that row alone, as its source says and its tests show
        elif node.domain == "com.microsoft":
            reason = None if node.op_type in _INVARIANT else "its kernel was not measured"
        else:
            reason = "its kernel may sum rows together" if node.op_type in _MIXING else _second_operand(node)
        if reason is not None:
            found.append(f"{node.op_type} {node.name or node.outputs[0].name}: {reason}")
    return found


def _second_operand(node: ir.Node) -> str | None:
    """Why a product depends on the number of rows, if its second operand is no weight: one row has another kernel."""
    if node.op_type != "MatMul" or all(_is_constant(value) for value in node.inputs[1:]):
        return None
    return "its second operand is computed"


def _is_constant(value: ir.Value | None) -> bool:
    if value is None or value.is_initializer():
        return True
    node = value.producer()
    return node is not None and all(_is_constant(each) for each in node.inputs)


def _blocks(node: ir.Node) -> str | None:
    """Why a product with packed weights depends on the number of rows, if it does."""
    bits, block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 0)
    if node.attributes.get_int("accuracy_level", 0) != _INTEGER_ACTIVATIONS:
        return "it multiplies floats"
    largest = LARGEST_BLOCK[host_instructions()].get(bits, 0)
    return f"blocks of {block} columns in {bits} bits" if block > largest else None
