"""Fuse the query, key and value projections of an attention into one matrix multiplication."""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.passes.graph._packing import pack_biases, pack_weights, refusal
from llmopt.passes.graph._rules import apply_rules

__all__ = ["FuseQkv"]

_NAMES = ("query", "key", "value")


class _QkvRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """Three MatMuls of one input into ``SlotAttention`` -> one MatMul and a Split."""

    def __init__(self, *, biased: bool) -> None:
        super().__init__(name="fuse_qkv with biases" if biased else "fuse_qkv")
        self._biased = biased

    def pattern(
        self, op: Any, x: Any, wq: Any, wk: Any, wv: Any, bq: Any = None, bk: Any = None, bv: Any = None
    ) -> Any:
        products = [op.MatMul(x, weight) for weight in (wq, wk, wv)]
        if self._biased:
            products = [op.Add(product, bias) for product, bias in zip(products, (bq, bk, bv), strict=True)]
        return op.SlotAttention(
            *products,
            _domain="llmopt",
            _allow_other_inputs=True,
            _allow_other_attributes=True,
            _outputs=["attended", "present_key", "present_value"],
        )

    def check(self, context: Any, wq: ir.Value, wk: ir.Value, wv: ir.Value, **matched: Any) -> Any:
        result = pattern.MatchResult()
        reason = refusal((wq, wk, wv), [matched.get(name) for name in ("bq", "bk", "bv")])
        return result.fail(reason) if reason else result

    def rewrite(self, op: Any, x: ir.Value, attended: ir.Value, **matched: Any) -> Any:
        node = attended.producer()
        assert node is not None
        weights = [matched[name] for name in ("wq", "wk", "wv")]
        module = f"{str(attended.name).removesuffix('.attention.output')}.self_attn.qkv_proj"
        packed = op.MatMul(x, pack_weights(op, weights, module))
        if self._biased:
            packed = op.Add(packed, pack_biases(op, [matched[name] for name in ("bq", "bk", "bv")], module))
        sizes = op.Constant(value_ints=[int(weight.shape[1]) for weight in weights])
        parts = op.Split(packed, sizes, axis=-1, _outputs=len(_NAMES))
        return op.SlotAttention(*parts, *node.inputs[3:], _domain="llmopt", _outputs=3, **node.attributes)


class FuseQkv(GraphPass):
    """One matrix multiplication instead of three: the input is read and rounded once, and threads share more rows."""

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        apply_rules(graph, [_QkvRule.rule(biased=True), _QkvRule.rule(biased=False)], context, commute=True)
        return graph
