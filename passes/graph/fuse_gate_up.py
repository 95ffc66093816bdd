"""Fuse the gate and up projections of a gated MLP into one matrix multiplication."""

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.passes.graph._packing import Linear, columns, linear_of, pack, refusal
from llmopt.passes.graph._rules import apply_rules

__all__ = ["FuseGateUp"]

_ACTIVATIONS = ("QuickGelu", "Gelu", "Relu")
"""``fuse_activation``, which runs before, makes one operator of every activation."""


@dataclass(frozen=True, slots=True)
class _Gated:
    """``activation(gate) * up``."""

    gate: Linear
    activation: ir.Node
    up: Linear


def _gated(factors: tuple[ir.Value, ir.Value]) -> _Gated | None:
    """The gated MLP whose product these two values make, in either order, or None."""
    for activated, other in (factors, factors[::-1]):
        node = activated.producer()
        if node is None or node.op_type not in _ACTIVATIONS:
            continue
        gate, up = linear_of(node.inputs[0]), linear_of(other)
        if gate is not None and up is not None:
            return _Gated(gate, node, up)
    return None


class _GateUpRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """``activation(x·Wg) * (x·Wu)`` -> both products from one MatMul and a Split."""

    def __init__(self) -> None:
        super().__init__(name="fuse_gate_up", remove_nodes=False)

    def pattern(self, op: Any, first: Any, second: Any) -> Any:
        return op.Mul(first, second, _outputs=["product"])

    def check(self, context: Any, first: ir.Value, second: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        gated = _gated((first, second))
        if gated is None:
            return result.fail()
        if reason := refusal((gated.gate, gated.up), [gated.activation]):
            return result.fail(reason)
        if gated.gate.weight.shape != gated.up.weight.shape:
            return result.fail(f"gate and up have {columns(gated.gate)} and {columns(gated.up)} columns")
        return result

    def rewrite(self, op: Any, first: ir.Value, second: ir.Value, product: ir.Value) -> Any:
        gated = _gated((first, second))
        assert gated is not None
        module = f"{str(product.name).partition('.product')[0]}.gate_up_proj"
        packed = pack(op, (gated.gate, gated.up), module)
        names = [f"{module}.{part}" for part in ("gate", "up")]
        gate, up = op.Split(packed, axis=-1, num_outputs=2, _outputs=names)
        node = gated.activation
        name = node.outputs[0].name
        activated = getattr(op, node.op_type)(gate, _domain=node.domain, _outputs=[name], **node.attributes)
        return op.Mul(activated, up)


class FuseGateUp(GraphPass):
    """One matrix multiplication instead of two: the input is read and rounded once."""

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        apply_rules(graph, [_GateUpRule.rule()], context)
        return graph
