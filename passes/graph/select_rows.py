"""Select the rows that need logits as early as possible, so that the last layer works on nothing else."""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.passes.graph._rules import apply_rules, attribute, same_shape

__all__ = ["SelectRows"]

_DOMAIN = "llmopt"


class _RowWise(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """``SelectRows(f(x), rows)`` -> ``f(SelectRows(x, rows))`` for an ``f`` that treats every row alone."""

    def __init__(self, op_type: str, domain: str = "") -> None:
        super().__init__(name=f"SelectRows({op_type})")
        self._op_type, self._domain = op_type, domain

    def pattern(self, op: Any, x: Any, rows: Any) -> Any:
        inner = getattr(op, self._op_type)(
            x, _domain=self._domain, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["inner"]
        )
        return op.SelectRows(inner, rows, _domain=_DOMAIN)

    def check(self, context: Any, inner: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        node = inner.producer()
        assert node is not None
        second = node.inputs[1] if len(node.inputs) > 1 else None
        rank = None if second is None or second.shape is None else len(second.shape)
        if self._op_type == "MatMul" and rank != 2:
            return result.fail("the second operand of MatMul is no matrix, which all rows would share")
        if self._op_type == "RMSNormalization" and (attribute(node, "axis", -1) != -1 or rank != 1):
            return result.fail("the axis of RMSNormalization is not -1: it may span rows")
        return result

    def rewrite(self, op: Any, x: ir.Value, rows: ir.Value, inner: ir.Value) -> Any:
        node = inner.producer()
        assert node is not None
        selected = _selected(op, x, rows)
        rest = node.inputs[1:]
        return getattr(op, self._op_type)(selected, *rest, _domain=self._domain, **node.attributes)


class _Elementwise(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """``SelectRows(f(x, y), rows)`` -> ``f(SelectRows(x, rows), SelectRows(y, rows))``."""

    def __init__(self, op_type: str) -> None:
        super().__init__(name=f"SelectRows({op_type})")
        self._op_type = op_type

    def pattern(self, op: Any, x: Any, y: Any, rows: Any) -> Any:
        return op.SelectRows(getattr(op, self._op_type)(x, y), rows, _domain=_DOMAIN)

    def check(self, context: Any, x: ir.Value, y: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        if not same_shape(x, y):
            return result.fail(f"the operands of {self._op_type} differ in shape: {x.shape} and {y.shape}")
        return result

    def rewrite(self, op: Any, x: ir.Value, y: ir.Value, rows: ir.Value) -> Any:
        first, second = (_selected(op, value, rows) for value in (x, y))
        return getattr(op, self._op_type)(first, second)


class _Bias(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """``SelectRows(x + bias, rows)`` -> ``SelectRows(x, rows) + bias`` for a constant vector."""

    def pattern(self, op: Any, x: Any, bias: Any, rows: Any) -> Any:
        return op.SelectRows(op.Add(x, bias), rows, _domain=_DOMAIN)

    def check(self, context: Any, bias: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        if not bias.is_initializer() or bias.shape is None or len(bias.shape) != 1:
            return result.fail("the addend is no constant vector")
        return result

    def rewrite(self, op: Any, x: ir.Value, bias: ir.Value, rows: ir.Value) -> Any:
        return op.Add(_selected(op, x, rows), bias)


def _selected(op: Any, x: ir.Value, rows: ir.Value) -> Any:
    """``SelectRows(x, rows)``, whose name tells what it is rows of, for those who read the graph."""
    return op.SelectRows(x, rows, _domain=_DOMAIN, _outputs=[f"{x.name}.selected"])


class SelectRows(GraphPass):
    """Move ``SelectRows`` from the logits up through every operator that treats each token alone.

    In the standard graph the head runs on all tokens and the rows are picked from its output. Whatever lies
    between the last attention and the logits then runs on the picked rows only.
    """

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        rules = [
            _RowWise.rule("MatMul"),
            _RowWise.rule("RMSNormalization"),
            _RowWise.rule("Sigmoid"),
            _RowWise.rule("QuantizeDequantizePerToken", _DOMAIN),
            _Elementwise.rule("Add"),
            _Elementwise.rule("Mul"),
            _Bias.rule(),
        ]
        apply_rules(graph, rules, context, commute=True)
        return graph
