"""Replace ONNX Runtime's kernels by our own, where those are faster."""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.optimizer.kernels import DOMAIN
from llmopt.passes.graph._rules import apply_groups, attribute, producer, same_shape

__all__ = ["UseKernels"]

_UNTAKEN = {9: "positions", 10: "a bias", 11: "sinks"}
"""Inputs of GroupQueryAttention that our kernel has no use for."""


_LORA = ("LoraAdd", "LoraAddBfloat16")


class _AttentionRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """``com.microsoft::GroupQueryAttention`` -> ours, with the same inputs and attributes."""

    def pattern(self, op: Any) -> Any:
        return op.GroupQueryAttention(
            _domain="com.microsoft",
            _allow_other_inputs=True,
            _allow_other_attributes=True,
            _outputs=["attended", "present_key", "present_value"],
        )

    def check(self, context: Any, attended: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        node = attended.producer()
        assert node is not None
        if taken := [what for i, what in _UNTAKEN.items() if i < len(node.inputs) and node.inputs[i] is not None]:
            return result.fail(f"the kernel takes no {taken[0]}")
        if attribute(node, "rotary_interleaved", 0):
            return result.fail("the kernel rotates halves, not neighbors")
        return result

    def rewrite(self, op: Any, attended: ir.Value, **_: Any) -> Any:
        node = attended.producer()
        assert node is not None
        cache = node.inputs[3]
        assert cache is not None
        name = "GroupQueryAttentionInt8" if cache.dtype == ir.DataType.INT8 else "GroupQueryAttention"
        return getattr(op, name)(*node.inputs, _domain=DOMAIN, _outputs=3, **node.attributes)


class _RoundingRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """A row's largest magnitude and the integers that ``share_activation_quantization`` makes, in one operator."""

    def __init__(self) -> None:
        super().__init__(name="use_kernels QuantizeRows", remove_nodes=False)

    def pattern(self, op: Any, x: Any, axes: Any, step: Any, middle: Any) -> Any:
        largest = op.ReduceMax(op.Abs(x), axes, keepdims=1, _outputs=["largest"])
        return op.QuantizeLinear(op.Div(x, largest), step, middle, _allow_other_attributes=True)

    def check(self, context: Any, x: ir.Value, axes: ir.Value, step: ir.Value, middle: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        rank = None if x.shape is None else len(x.shape)
        if not (_is(axes, np.int64(-1)) or (rank is not None and _is(axes, np.int64(rank - 1)))):
            return result.fail("the kernel looks for the largest of each row")
        if not (_is(step, np.float32(1 / 127)) and _is(middle, np.uint8(128))):
            return result.fail("the kernel's steps are 127ths of the largest, around 128")
        return result

    def rewrite(self, op: Any, x: ir.Value, largest: ir.Value, **_: Any) -> Any:
        integers, found = op.QuantizeRows(x, _domain=DOMAIN, _outputs=2)
        found.name, found.shape, found.dtype = f"{x.name}.largest_of_row", largest.shape, largest.dtype
        ir.convenience.replace_all_uses_with(largest, found)
        return integers


class _Quantized(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """``QuantizeRows`` and what makes its rows, in one operator that reads a product of integers before its scaling."""

    def __init__(self) -> None:
        super().__init__(name=f"use_kernels {type(self).__name__}", remove_nodes=False)

    def pattern(self, op: Any, rows: Any) -> Any:
        return op.QuantizeRows(rows, _domain=DOMAIN, _outputs=["integers", "largest"])

    def check(self, context: Any, rows: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        return result if self._parts(rows) is not None and not _others(rows, but=1) else result.fail()

    def _parts(self, rows: ir.Value) -> tuple[ir.Value, ...] | None:
        """What the one operator takes; None where rows are made otherwise."""
        raise NotImplementedError

    def _inputs(self, rows: ir.Value) -> tuple[ir.Value, ...]:
        parts = self._parts(rows)
        assert parts is not None
        return parts


class _GatedRule(_Quantized):
    """``silu(gate) * up``, of a product that has gate and up side by side."""

    def _parts(self, rows: ir.Value) -> tuple[ir.Value, ir.Value] | None:
        gated = producer(rows, "Mul")
        silus = [] if gated is None else [producer(each, "QuickGelu") for each in gated.inputs]
        if gated is None or len(silus) != 2 or (silus[0] is None) == (silus[1] is None):
            return None
        place = 0 if silus[0] is not None else 1
        silu, up = silus[place], gated.inputs[1 - place]
        assert silu is not None
        split = producer(up, "Split")
        if split is None or list(split.outputs) != [silu.inputs[0], up] or not _halves(split):
            return None
        alpha = silu.attributes.get("alpha")
        if alpha is None or alpha.as_float() != 1.0 or len(silu.outputs[0].uses()) > 1:
            return None
        return _scaled(split.inputs[0])

    def rewrite(self, op: Any, rows: ir.Value, **_: Any) -> Any:
        if len(rows.uses()) == 1:
            return op.QuantizeGatedRows(*self._inputs(rows), _domain=DOMAIN, _outputs=2)
        integers, largest, kept = op.QuantizeGatedRows(*self._inputs(rows), _domain=DOMAIN, _outputs=3)
        _take_place(kept, rows)
        return integers, largest


class _NormedRule(_Quantized):
    """The norm of a residual plus a product; that sum is the next residual."""

    def _parts(self, rows: ir.Value) -> tuple[ir.Value, ...] | None:
        norm = producer(rows, "SkipSimplifiedLayerNormalization")
        if norm is None or rows is not norm.outputs[0] or any(norm.inputs[3:]):
            return None
        weight = norm.inputs[2]
        assert weight is not None
        for branch, residual in (norm.inputs[:2], norm.inputs[1::-1]):
            if branch is None or residual is None or not same_shape(branch, residual):
                continue
            if (scaled := _scaled(branch)) is not None:
                return *scaled, residual, weight
        return None

    def rewrite(self, op: Any, rows: ir.Value, **_: Any) -> Any:
        norm = rows.producer()
        assert norm is not None
        epsilon = norm.attributes["epsilon"]
        count = 3 if len(rows.uses()) == 1 else 4
        outputs = op.QuantizeNormedRows(*self._inputs(rows), _domain=DOMAIN, _outputs=count, epsilon=epsilon)
        integers, largest, total, *kept = outputs
        for each in kept:
            _take_place(each, rows)
        for old in norm.outputs[3:]:
            _take_place(total, old)
        return integers, largest


class _ScaledLoraRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """An adapter added behind the scaling of a product of integers -> in front of it, where kernels take both."""

    def __init__(self, kernel: str) -> None:
        super().__init__(name=f"use_kernels {kernel}", remove_nodes=False)
        self._kernel = kernel

    def pattern(self, op: Any, product: Any, largest: Any) -> Any:
        scaled = op.Mul(product, largest, _outputs=["scaled"])
        kernel = getattr(op, self._kernel)
        return kernel(scaled, _domain=DOMAIN, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["y"])

    def check(self, context: Any, scaled: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        return result if _scaled(scaled) is not None and len(scaled.uses()) == 1 else result.fail()

    def rewrite(self, op: Any, product: ir.Value, largest: ir.Value, y: ir.Value, **_: Any) -> Any:
        node = y.producer()
        assert node is not None
        names = [f"{y.name}.by_largest"]
        kernel = getattr(op, self._kernel)
        added = kernel(product, *node.inputs[1:], largest, _domain=DOMAIN, _outputs=names, **node.attributes)
        # Equal shapes let ONNX Runtime put the sum where the product is, which it does not know of its own operator.
        for value in (product, added):
            value.shape, value.type = y.shape, y.type
        return op.Mul(added, largest)


def _others(rows: ir.Value, *, but: int) -> list[ir.Node]:
    """What reads ``rows`` besides ``but`` others, and is no adapter."""
    readers = [use.node for use in rows.uses() if use.node.op_type not in _LORA]
    return readers[but:]


def _take_place(new: ir.Value, old: ir.Value) -> None:
    """Let all that reads ``old`` read ``new``, which is the same."""
    new.name, new.shape, new.type = f"{old.name}.fused", old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new)


def _scaled(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """The product of integers and its rows' largest magnitudes, whose product ``value`` is."""
    scaling = producer(value, "Mul")
    if scaling is None:
        return None
    product, largest = scaling.inputs
    adapted = producer(product, _LORA[0]) or producer(product, _LORA[1])
    if (
        producer(product if adapted is None else adapted.inputs[0], "MatMulIntegerToFloat") is None
        or product is None
        or largest is None
    ):
        return None
    shape = scaling.outputs[0].shape  # the product's own, which the kernel's operator does not tell
    if shape is None or largest.shape is None or shape[:-1] != largest.shape[:-1] or largest.shape[-1] != 1:
        return None
    return product, largest


def _halves(split: ir.Node) -> bool:
    """Whether a Split halves the last dimension."""
    first, second = (output.shape for output in split.outputs)
    last = attribute(split, "axis", 0) in (-1, -1 if first is None else len(first) - 1)
    return last and first is not None and second is not None and first[-1] == second[-1]


def _is(value: ir.Value, expected: Any) -> bool:
    """Whether ``value`` is a constant of that one number, in its dtype."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        return False
    found = tensor.numpy()
    return bool(found.size == 1 and found.dtype == expected.dtype and found.item() == expected)


class UseKernels(GraphPass):
    """Attention over the cache, and the rounding of activations to integers with what makes them, in our own kernels.

    They compute what the operators they replace do; a token's result has the same bits in every chunk and batch. An
    engine that has them is loaded by llmopt alone.
    """

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        singles = [_AttentionRule.rule(), _RoundingRule.rule(), *map(_ScaledLoraRule.rule, _LORA)]
        apply_groups(graph, [singles, [_GatedRule.rule(), _NormedRule.rule()]], context)
        return graph
