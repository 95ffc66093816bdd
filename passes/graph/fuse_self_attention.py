"""Fuse the attention that an encoder's graph writes in several operators into one."""

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.passes.graph._rules import apply_rules, producer

__all__ = ["FuseSelfAttention"]

_HEADS_FIRST, _HEADS_BEHIND, _LAST_TWO = [0, 2, 1, 3], [0, 2, 3, 1], [0, 1, 3, 2]


@dataclass(frozen=True, slots=True)
class _Scores:
    """What a softmax is taken of: ``query @ key^T * scale``, plus ``added``.

    Attributes:
        query: float32 ``[batch, heads, tokens, head_dim]``.
        key: The Transpose that makes ``[batch, heads, head_dim, tokens]``.
        added: Masks and biases that are added, the last one first.
    """

    query: ir.Value
    key: ir.Node
    scale: float
    added: tuple[ir.Value, ...]


class _AttentionRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """``softmax(q @ k^T * scale + mask) @ v`` with its heads side by side again -> ``Attention``.

    The operator takes and gives ``[batch, tokens, heads * head_dim]`` where query, key and value come from such a
    matrix by Reshape and Transpose alone; else its inputs are those with the heads first.
    """

    def __init__(self) -> None:
        super().__init__(name="fuse_self_attention", remove_nodes=False)

    def pattern(self, op: Any, scores: Any, value: Any, shape: Any) -> Any:
        attended = op.MatMul(op.Softmax(scores, axis=-1), value)
        return op.Reshape(
            op.Transpose(attended, perm=_HEADS_FIRST), shape, _allow_other_attributes=True, _outputs=["output"]
        )

    def check(self, context: Any, scores: ir.Value, output: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        found = _scores(scores)
        if isinstance(found, str):
            return result.fail(found)
        if output.shape is None or len(output.shape) != 3:
            return result.fail("the result is no vector of each token")
        dims = None if found.query.shape is None else found.query.shape
        if dims is None or not isinstance(dims[1], int) or not isinstance(dims[3], int):
            return result.fail("the number of heads or their width is not known")
        return result

    def rewrite(self, op: Any, scores: ir.Value, value: ir.Value, shape: ir.Value, output: ir.Value) -> Any:
        found = _scores(scores)
        assert isinstance(found, _Scores)
        mask = _sum(op, found.added)
        rows = [_rows(found.query), _rows(found.key.outputs[0]), _rows(value)]
        heads = found.query.shape[1]  # type: ignore[index]  # known, says check
        if all(row is not None for row in rows):
            sizes = {"q_num_heads": heads, "kv_num_heads": heads}
            return op.Attention(*rows, mask, scale=found.scale, **sizes, _outputs=[str(output.name)])
        key = found.key.inputs[0]
        if _perm(found.key) == _HEADS_BEHIND:
            key = op.Transpose(key, perm=_HEADS_FIRST)
        attended = op.Attention(found.query, key, value, mask, scale=found.scale)
        node = output.producer()
        assert node is not None
        return op.Reshape(op.Transpose(attended, perm=_HEADS_FIRST), shape, **node.attributes)


def _scores(value: ir.Value) -> _Scores | str:
    """The parts of the scores, or why they are none."""
    added: list[ir.Value] = []
    while (addition := producer(value, "Add")) is not None:
        first, second = addition.inputs
        if first is None or second is None:
            return "an addition lacks an operand"
        value, other = (first, second) if _leads_to_product(first) else (second, first)
        added.append(other)
    scale = 1.0
    scaling = producer(value, "Mul") or producer(value, "Div")
    if scaling is not None:
        value, factor = scaling.inputs  # type: ignore[assignment]
        number = None if factor is None or factor.const_value is None else factor.const_value.numpy()
        if number is None or number.size != 1:
            return "scores are scaled by something else than a number"
        scale = float(number.reshape(())) if scaling.op_type == "Mul" else 1 / float(number.reshape(()))
    product = producer(value, "MatMul")
    transpose = None if product is None else producer(product.inputs[1], "Transpose")
    if product is None or product.inputs[0] is None or transpose is None:
        return "the softmax is not of a query times a transposed key"
    if _perm(transpose) not in (_HEADS_BEHIND, _LAST_TWO):
        return "the key is transposed in another way"
    return _Scores(product.inputs[0], transpose, scale, tuple(added))


def _leads_to_product(value: ir.Value) -> bool:
    """Whether the product of query and key is behind additions and scalings of first operands."""
    node = value.producer()
    while node is not None and node.op_type in ("Add", "Mul", "Div"):
        following = node.inputs[0]
        node = None if following is None else following.producer()
    return node is not None and node.op_type == "MatMul"


def _sum(op: Any, added: tuple[ir.Value, ...]) -> Any:
    """What is added to scores, as the kernel takes it: a row for each query."""
    if not added:
        return None
    total, *others = added
    for other in others:
        total = op.Add(other, total)
    if total.shape is not None and total.shape[-2] == 1:
        # The kernel does not repeat one row for all queries.
        tokens = op.Shape(total, start=3, end=4)
        ones = op.Constant(value_ints=[1, 1])
        total = op.Expand(total, op.Concat(ones, tokens, op.Constant(value_ints=[1]), axis=0))
    return total


def _rows(value: ir.Value) -> ir.Value | None:
    """The ``[batch, tokens, columns]`` whose heads ``value`` has in front, or behind that as a key does."""
    transpose = producer(value, "Transpose")
    if transpose is None or _perm(transpose) not in (_HEADS_FIRST, _HEADS_BEHIND):
        return None
    reshape = producer(transpose.inputs[0], "Reshape")
    rows = None if reshape is None else reshape.inputs[0]
    return rows if rows is not None and rows.shape is not None and len(rows.shape) == 3 else None


def _perm(node: ir.Node) -> list[int]:
    return list(node.attributes["perm"].as_ints())


class FuseSelfAttention(GraphPass):
    """Scores are never written to memory as a whole, and heads are not moved to the front and back by copies."""

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        apply_rules(graph, [_AttentionRule.rule()], context)
        return graph
