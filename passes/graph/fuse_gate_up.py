"""Fuse the gate and up projections of a gated MLP into one matrix multiplication."""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.passes.graph._packing import pack_biases, pack_weights, refusal
from llmopt.passes.graph._rules import apply_rules

__all__ = ["FuseGateUp"]


class _GateUpRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """``silu(x·Wg) * (x·Wu)`` -> both products from one MatMul and a Split."""

    def __init__(self, *, biased: bool) -> None:
        super().__init__(name="fuse_gate_up with biases" if biased else "fuse_gate_up")
        self._biased = biased

    def pattern(self, op: Any, x: Any, wg: Any, wu: Any, bg: Any = None, bu: Any = None) -> Any:
        gate, up = op.MatMul(x, wg), op.MatMul(x, wu)
        if self._biased:
            gate, up = op.Add(gate, bg), op.Add(up, bu)
        return op.Mul(op.Mul(gate, op.Sigmoid(gate)), up, _outputs=["product"])

    def check(self, context: Any, wg: ir.Value, wu: ir.Value, **matched: Any) -> Any:
        result = pattern.MatchResult()
        if reason := refusal((wg, wu), [matched.get(name) for name in ("bg", "bu")]):
            return result.fail(reason)
        if wg.shape != wu.shape:
            return result.fail(f"gate and up differ in shape: {wg.shape} and {wu.shape}")
        return result

    def rewrite(self, op: Any, x: ir.Value, wg: ir.Value, wu: ir.Value, product: ir.Value, **matched: Any) -> Any:
        module = f"{str(product.name).removesuffix('.product')}.gate_up_proj"
        packed = op.MatMul(x, pack_weights(op, (wg, wu), module))
        if self._biased:
            packed = op.Add(packed, pack_biases(op, (matched["bg"], matched["bu"]), module))
        gate, up = op.Split(packed, axis=-1, num_outputs=2, _outputs=2)
        return op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)


class FuseGateUp(GraphPass):
    """One matrix multiplication instead of two: the input is read and rounded once."""

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        apply_rules(graph, [_GateUpRule.rule(biased=True), _GateUpRule.rule(biased=False)], context, commute=True)
        return graph
