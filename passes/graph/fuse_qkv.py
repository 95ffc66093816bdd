"""Fuse the query, key and value projections of an attention into one matrix multiplication."""

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.passes.graph._packing import columns, pack_biases, pack_weights, refusal
from llmopt.passes.graph._rules import apply_rules, producer

__all__ = ["FuseQkv"]

_BETWEEN = ("Reshape", "RMSNormalization", "LayerNormalization", "RotaryEmbedding")
"""What may lie between a projection and the attention: operators whose first input is the data."""


@dataclass(frozen=True, slots=True)
class _Projection:
    """A linear on its way to the attention.

    Attributes:
        x, weight, bias: ``x`` times weight plus bias.
        between: The operators between the linear and the attention, in order of the data.
        made: What it and these operators make.
    """

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    between: tuple[ir.Node, ...]
    made: tuple[ir.Value, ...]


def _source(value: ir.Value | None) -> tuple[ir.Value | None, tuple[ir.Node, ...]]:
    """What a projection's operators start from, and these operators in order of the data."""
    between: list[ir.Node] = []
    while value is not None and (node := value.producer()) is not None and node.op_type in _BETWEEN:
        between.insert(0, node)
        value = node.inputs[0]
    return value, tuple(between)


def _projection(value: ir.Value | None) -> _Projection | None:
    """The linear that ``value`` comes from, or None when it does not come from one."""
    product, between = _source(value)
    bias = None
    if (addition := producer(product, "Add")) is not None:
        product, bias = sorted(addition.inputs, key=lambda operand: producer(operand, "MatMul") is None)
    matmul = producer(product, "MatMul")
    if matmul is None or matmul.inputs[0] is None or matmul.inputs[1] is None:
        return None
    nodes = (matmul, *([] if addition is None else [addition]), *between)
    return _Projection(matmul.inputs[0], matmul.inputs[1], bias, between, tuple(node.outputs[0] for node in nodes))


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

    def check(self, context: Any, query: ir.Value, key: ir.Value, value: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        if _is_packed(query, key, value):
            return result.fail()
        found = [_projection(one) for one in (query, key, value)]
        projections = [projection for projection in found if projection is not None]
        if len(projections) < len(found):
            return result.fail("query, key and value are not each the product of a linear")
        if len({id(projection.x) for projection in projections}) > 1:
            return result.fail("the linears read different inputs")
        if any(len(value.uses()) > 1 or value.is_graph_output() for one in projections for value in one.made):
            return result.fail("a linear's result is read by something else too")
        biases = [projection.bias for projection in projections]
        if any(bias is None for bias in biases) and any(bias is not None for bias in biases):
            return result.fail("some of the linears have a bias and some have none")
        reason = refusal([projection.weight for projection in projections], biases)
        return result.fail(reason) if reason else result

    def rewrite(self, op: Any, attended: ir.Value, **matched: Any) -> Any:
        node = attended.producer()
        assert node is not None
        found = [_projection(matched[name]) for name in ("query", "key", "value")]
        projections = [projection for projection in found if projection is not None]
        module = f"{str(attended.name).removesuffix('.attention.output')}.self_attn.qkv_proj"
        packed = op.MatMul(projections[0].x, pack_weights(op, [one.weight for one in projections], module))
        if biases := [one.bias for one in projections if one.bias is not None]:
            packed = op.Add(packed, pack_biases(op, biases, module))
        sizes = op.Constant(value_ints=[columns(one.weight) for one in projections])
        parts = op.Split(packed, sizes, axis=-1, _outputs=len(projections))
        inputs = [_again(op, part, one.between) for part, one in zip(parts, projections, strict=True)]
        return op.SlotAttention(*inputs, *node.inputs[3:], _domain="llmopt", _outputs=3, **node.attributes)


def _is_packed(*values: ir.Value) -> bool:
    """Whether the values are already parts of one."""
    splits = [producer(_source(value)[0], "Split") for value in values]
    return splits[0] is not None and all(split is splits[0] for split in splits)


def _again(op: Any, x: Any, nodes: tuple[ir.Node, ...]) -> Any:
    """The same operators on ``x``."""
    for node in nodes:
        x = getattr(op, node.op_type)(x, *node.inputs[1:], **node.attributes)
    return x


class FuseQkv(GraphPass):
    """One matrix multiplication instead of three: the input is read and rounded once, and threads share more rows."""

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        apply_rules(graph, [_QkvRule.rule()], context)
        return graph
