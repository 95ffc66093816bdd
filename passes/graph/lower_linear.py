"""Lower quantized linears to ONNX Runtime's integer kernels."""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.passes.graph._nbits import BlockWeight, block_weight, matmul_nbits
from llmopt.passes.graph._rules import apply_groups, attribute, producer

__all__ = ["LowerLinear"]

_MICROSOFT = "com.microsoft"
_BIAS = 5
"""The index of MatMulNBits' bias among its inputs, behind zero points and an order of columns."""


class _PerTokenRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """W8A8: integers times integers, then ``* m``, the largest magnitude of each token.

    MatMulIntegerToFloat takes one activation scale, so each row's own has been divided out before the rounding and is
    multiplied back here. The integer sum is exact: a row's result does not depend on what shares its batch.
    """

    def __init__(self) -> None:
        super().__init__(name="lower_linear W8A8", remove_nodes=False)

    def pattern(self, op: Any, integers: Any, step: Any, middle: Any, largest: Any, values: Any, scale: Any) -> Any:
        rounded = op.Mul(op.DequantizeLinear(integers, step, middle), largest)
        weight = op.DequantizeLinear(values, scale, _allow_other_attributes=True, _outputs=["weight"])
        return op.MatMul(rounded, weight, _outputs=["product"])

    def check(self, context: Any, integers: ir.Value, largest: ir.Value, weight: ir.Value, **matched: Any) -> Any:
        result = pattern.MatchResult()
        if integers.dtype != ir.DataType.UINT8 or not _is_scalar(matched["step"]):
            return result.fail("the activations are not uint8 with one step")
        if largest.shape is None or len(largest.shape) == 0 or largest.shape[-1] != 1:
            return result.fail("the activations' scales are not one per row")
        values, node = matched["values"], _node(weight)
        if values.dtype != ir.DataType.INT8:
            return result.fail(f"the kernel multiplies int8 weights, not {values.dtype}")
        if attribute(node, "axis", 1) != 1 or attribute(node, "block_size", 0):
            return result.fail("the kernel takes one weight scale per output channel")
        return result

    def rewrite(self, op: Any, integers: ir.Value, step: ir.Value, middle: ir.Value, **matched: Any) -> Any:
        weight = (matched["values"], step, matched["scale"], middle)
        names = [f"{matched['product'].name}.by_largest"]
        product = op.MatMulIntegerToFloat(integers, *weight, _domain=_MICROSOFT, _outputs=names)
        return op.Mul(product, matched["largest"])


class _WeightOnlyRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """W4A16 and W8A16: ``MatMul(x, DequantizeLinear(...))`` -> ``MatMulNBits``."""

    def __init__(self) -> None:
        super().__init__(name="lower_linear weight-only", remove_nodes=False)

    def pattern(self, op: Any, x: Any) -> Any:
        weight = op.DequantizeLinear(_allow_other_inputs=True, _allow_other_attributes=True, _outputs=["weight"])
        return op.MatMul(x, weight)

    def check(self, context: Any, x: ir.Value, weight: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        if _is_rounded(x):
            return result.fail("its activations are quantized too")
        packed = block_weight(_node(weight), "weight", transposed=False)
        return result.fail(packed) if isinstance(packed, str) else result

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value) -> Any:
        name = str(weight.name).removesuffix(".weight_dequantized")
        packed = block_weight(_node(weight), name, transposed=False)
        assert isinstance(packed, BlockWeight)
        return matmul_nbits(op, x, packed)


class _TransposedRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """A tied head in float: ``MatMul(x, Transpose(table))`` -> ``FusedMatMul(x, table, transB=1)``."""

    def pattern(self, op: Any, x: Any, table: Any) -> Any:
        return op.MatMul(x, op.Transpose(table, perm=[1, 0]))

    def check(self, context: Any, table: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        return result if table.is_initializer() else result.fail("the transposed value is no initializer")

    def rewrite(self, op: Any, x: ir.Value, table: ir.Value) -> Any:
        return op.FusedMatMul(x, table, transB=1, _domain=_MICROSOFT)


class _BiasRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """``MatMulNBits(...) + bias`` -> the kernel's own bias, added while the result is in registers."""

    def pattern(self, op: Any, bias: Any) -> Any:
        product = op.MatMulNBits(
            _domain=_MICROSOFT, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["product"]
        )
        return op.Add(product, bias)

    def check(self, context: Any, product: ir.Value, bias: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        node = _node(product)
        if not bias.is_initializer() or bias.shape != ir.Shape([attribute(node, "N", 0)]):
            return result.fail()  # a residual, most often
        return result

    def rewrite(self, op: Any, product: ir.Value, bias: ir.Value) -> Any:
        node = _node(product)
        inputs = [*node.inputs, *[None] * (_BIAS - len(node.inputs)), bias]
        return op.MatMulNBits(*inputs, _domain=_MICROSOFT, **node.attributes)


def _node(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _is_scalar(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 0


def _is_rounded(x: ir.Value) -> bool:
    """Whether ``x`` is integers times a scale for each row."""
    product = producer(x, "Mul")
    return product is not None and any(producer(factor, "DequantizeLinear") is not None for factor in product.inputs)


def _multiplies_floats_of_integers(node: ir.Node) -> bool:
    """Whether ``node`` is a MatMul with a DequantizeLinear, or with the transpose of one."""
    if node.op_type != "MatMul":
        return False
    weight = node.inputs[1]
    transpose = producer(weight, "Transpose")
    return producer(transpose.inputs[0] if transpose else weight, "DequantizeLinear") is not None


class LowerLinear(GraphPass):
    """Integer weights multiplied as integers, instead of turned into floats first."""

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        per_token = _PerTokenRule.rule()
        products = [*per_token.commute(), _WeightOnlyRule.rule(), _TransposedRule.rule()]
        apply_groups(graph, [products, _BiasRule.rule().commute()], context)
        if left := [str(node.outputs[0].name) for node in graph.graph if _multiplies_floats_of_integers(node)]:
            context.fallback(f"{len(left)} quantized linears turn their weights into floats in every call: {left[0]}")
        if any(node.op_type == "MatMulNBits" for node in graph.graph):
            context.note("MatMulNBits rounds activations to int8 per block inside the kernel (accuracy_level 4)")
        return graph
