"""Fuse an activation that the standard graph writes in several operators into one."""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.passes.graph._rules import apply_rules

__all__ = ["FuseActivation"]


class _SiluRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """``x * Sigmoid(x)`` -> ``com.microsoft::QuickGelu(x, alpha=1)``, which is ``x * sigmoid(alpha * x)``: exact."""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Mul(x, op.Sigmoid(x))

    def check(self, context: Any, x: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        if x.dtype is not None and x.dtype != ir.DataType.FLOAT:
            return result.fail(f"QuickGelu has no CPU kernel for {x.dtype}")
        return result

    def rewrite(self, op: Any, x: ir.Value) -> Any:
        return op.QuickGelu(x, alpha=1.0, _domain="com.microsoft")


class FuseActivation(GraphPass):
    """One pass over memory instead of two for silu, the only activation without an operator of its own.

    Gelu in both forms and Relu stay ai.onnx's: com.microsoft's Gelu and FastGelu are the same kernels, and BiasGelu
    takes half as long again as an addition and a Gelu.
    """

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        apply_rules(graph, [_SiluRule.rule()], context, commute=True)
        return graph
