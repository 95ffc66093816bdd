"""Look embeddings up in integers, and store a quantized table that embedding and head share once."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern
from pydantic import Field

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.passes.graph._nbits import BlockWeight, Executor, block_weight, matmul_nbits
from llmopt.passes.graph._rules import apply_groups, attribute, producer

__all__ = ["LowerEmbedding"]


class _TableRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """A rule about one of the two readers of a DequantizeLinear table ``[vocabulary, columns]``."""

    def __init__(self, graph: ir.Graph, executor: Executor) -> None:
        super().__init__(remove_nodes=False)
        self._graph = graph
        self._executor = executor

    def table(self, op: Any) -> Any:
        """The table in a pattern."""
        return op.DequantizeLinear(_allow_other_inputs=True, _allow_other_attributes=True, _outputs=["table"])

    def check(self, context: Any, table: ir.Value, x: ir.Value | None = None, **_: Any) -> Any:
        result = pattern.MatchResult()
        reason = self.refusal(table, x)
        return result.fail(reason) if reason else result

    def refusal(self, table: ir.Value, x: ir.Value | None) -> str | None:
        """Why this rule does not apply; ``x`` is the head's input in rules about the head."""
        raise NotImplementedError

    def packed(self, table: ir.Value) -> BlockWeight | str:
        """The table in blocks, or why it has no such form."""
        node = table.producer()
        assert node is not None
        name = str(table.name).removesuffix(".weight_dequantized")
        return block_weight(node, name, transposed=True, fewest_bits=4, executor=self._executor)


class _ChannelHeadRule(_TableRule):
    """W8A8: the head multiplies with the transposed integers; ONNX Runtime transposes when it loads the engine."""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.MatMul(x, op.Transpose(self.table(op), perm=[1, 0]))

    def refusal(self, table: ir.Value, x: ir.Value | None) -> str | None:
        return _not_per_row_int8(table) if _is_rounded(x) else "the head's activations are not quantized"

    def rewrite(self, op: Any, x: ir.Value, table: ir.Value) -> Any:
        values, scale = _inputs(table)
        return op.MatMul(x, op.DequantizeLinear(op.Transpose(values, perm=[1, 0]), scale, axis=1))


class _ChannelEmbeddingRule(_TableRule):
    """A scale per row: only the rows that are looked up become floats."""

    def pattern(self, op: Any, ids: Any) -> Any:
        return op.Gather(self.table(op), ids, axis=0)

    def refusal(self, table: ir.Value, x: ir.Value | None) -> str | None:
        return _not_per_row_int8(table)

    def rewrite(self, op: Any, ids: ir.Value, table: ir.Value) -> Any:
        values, scale = _inputs(table)
        scales = op.Unsqueeze(op.Gather(scale, ids, axis=0), op.Constant(value_ints=[-1]))
        return op.Mul(op.Cast(op.Gather(values, ids, axis=0), to=ir.DataType.FLOAT.value), scales)


class _BlockHeadRule(_TableRule):
    """Weight-only: the head becomes MatMulNBits."""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.MatMul(x, op.Transpose(self.table(op), perm=[1, 0]))

    def refusal(self, table: ir.Value, x: ir.Value | None) -> str | None:
        if _is_rounded(x):
            return "the head's activations are quantized"
        packed = self.packed(table)
        if isinstance(packed, str):
            return packed
        return _padding(packed)

    def rewrite(self, op: Any, x: ir.Value, table: ir.Value) -> Any:
        packed = self.packed(table)
        assert isinstance(packed, BlockWeight)
        return matmul_nbits(op, x, packed, self._executor)


