"""Select the rows that need logits as early as possible, so that the last layer works on nothing else."""

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.passes.graph._rules import apply_rules, attribute, same_shape

__all__ = ["SelectRows"]

_DOMAIN = "llmopt"

_Rows = tuple[int, ...] | str
"""Which inputs of a node have a row for each of its output's rows, so that the others are the same for all rows; or
why the node does not treat every row alone."""


def _always(*rows: int) -> Callable[[ir.Node], _Rows]:
    return lambda _: rows


def _of_operands(node: ir.Node) -> _Rows:
    """Elementwise: every operand but constants that all rows share."""
    operands = [(i, value) for i, value in enumerate(node.inputs) if value is not None and not _is_shared(value)]
    if not operands:
        return f"no operand of {node.op_type} has rows"
    if not all(same_shape(operands[0][1], value) for _, value in operands):
        shapes = " and ".join(str(value.shape) for _, value in operands)
        return f"the operands of {node.op_type} differ in shape: {shapes}"
    return tuple(i for i, _ in operands)


def _of_product(node: ir.Node) -> _Rows:
    matrix = node.inputs[1]
    if matrix is None or matrix.shape is None or len(matrix.shape) != 2:
        return "the second operand of MatMul is no matrix, which all rows would share"
    return (0,)


def _of_norm(node: ir.Node) -> _Rows:
    weights = [value for value in node.inputs[1:] if value is not None]
    if attribute(node, "axis", -1) != -1 or not all(_is_shared(weight) for weight in weights):
        return f"the axis of {node.op_type} is not -1: it may span rows"
    return (0,)


def _of_split(node: ir.Node) -> _Rows:
    """A part of each row, if nothing needs the parts of all rows."""
    if attribute(node, "axis", 0) != -1:
        return "the axis of Split is not -1: it may part rows"
    readers = [use.node for value in node.outputs for use in value.uses()]
    if any(value.is_graph_output() for value in node.outputs) or any(one.op_type != "SelectRows" for one in readers):
        return "another part of the Split is needed for all rows"
    return (0,)


def _is_shared(value: ir.Value) -> bool:
    """Whether ``value`` is a constant without rows: a number, or one for each column."""
    is_constant = value.is_initializer() or ir.convenience.get_const_tensor(value) is not None
    return is_constant and value.shape is not None and len(value.shape) <= 1


_ROUNDINGS = tuple(
    f"QuantizeDequantize{kind}" for kind in ("PerToken", "Static", "Fp8PerToken", "Fp8PerGroup", "Fp8Static")
)

_ROW_WISE: Mapping[tuple[str, str], Callable[[ir.Node], _Rows]] = {
    **{("", name): _always(0) for name in ("Sigmoid", "Tanh", "Relu", "Gelu")},
    **{("", name): _of_operands for name in ("Add", "Sub", "Mul", "Div")},
    **{("", name): _of_norm for name in ("RMSNormalization", "LayerNormalization")},
    ("", "MatMul"): _of_product,
    ("", "Split"): _of_split,
    **{(_DOMAIN, name): _always(0) for name in _ROUNDINGS},
    (_DOMAIN, "RotateBlocks"): _always(0),
    **{(_DOMAIN, name): _always(0, 1, 2) for name in ("LoraAdd", "LoraAddBiased")},  # and its adapter
    (_DOMAIN, "Experts"): _always(0, 1),  # a token's row and its scores
}


_AGAIN = _ROUNDINGS
"""Done once more for the picked rows when others need it for all: a linear takes the integers of its own rows."""


class _SelectRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """``SelectRows(f(x), rows)`` -> ``f(SelectRows(x, rows))`` for an ``f`` that treats every row alone."""

    def __init__(self) -> None:
        super().__init__(name="select_rows", remove_nodes=False)

    def pattern(self, op: Any, inner: Any, rows: Any) -> Any:
        return op.SelectRows(inner, rows, _domain=_DOMAIN)

    def check(self, context: Any, inner: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        node = inner.producer()
        if node is None or (node.domain, node.op_type) not in _ROW_WISE:
            return result.fail()
        if (len(inner.uses()) > 1 or inner.is_graph_output()) and node.op_type not in _AGAIN:
            return result.fail()  # computed for all rows anyway
        rows = _rows(node)
        return result.fail(rows) if isinstance(rows, str) else result

    def rewrite(self, op: Any, inner: ir.Value, rows: ir.Value) -> Any:
        node = inner.producer()
        assert node is not None
        picked = _rows(node)
        inputs = [_picked(op, x, rows) if i in picked else x for i, x in enumerate(node.inputs)]
        count = len(node.outputs)
        made = getattr(op, node.op_type)(*inputs, _domain=node.domain, _outputs=count, **node.attributes)
        return made if count == 1 else made[node.outputs.index(inner)]


def _picked(op: Any, x: ir.Value | None, rows: ir.Value) -> Any:
    assert x is not None
    return op.SelectRows(x, rows, _domain=_DOMAIN, _outputs=[f"{x.name}.rows"])


def _rows(node: ir.Node) -> _Rows:
    return _ROW_WISE[node.domain, node.op_type](node)


class SelectRows(GraphPass):
    """Move ``SelectRows`` from the logits up through every operator that treats each token alone.

    In the standard graph the head runs on all tokens and the rows are picked from its output. Whatever lies
    between the last attention and the logits then runs on the picked rows only.
    """

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        apply_rules(graph, [_SelectRule.rule()], context)
        return graph
