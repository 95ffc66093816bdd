"""Lower the composite that adds adapters to our own kernel, one for all linears that were packed into one."""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.optimizer.kernels import DOMAIN
from llmopt.passes.graph._rules import apply_groups, producer

__all__ = ["LowerLora"]


class _KernelRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """The composite -> the operator of its inputs."""

    def __init__(self, composite: str) -> None:
        super().__init__(name=f"lower_lora {composite}", remove_nodes=False)
        self._composite = composite

    def pattern(self, op: Any) -> Any:
        composite = getattr(op, self._composite)
        return composite(_domain="llmopt", _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["added"])

    def rewrite(self, op: Any, added: ir.Value) -> Any:
        node = added.producer()
        assert node is not None
        factors = node.inputs[3]
        assert factors is not None
        kernel = op.LoraAddBfloat16 if factors.dtype == ir.DataType.BFLOAT16 else op.LoraAdd
        return kernel(*node.inputs, _domain=DOMAIN, **node.attributes)


class _JoinRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """Two in a row that read the same input -> one with the parts of both."""

    def __init__(self, kernel: str) -> None:
        super().__init__(name=f"lower_lora join {kernel}", remove_nodes=False)
        self._kernel = kernel

    def pattern(self, op: Any, y: Any) -> Any:
        kernel = getattr(op, self._kernel)
        return kernel(y, _domain=DOMAIN, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["added"])

    def check(self, context: Any, y: ir.Value, added: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        first, second = producer(y, self._kernel), added.producer()
        if first is None or second is None or list(first.inputs[1:5]) != list(second.inputs[1:5]):
            return result.fail()
        return result.fail("the first result is read by something else too") if len(y.uses()) > 1 else result

    def rewrite(self, op: Any, y: ir.Value, added: ir.Value) -> Any:
        first, second = y.producer(), added.producer()
        assert first is not None
        assert second is not None
        parts = [node.inputs[5].const_value.numpy() for node in (first, second)]  # type: ignore[union-attr]
        name = f"{str(added.name).partition('.adapted')[0]}.lora"
        joined = np.concatenate(parts)
        both = op.initializer(ir.tensor(joined, name=f"{name}.{len(joined)}"), name=f"{name}.{len(joined)}")
        return getattr(op, self._kernel)(*first.inputs[:5], both, _domain=DOMAIN, **first.attributes)


class LowerLora(GraphPass):
    """Adapters work on the rows that have one, and cost the others nothing."""

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        kinds = [_KernelRule.rule(name) for name in ("LoraAdd", "LoraAddBiased")]
        apply_groups(graph, [kinds, [_JoinRule.rule(name) for name in ("LoraAdd", "LoraAddBfloat16")]], context)
        return graph
