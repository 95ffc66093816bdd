"""Lower slot attention to ONNX Runtime's GroupQueryAttention, which appends to the cache in place."""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.passes.graph._rules import apply_rules, producer

__all__ = ["LowerAttention"]


class _AttentionRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """``llmopt::SlotAttention`` -> ``com.microsoft::GroupQueryAttention``, taking packed qkv where there is one."""

    def __init__(self, ids: ir.Value | None) -> None:
        super().__init__(name="lower_attention")
        self._ids = ids

    def pattern(self, op: Any, past_key: Any, past_value: Any, lengths: Any, cos: Any, sin: Any) -> Any:
        query, key, value = (pattern.Var(name) for name in ("query", "key", "value"))
        return op.SlotAttention(
            query, key, value, past_key, past_value, lengths, cos, sin,
            _domain="llmopt",
            _allow_other_attributes=True,
            _outputs=["attended", "present_key", "present_value"],
        )  # fmt: skip

    def check(self, context: Any, **_: Any) -> Any:
        result = pattern.MatchResult()
        return result if self._ids is not None else result.fail("the graph has no input_ids to count tokens by")

    def rewrite(self, op: Any, lengths: ir.Value, attended: ir.Value, **matched: Any) -> Any:
        node = attended.producer()
        assert node is not None
        query, key, value = _packed(node.inputs[:3])
        caches = (matched["past_key"], matched["past_value"])
        # Made alike for every layer and merged into one by the common subexpression elimination that follows.
        tokens = op.Shape(self._ids, start=1, end=2)
        total = op.Cast(op.Add(lengths, tokens), to=ir.DataType.INT32.value)
        last = op.Sub(total, op.Constant(value=ir.tensor(1, dtype=ir.DataType.INT32)))
        longest = op.ReduceMax(total, keepdims=0)
        return op.GroupQueryAttention(
            query, key, value, *caches, last, longest, matched["cos"], matched["sin"],
            _domain="com.microsoft",
            _outputs=3,
            num_heads=node.attributes["num_heads"],
            kv_num_heads=node.attributes["kv_num_heads"],
            scale=node.attributes["scale"],
            do_rotary=1,
            rotary_interleaved=0,
        )  # fmt: skip


def _packed(inputs: Any) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
    """The three inputs, or the value whose Split they are, in order and complete, and nothing else."""
    query, key, value = inputs
    split = producer(query, "Split")
    if split is not None and list(split.outputs) == [query, key, value] and split.inputs[0] is not None:
        return split.inputs[0], None, None
    return query, key, value


class LowerAttention(GraphPass):
    """Rope, cache update and attention in one kernel whose cost does not depend on the cache's capacity."""

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        ids = next((value for value in graph.graph.inputs if value.name == "input_ids"), None)
        apply_rules(graph, [_AttentionRule.rule(ids)], context)
        return graph
