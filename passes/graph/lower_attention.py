"""Lower rope and slot attention to ONNX Runtime's GroupQueryAttention, which appends to the cache in place."""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.passes.graph._rules import apply_rules, attribute, producer

__all__ = ["LowerAttention"]

_HEAD_MULTIPLE = 8
"""The kernel takes heads of a multiple of this many columns."""

_ROTARY_MULTIPLE = 16
"""The kernel rotates whole vectors: of a head's columns it takes a multiple of this."""


class _AttentionRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """``llmopt::SlotAttention`` -> ``com.microsoft::GroupQueryAttention``.

    Takes along the RotaryEmbedding of query and key, a packed query, key and value, and a sliding window.
    """

    def __init__(self, ids: ir.Value | None) -> None:
        super().__init__(name="lower_attention", remove_nodes=False)
        self._ids = ids

    def pattern(self, op: Any, past_key: Any, past_value: Any, lengths: Any) -> Any:
        query, key, value = (pattern.Var(name) for name in ("query", "key", "value"))
        return op.SlotAttention(
            query, key, value, past_key, past_value, lengths,
            _domain="llmopt",
            _allow_other_inputs=True,
            _allow_other_attributes=True,
            _outputs=["attended", "present_key", "present_value"],
        )  # fmt: skip

    def check(self, context: Any, attended: ir.Value, past_key: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        if self._ids is None:
            return result.fail("the graph has no input_ids to count tokens by")
        columns = past_key.shape[3] if past_key.shape is not None else None
        if not isinstance(columns, int) or columns % _HEAD_MULTIPLE:
            return result.fail(f"the kernel takes heads of a multiple of {_HEAD_MULTIPLE} columns, not of {columns}")
        node = attended.producer()
        assert node is not None
        if _mask(node) is not None and _window(node) is None:
            return result.fail("the kernel takes a sliding window, not any mask")
        if _mask(node) is None and not attribute(node, "is_causal", 0):
            return result.fail("the kernel's attention is causal")
        return result

    def rewrite(self, op: Any, lengths: ir.Value, attended: ir.Value, **matched: Any) -> Any:
        node = attended.producer()
        assert node is not None
        caches = (matched["past_key"], matched["past_value"])
        # Made alike for every layer and merged into one by the common subexpression elimination that follows.
        tokens = op.Shape(self._ids, start=1, end=2, _outputs=["tokens"])
        lengths = op.Add(lengths, tokens, _outputs=["lengths"])
        total = op.Cast(lengths, to=ir.DataType.INT32.value, _outputs=["lengths.int32"])
        last = op.Sub(total, op.Constant(value=ir.tensor(1, dtype=ir.DataType.INT32)), _outputs=["last_positions"])
        longest = op.ReduceMax(total, keepdims=0, _outputs=["longest"])
        inputs, tables = list(node.inputs[:3]), []
        if (rope := _rope(node)) is not None:
            inputs[:2] = [one.inputs[0] for one in rope]
            tables = list(rope[0].inputs[1:3])
        if scales := node.inputs[7:]:
            tables = [*(tables or [None, None]), None, None, None, *scales]  # no positions, no bias, no sink
        return op.GroupQueryAttention(
            *_packed(inputs), *caches, last, longest, *tables, _domain="com.microsoft", _outputs=3, **_attributes(node)
        )


def _attributes(node: ir.Node) -> dict[str, Any]:
    """Of GroupQueryAttention, which takes 0 and -1 for no soft cap and no window."""
    chosen: dict[str, Any] = {name: node.attributes[name] for name in ("num_heads", "kv_num_heads", "scale")}
    softcap = node.attributes["softcap"].as_float() if "softcap" in node.attributes else 0.0
    if softcap:
        chosen["softcap"] = softcap
    if (window := _window(node)) is not None:
        chosen["local_window_size"] = attribute(window, "window", -1)
    if len(node.inputs) > 7:
        chosen |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    if _rope(node) is not None:
        chosen |= {"do_rotary": 1, "rotary_interleaved": 0}
    return chosen


def _mask(node: ir.Node) -> ir.Value | None:
    return node.inputs[6] if len(node.inputs) > 6 else None


def _window(node: ir.Node) -> ir.Node | None:
    """The sliding window that the attention's mask is, if it is one."""
    mask = producer(_mask(node), "SlidingWindowMask")
    return mask if mask is not None and _are_positions(mask.inputs[0], node.inputs[5]) else None


def _are_positions(value: ir.Value | None, lengths: ir.Value | None) -> bool:
    """Whether ``value`` counts on from the cached tokens, as the kernel does by itself."""
    addition = producer(value, "Add")
    if addition is None:
        return False
    first, count = (
        producer(operand, kind) for operand, kind in zip(addition.inputs, ("Unsqueeze", "Range"), strict=True)
    )
    return first is not None and first.inputs[0] is lengths and count is not None and _is_zero(count.inputs[0])


def _is_zero(value: ir.Value | None) -> bool:
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    return constant is not None and not constant.numpy().any()


def _rope(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """The RotaryEmbedding of query and key, if both are the same and the kernel can do it."""
    query, key = (producer(x, "RotaryEmbedding") for x in node.inputs[:2])
    if query is None or key is None or list(query.inputs[1:]) != list(key.inputs[1:]):
        return None
    if any(attribute(rope, "interleaved", 0) for rope in (query, key)):
        return None
    if not _are_positions(query.inputs[3], node.inputs[5]):
        return None
    cos = query.inputs[1]
    columns = cos.shape[1] if cos is not None and cos.shape is not None else None
    return (query, key) if isinstance(columns, int) and columns * 2 % _ROTARY_MULTIPLE == 0 else None


def _packed(inputs: Any) -> tuple[ir.Value | None, ir.Value | None, ir.Value | None]:
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
        if left := [str(node.outputs[0].name) for node in graph.graph if node.op_type == "SlotAttention"]:
            context.fallback(f"{len(left)} attentions take time in proportion to the cache's capacity: {left[0]}")
        if separate := [str(node.name) for node in graph.graph if node.op_type == "RotaryEmbedding"]:
            context.note(f"{len(separate)} rotary embeddings stay operators of their own")
        return graph
