"""Fuse the query, key and value projections of an attention into one matrix multiplication."""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.passes.graph._packing import Linear, columns, linear_of, pack, refusal
from llmopt.passes.graph._rules import apply_rules, producer

__all__ = ["FuseQkv"]

_BETWEEN = ("Reshape", "RMSNormalization", "LayerNormalization", "RotaryEmbedding")
"""What may lie between a projection and the attention: operators whose first input is the data."""


class _QkvRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """Three linears of one input into ``SlotAttention`` -> one linear and a Split.

    Norms of heads and rotary embeddings between them and the attention stay where they are.
    """

    def __init__(self) -> None:
        super().__init__(name="fuse_qkv", remove_nodes=False)

    def pattern(self, op: Any, query: Any, key: Any, value: Any) -> Any:
        return op.SlotAttention(
            query, key, value,
            _domain="llmopt",
            _allow_other_inputs=True,
            _allow_other_attributes=True,
            _outputs=["attended", "present_key", "present_value"],
        )  # fmt: skip

    def check(self, context: Any, attended: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        chains = _chains(attended)
        splits = [producer(value, "Split") for value, _ in chains]
        if splits[0] is not None and all(split is splits[0] for split in splits):
            return result.fail()  # packed already
        linears = [linear for value, _ in chains if (linear := linear_of(value)) is not None]
        if len(linears) < len(chains):
            return result.fail("query, key and value are not each the product of a linear")
        reason = refusal(linears, [node for _, between in chains for node in between])
        return result.fail(reason) if reason else result

    def rewrite(self, op: Any, attended: ir.Value, **_: Any) -> Any:
        node = attended.producer()
        assert node is not None
        chains = _chains(attended)
        linears: list[Linear] = [linear for value, _ in chains if (linear := linear_of(value)) is not None]
        module = f"{str(attended.name).partition('.attention.output')[0]}.self_attn.qkv_proj"
        sizes = op.Constant(value_ints=[columns(linear) for linear in linears])
        names = [f"{module}.{part}" for part in ("query", "key", "value")]
        parts = op.Split(pack(op, linears, module), sizes, axis=-1, _outputs=names)
        inputs = [_again(op, part, between) for part, (_, between) in zip(parts, chains, strict=True)]
        return op.SlotAttention(*inputs, *node.inputs[3:], _domain="llmopt", _outputs=3, **node.attributes)


def _chains(attended: ir.Value) -> list[tuple[ir.Value | None, tuple[ir.Node, ...]]]:
    """What query, key and value start from, and the operators between it and the attention, in order of the data."""
    node = attended.producer()
    assert node is not None
    return [_chain(value) for value in node.inputs[:3]]


def _chain(value: ir.Value | None) -> tuple[ir.Value | None, tuple[ir.Node, ...]]:
    between: list[ir.Node] = []
    while value is not None and (node := value.producer()) is not None and node.op_type in _BETWEEN:
        between.insert(0, node)
        value = node.inputs[0]
    return value, tuple(between)


def _again(op: Any, x: Any, nodes: tuple[ir.Node, ...]) -> Any:
    """The same operators on ``x``; what they make keeps its names."""
    for node in nodes:
        x = getattr(op, node.op_type)(x, *node.inputs[1:], _outputs=[node.outputs[0].name], **node.attributes)
    return x


class FuseQkv(GraphPass):
    """One matrix multiplication instead of three: the input is read and rounded once, and threads share more rows."""

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        apply_rules(graph, [_QkvRule.rule()], context)
        return graph