class _BlockEmbeddingRule(_TableRule):
    """Weight-only: GatherBlockQuantized reads the blocks that the head's rule has packed."""

    def pattern(self, op: Any, ids: Any) -> Any:
        return op.Gather(self.table(op), ids, axis=0)

    def refusal(self, table: ir.Value, x: ir.Value | None) -> str | None:
        packed = self.packed(table)
        if isinstance(packed, str):
            return packed
        shared = packed.values.name in self._graph.initializers
        return None if shared else "no head shares the table's blocks"

    def rewrite(self, op: Any, ids: ir.Value, table: ir.Value) -> Any:
        packed = self.packed(table)
        assert isinstance(packed, BlockWeight)
        tensors = (packed.values, packed.scales, packed.zero_points)
        return _gathered(
            op, ids, packed, [self._graph.initializers[str(tensor.name)] for tensor in tensors if tensor is not None]
        )


class _OwnBlockEmbeddingRule(_TableRule):
    """Weight-only, where no head reads the table: GatherBlockQuantized with blocks of its own."""

    def pattern(self, op: Any, ids: Any) -> Any:
        return op.Gather(self.table(op), ids, axis=0)

    def refusal(self, table: ir.Value, x: ir.Value | None) -> str | None:
        if len(table.uses()) > 1:
            return "something else reads the table too"
        packed = self.packed(table)
        if isinstance(packed, str):
            return packed
        return _padding(packed)

    def rewrite(self, op: Any, ids: ir.Value, table: ir.Value) -> Any:
        packed = self.packed(table)
        assert isinstance(packed, BlockWeight)
        tensors = (packed.values, packed.scales, packed.zero_points)
        inputs = [op.initializer(tensor, name=tensor.name) for tensor in tensors if tensor is not None]
        return _gathered(op, ids, packed, inputs)


def _gathered(op: Any, ids: ir.Value, packed: BlockWeight, inputs: Sequence[ir.Value]) -> Any:
    """The rows of ``ids``, float32, from the values ``[n, blocks, bytes]``, scales and zero points of ``inputs``."""
    flat = op.Reshape(inputs[0], op.Constant(value_ints=[packed.n, packed.k * packed.bits // 8]))
    return op.GatherBlockQuantized(
        flat, ids, *inputs[1:],
        bits=packed.bits, block_size=packed.block, gather_axis=0, quantize_axis=1, _domain="com.microsoft",
    )  # fmt: skip


def _padding(packed: BlockWeight) -> str | None:
    """Why the last block would be padded, or None when it is whole."""
    return f"{packed.k} columns are no whole number of blocks of {packed.block}" if packed.k % packed.block else None


def _inputs(value: ir.Value) -> Sequence[ir.Value | None]:
    node = value.producer()
    assert node is not None
    return node.inputs


def _is_rounded(x: ir.Value | None) -> bool:
    node = None if x is None else x.producer()
    return node is not None and node.op_type.startswith("QuantizeDequantize")


def _not_per_row_int8(table: ir.Value) -> str | None:
    """Why the table is not symmetric int8 with a scale per row, or None when it is."""
    node = table.producer()
    assert node is not None
    values = node.inputs[0]
    if values is None or values.const_value is None or values.dtype != ir.DataType.INT8 or len(node.inputs) != 2:
        return "the table is not symmetric int8"
    if attribute(node, "axis", 1) != 0 or attribute(node, "block_size", 0):
        return "the table's scales are not one per row"
    return None


class LowerEmbedding(GraphPass):
    """The embedding looks its rows up in integers, the head's where they share a table; a table in float is left."""

    executor: Executor = Field("cpu", description="Whose kernels read the table.")

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        kinds = (
            (_ChannelHeadRule, _BlockHeadRule),
            (_BlockEmbeddingRule, _ChannelEmbeddingRule),
            (_OwnBlockEmbeddingRule,),
        )
        apply_groups(graph, [[kind.rule(graph.graph, self.executor) for kind in group] for group in kinds], context)
        for node in graph.graph:
            table = producer(node.inputs[0], "DequantizeLinear") if node.op_type == "Gather" else None
            # FP8 has no kernel anywhere: lower_linear notes that it becomes float32 when the engine is loaded.
            values = None if table is None else table.inputs[0]
            if values is not None and values.dtype != ir.DataType.FLOAT8E4M3FN:
                context.fallback(
                    f"the embedding turns its whole table into floats in every call: {node.outputs[0].name}"
                )
        return graph
