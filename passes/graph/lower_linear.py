"""Lower quantized linears to ONNX Runtime's integer kernels."""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern
from pydantic import Field

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.optimizer.instructions import VNNI, host_instructions
from llmopt.optimizer.lazy_tensor import lazy_tensor
from llmopt.passes.graph._nbits import BlockWeight, Executor, block_weight, matmul_nbits
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
        if largest.shape is None or len(largest.shape) == 0 or largest.shape[-1] != 1:
            return result.fail("the activations' scales are not one per row")
        reason = _no_integer_product(integers, matched["step"], matched["values"], _node(weight))
        return result.fail(reason) if reason else result

    def rewrite(self, op: Any, integers: ir.Value, step: ir.Value, middle: ir.Value, **matched: Any) -> Any:
        weight = _weight(op, matched["values"], step, matched["scale"], middle)
        names = [f"{matched['product'].name}.by_largest"]
        product = op.MatMulIntegerToFloat(integers, *weight, _domain=_MICROSOFT, _outputs=names)
        return op.Mul(product, matched["largest"])


class _StaticRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """W8A8 with a scale of the inputs known in advance: integers times integers."""

    def __init__(self) -> None:
        super().__init__(name="lower_linear static W8A8", remove_nodes=False)

    def pattern(self, op: Any, integers: Any, step: Any, middle: Any, values: Any, scale: Any) -> Any:
        weight = op.DequantizeLinear(values, scale, _allow_other_attributes=True, _outputs=["weight"])
        return op.MatMul(op.DequantizeLinear(integers, step, middle), weight)

    def check(self, context: Any, integers: ir.Value, step: ir.Value, weight: ir.Value, **matched: Any) -> Any:
        result = pattern.MatchResult()
        reason = _no_integer_product(integers, step, matched["values"], _node(weight))
        return result.fail(reason) if reason else result

    def rewrite(self, op: Any, integers: ir.Value, step: ir.Value, middle: ir.Value, **matched: Any) -> Any:
        weight = _weight(op, matched["values"], step, matched["scale"], middle)
        return op.MatMulIntegerToFloat(integers, *weight, _domain=_MICROSOFT)


class _WeightOnlyRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """W2A16 to W8A16: ``MatMul(x, DequantizeLinear(...))`` -> ``MatMulNBits``."""

    def __init__(self, executor: Executor) -> None:
        super().__init__(name="lower_linear weight-only", remove_nodes=False)
        self._executor = executor

    def pattern(self, op: Any, x: Any) -> Any:
        weight = op.DequantizeLinear(_allow_other_inputs=True, _allow_other_attributes=True, _outputs=["weight"])
        return op.MatMul(x, weight)

    def check(self, context: Any, x: ir.Value, weight: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        if _is_rounded(x):
            return result.fail("its activations are quantized too")
        if _is_fp8(_node(weight)):
            return result.fail()  # there is no such kernel
        packed = block_weight(_node(weight), "weight", transposed=False, executor=self._executor)
        return result.fail(packed) if isinstance(packed, str) else result

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value) -> Any:
        name = str(weight.name).removesuffix(".weight_dequantized")
        packed = block_weight(_node(weight), name, transposed=False, executor=self._executor)
        assert isinstance(packed, BlockWeight)
        return matmul_nbits(op, x, packed, self._executor)


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


def _no_integer_product(integers: ir.Value, step: ir.Value, values: ir.Value, weight: ir.Node) -> str | None:
    """Why MatMulIntegerToFloat does not take these activations and the weight; None when it does."""
    if integers.dtype != ir.DataType.UINT8 or not _is_scalar(step):
        return "the activations are not uint8 with one step"
    if values.dtype != ir.DataType.INT8:
        return f"the kernel multiplies int8 weights, not {values.dtype}"
    if attribute(weight, "axis", 1) != 1 or attribute(weight, "block_size", 0):
        return "the kernel takes one weight scale per output channel"
    return None


def _weight(op: Any, values: ir.Value, step: ir.Value, scale: ir.Value, middle: ir.Value) -> tuple[ir.Value, ...]:
    """What MatMulIntegerToFloat takes behind the integers of the activations.

    Where the CPU sums products of uint8 and int8 in 16 bits, which overflow, the same weights as uint8 around 128: ONNX
    Runtime's kernel of two uint8 does not.
    """
    if host_instructions() == VNNI:
        return values, step, scale, middle
    return _unsigned(op, values), step, scale, middle, op.Constant(value=ir.tensor(np.uint8(128)))


def _unsigned(op: Any, values: ir.Value) -> ir.Value:
    """int8 plus 128, as uint8: an initializer, or computed when the engine is loaded where another reads it too."""
    tensor = values.const_value
    if tensor is None or len(values.uses()) > 1:
        wide = op.Add(op.Cast(values, to=ir.DataType.INT16.value), op.Constant(value=ir.tensor(np.int16(128))))
        made: ir.Value = op.Cast(wide, to=ir.DataType.UINT8.value)
        return made
    name = f"{values.name}.unsigned"
    shape = tensor.shape.numpy()
    lazy = lazy_tensor(name, ir.DataType.UINT8, shape, lambda: (tensor.numpy().astype(np.int16) + 128).astype(np.uint8))
    unsigned: ir.Value = op.initializer(lazy, name=name)
    return unsigned


def _is_fp8(node: ir.Node | None) -> bool:
    """Whether the node makes floats of FP8 numbers."""
    return node is not None and node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.FLOAT8E4M3FN


def _is_rounded(x: ir.Value) -> bool:
    """Whether ``x`` is integers times a scale, or times a scale for each row."""
    if producer(x, "DequantizeLinear") is not None:
        return True
    product = producer(x, "Mul")
    return product is not None and any(producer(factor, "DequantizeLinear") is not None for factor in product.inputs)


def _dequantization(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear that ``node`` multiplies with, or with the transpose of, if it is such a MatMul."""
    if node.op_type != "MatMul":
        return None
    weight = node.inputs[1]
    transpose = producer(weight, "Transpose")
    return producer(transpose.inputs[0] if transpose else weight, "DequantizeLinear")


class LowerLinear(GraphPass):
    """Integer weights multiplied as integers, instead of turned into floats first."""

    executor: Executor = Field("cpu", description="Whose kernels multiply them.")

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        per_token = _PerTokenRule.rule()
        products = [
            *per_token.commute(),
            _StaticRule.rule(),
            _WeightOnlyRule.rule(self.executor),
            _TransposedRule.rule(),
        ]
        apply_groups(graph, [products, _BiasRule.rule().commute()], context)
        made = {str(node.outputs[0].name): made for node in graph.graph if (made := _dequantization(node)) is not None}
        if left := [name for name, node in made.items() if not _is_fp8(node)]:
            context.fallback(f"{len(left)} quantized linears turn their weights into floats when loaded: {left[0]}")
        if fp8 := [name for name, node in made.items() if _is_fp8(node)]:
            context.note(
                f"{len(fp8)} FP8 linears become float32 when the engine is loaded: this target has no FP8 kernels, "
                "the engine shows what FP8 loses and is not fast"
            )
        if self.executor == "cpu" and any(node.op_type == "MatMulNBits" for node in graph.graph):
            context.note("MatMulNBits rounds activations to int8 per block inside the kernel (accuracy_level 4)")
        return graph
