"""Lower a quantized table that embedding and head share, so that it is stored once."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.passes.graph._nbits import BlockWeight, block_weight, matmul_nbits
from llmopt.passes.graph._rules import apply_rules, attribute

__all__ = ["LowerEmbedding"]


class _TiedRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """``Gather(DequantizeLinear(q), ids)`` with ``MatMul(x, Transpose(DequantizeLinear(q)))``: both from one ``q``."""

    def pattern(self, op: Any, ids: Any, x: Any) -> Any:
        table = op.DequantizeLinear(_allow_other_inputs=True, _allow_other_attributes=True, _outputs=["table"])
        return op.Gather(table, ids, axis=0), op.MatMul(x, op.Transpose(table, perm=[1, 0]))

    def check(self, context: Any, x: ir.Value, table: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        reason = self.refusal(x, table)
        return result.fail(reason) if reason else result

    def refusal(self, x: ir.Value, table: ir.Value) -> str | None:
        """Why this rule does not apply."""
        raise NotImplementedError


def _inputs(value: ir.Value) -> Sequence[ir.Value | None]:
    node = value.producer()
    assert node is not None
    return node.inputs


def _is_rounded(x: ir.Value) -> bool:
    node = x.producer()
    return node is not None and node.op_type == "QuantizeDequantizePerToken"


class _PerChannelRule(_TiedRule):
    """W8A8: the embedding gathers rows of integers, and the head multiplies with their transpose.

    ONNX Runtime folds the transposition when it loads the engine, so the file holds the table once.
    """

    def refusal(self, x: ir.Value, table: ir.Value) -> str | None:
        node = table.producer()
        assert node is not None
        values = node.inputs[0]
        if not _is_rounded(x):
            return "the head's activations are not quantized"
        if values is None or values.const_value is None or values.dtype != ir.DataType.INT8 or len(node.inputs) != 2:
            return "the table is not symmetric int8"
        if attribute(node, "axis", 1) != 0 or attribute(node, "block_size", 0):
            return "the table's scales are not one per row"
        return None

    def rewrite(self, op: Any, ids: ir.Value, x: ir.Value, table: ir.Value) -> Any:
        values, scale = _inputs(table)
        scales = op.Unsqueeze(op.Gather(scale, ids, axis=0), op.Constant(value_ints=[-1]))
        embedded = op.Mul(op.Cast(op.Gather(values, ids, axis=0), to=ir.DataType.FLOAT.value), scales)
        return embedded, op.MatMul(x, op.DequantizeLinear(op.Transpose(values, perm=[1, 0]), scale, axis=1))


class _BlockRule(_TiedRule):
    """Weight-only: MatMulNBits and GatherBlockQuantized read the same packed blocks."""

    def refusal(self, x: ir.Value, table: ir.Value) -> str | None:
        node = table.producer()
        assert node is not None
        if _is_rounded(x):
            return "the head's activations are quantized"
        packed = block_weight(node, "table", transposed=True)
        if isinstance(packed, str):
            return packed
        if packed.k % packed.block:
            return f"{packed.k} columns are not a whole number of blocks of {packed.block}"
        return None

    def rewrite(self, op: Any, ids: ir.Value, x: ir.Value, table: ir.Value) -> Any:
        node = table.producer()
        assert node is not None
        name = str(table.name).removesuffix(".weight_dequantized")
        packed = block_weight(node, name, transposed=True)
        assert isinstance(packed, BlockWeight)
        logits = matmul_nbits(op, x, packed)
        values, *rest = _inputs(logits)[1:]
        flat = op.Reshape(values, op.Constant(value_ints=[packed.n, packed.k * packed.bits // 8]))
        embedded = op.GatherBlockQuantized(
            flat, ids, *rest,
            bits=packed.bits, block_size=packed.block, gather_axis=0, quantize_axis=1, _domain="com.microsoft",
        )  # fmt: skip
        return embedded, logits


class LowerEmbedding(GraphPass):
    """The embedding looks its rows up in the head's integers; a table in float is left as it is."""

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        apply_rules(graph, [_PerChannelRule.rule(), _BlockRule.rule()], context)
        return graph
