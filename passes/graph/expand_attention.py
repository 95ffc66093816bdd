"""Write attention that TensorRT has no kernel for as products, a mask and a softmax."""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.passes.graph._rules import apply_rules

__all__ = ["ExpandAttention"]

_HEAD_MULTIPLE = 16
"""TensorRT's kernels take heads of a multiple of so many columns."""
_NOWHERE = -3e4
"""A score that leaves nothing behind a softmax, and is a number in float16."""


class _ExpandRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """``Attention`` over a cache, with a softcap or with heads of an odd width -> ``MatMul, ..., Softmax, MatMul``.

    The query heads that share a key head become rows of one product, so that no key is repeated.
    """

    def __init__(self) -> None:
        super().__init__(name="expand_attention", remove_nodes=False)

    def pattern(self, op: Any) -> Any:
        return op.Attention(_allow_other_inputs=True, _allow_other_attributes=True, _outputs=["attended"])

    def check(self, context: Any, attended: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        node = attended.producer()
        assert node is not None
        query, key = node.inputs[0], node.inputs[1]
        if key is None or key.shape is None or len(key.shape) != 4 or len(node.inputs) < 7:
            return result.fail()  # no attention over a cache
        if not _softcap(node) and _size(key, 3) % _HEAD_MULTIPLE == 0:
            return result.fail()  # there is a kernel
        if query is None or query.shape is None or not isinstance(query.shape[1], int):
            return result.fail("the number of heads is not known")
        return result

    def rewrite(self, op: Any, attended: ir.Value) -> Any:
        node = attended.producer()
        assert node is not None
        query, key, value, mask, _, _, lengths = node.inputs
        assert key is not None
        heads, kv_heads, width = _size(query, 1), _size(key, 1), _size(key, 3)
        tokens = op.Shape(query, start=2, end=3)

        def ints(*values: int) -> Any:
            return op.Constant(value_ints=list(values))

        def number(value: float) -> Any:
            return op.Constant(value=ir.tensor(np.float32(value)))

        scale = node.attributes["scale"].as_float()
        rows = op.Reshape(op.Mul(query, number(scale)), ints(0, kv_heads, -1, width))
        scores = op.MatMul(rows, op.Transpose(key, perm=[0, 1, 3, 2]))
        if cap := _softcap(node):
            scores = op.Mul(op.Tanh(op.Div(scores, number(cap))), number(cap))
        by_head = op.Concat(ints(0, heads), tokens, ints(-1), axis=0)
        if mask is None:
            mask = _causal_mask(op, key, lengths, tokens, ints)
        shares = op.Softmax(op.Where(mask, op.Reshape(scores, by_head), number(_NOWHERE)), axis=-1)
        together = op.Concat(ints(0, kv_heads, -1), op.Shape(key, start=2, end=3), axis=0)
        mixed = op.MatMul(op.Reshape(shares, together), value)
        return op.Reshape(mixed, op.Concat(ints(0, heads), tokens, ints(width), axis=0))


def _causal_mask(op: Any, key: ir.Value, lengths: Any, tokens: Any, ints: Any) -> Any:
    """Which cached tokens each token sees, bool ``[batch, 1, tokens, capacity]``: all up to itself."""
    zero, one = (op.Constant(value_int=number) for number in (0, 1))
    capacity = op.Squeeze(op.Shape(key, start=2, end=3))
    cached = op.Range(zero, capacity, one)
    first = op.Unsqueeze(op.Sub(lengths, tokens), ints(1))
    position = op.Add(first, op.Range(zero, op.Squeeze(tokens), one))
    return op.LessOrEqual(cached, op.Unsqueeze(position, ints(1, 3)))


def _softcap(node: ir.Node) -> float:
    found = node.attributes.get("softcap")
    return 0.0 if found is None else found.as_float()


def _size(value: ir.Value | None, axis: int) -> int:
    assert value is not None
    assert value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int)
    return size


class ExpandAttention(GraphPass):
    """For soft caps (Gemma 2), which TensorRT's attention does not have, and for heads that fit none of its kernels."""

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``. Each expansion is a fallback: it stores the scores of all tokens."""
        expanded = [node for node in graph.graph if node.op_type == "Attention"]
        apply_rules(graph, [_ExpandRule.rule()], context)
        left = sum(node.op_type == "Attention" for node in graph.graph)
        if count := len(expanded) - left:
            context.fallback(f"attention of {count} layers has no kernel in TensorRT and is computed in several steps")
        return graph
