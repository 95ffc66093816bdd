"""Round the input of W8A8 linears, per token or with a known scale, once for all that read it."""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.passes.graph._rules import apply_rules

__all__ = ["ShareActivationQuantization"]


class _RoundingRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """``QuantizeDequantizePerToken(x)`` -> its largest magnitudes and integers as values that every linear can take.

    The integers are uint8 around 128: only u8 x s8 reaches the AMX and VNNI kernels, s8 x s8 is up to 100 times
    slower.
    """

    def pattern(self, op: Any, x: Any) -> Any:
        return op.QuantizeDequantizePerToken(x, _domain="llmopt")

    def rewrite(self, op: Any, x: ir.Value) -> Any:
        names = {part: [f"{x.name}.{part}"] for part in ("largest", "integers")}
        largest = op.ReduceMax(op.Abs(x), op.Constant(value_ints=[-1]), keepdims=1, _outputs=names["largest"])
        step = op.Constant(value=ir.tensor(np.float32(1 / 127)))
        middle = op.Constant(value=ir.tensor(np.uint8(128)))
        integers = op.QuantizeLinear(op.Div(x, largest), step, middle, _outputs=names["integers"])
        return op.Mul(op.DequantizeLinear(integers, step, middle), largest)


class _StaticRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """``QuantizeDequantizeStatic(x, scale)`` -> the integers as a value that every linear can take."""

    def pattern(self, op: Any, x: Any, scale: Any) -> Any:
        return op.QuantizeDequantizeStatic(x, scale, _domain="llmopt")

    def rewrite(self, op: Any, x: ir.Value, scale: ir.Value) -> Any:
        middle = op.Constant(value=ir.tensor(np.uint8(128)))
        integers = op.QuantizeLinear(x, scale, middle, _outputs=[f"{x.name}.integers"])
        return op.DequantizeLinear(integers, scale, middle)


class ShareActivationQuantization(GraphPass):
    """One rounding of each value, whose integers ``lower_linear`` hands to the kernels of all its readers."""

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        apply_rules(graph, [_RoundingRule.rule(), _StaticRule.rule()], context)
        return graph
