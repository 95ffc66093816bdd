"""Lower mixtures of experts to ONNX Runtime's kernels, which compute only the experts that a token reaches."""

from functools import partial
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.passes.graph._expert_weights import ExpertWeights, block_rows, common_block, expert_weights, float_rows
from llmopt.passes.graph._rules import apply_rules, attribute

__all__ = ["LowerExperts"]

_MICROSOFT = "com.microsoft"
_GATED = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
"""``g * sigmoid(alpha * g) * (u + beta)`` with g and u in alternating rows of the first weight; unclamped, as without
swiglu_limit."""


class _ExpertsRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """``llmopt::Experts`` -> ``MoE`` for float weights, ``QMoE`` for integers.

    Either kernel would also choose a token's experts and mix their results. But QMoE then sums in an order that
    depends on what else is in the batch, and always divides the shares by their sum. So each pair of a token and one of
    its experts becomes a row of its own, which the kernel sends through that expert; softmax, choice and mixing stay
    the standard operators of the composite's body.
    """

    def pattern(self, op: Any, x: Any, scores: Any, gate_up: Any, down: Any) -> Any:
        return op.Experts(
            x, scores, gate_up, down, _domain="llmopt", _allow_other_attributes=True, _outputs=["mixture"]
        )

    def check(self, context: Any, mixture: ir.Value, gate_up: ir.Value, down: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        reason = _refusal(_node(mixture), expert_weights(gate_up), expert_weights(down))
        return result.fail(reason) if reason else result

    def rewrite(
        self, op: Any, x: ir.Value, scores: ir.Value, gate_up: ir.Value, down: ir.Value, mixture: ir.Value
    ) -> Any:
        first, second = expert_weights(gate_up), expert_weights(down)
        assert isinstance(first, ExpertWeights)
        assert isinstance(second, ExpertWeights)
        node, (experts, hidden, _) = _node(mixture), first.shape
        top_k = attribute(node, "top_k", 1)
        likely = op.Softmax(op.Reshape(scores, _ints(op, -1, experts)), axis=-1)
        shares, indices = op.TopK(likely, _ints(op, top_k), axis=-1, _outputs=2)
        if attribute(node, "normalize", 0):
            shares = op.Div(shares, op.ReduceSum(shares, _ints(op, -1), keepdims=1))
        chosen = op.Reshape(indices, _ints(op, -1))
        rows = op.Expand(op.Reshape(x, _ints(op, -1, 1, hidden)), _ints(op, 1, top_k, 1))
        rows = op.Reshape(rows, _ints(op, -1, hidden))
        kernel = _moe if first.scales is None else _qmoe
        results = kernel(op, rows, chosen, first, second, str(mixture.name).removesuffix(".output"))
        results = op.Reshape(results, _ints(op, -1, top_k, hidden))
        mixed = op.ReduceSum(op.Mul(results, op.Unsqueeze(shares, _ints(op, 2))), _ints(op, 1), keepdims=0)
        return op.Reshape(mixed, op.Shape(x))


def _refusal(node: ir.Node, first: ExpertWeights | str, second: ExpertWeights | str) -> str | None:
    """Why no kernel computes the mixture ``node``, or None when one does."""
    activation = node.attributes["activation"].as_string()
    if activation != "silu":
        return f"the kernels gate with silu, not with {activation}"
    if isinstance(first, str) or isinstance(second, str):
        return first if isinstance(first, str) else str(second)
    if (first.scales is None) != (second.scales is None):
        return "of gate_up and down one is quantized and one is not"
    if first.scales is not None and common_block(first, second) is None:
        groups = " and ".join(f"{each.group} of {each.shape[1]}" for each in (first, second))
        return f"no block of the kernel divides groups of {groups} columns, with two blocks a row at least"
    return None


def _is_widened(node: ir.Node) -> bool:
    """Whether gate_up and down differ in width: the kernel takes both as wide as the wider one."""
    first, second = (expert_weights(value) for value in node.inputs[2:4] if value is not None)
    if isinstance(first, str) or isinstance(second, str) or _refusal(node, first, second):
        return False
    return first.scales is not None and first.bits != second.bits


def _moe(op: Any, rows: Any, chosen: Any, first: ExpertWeights, second: ExpertWeights, name: str) -> Any:
    """Row i of ``[rows, hidden]`` through expert ``chosen[i]``, in float32.

    A product with one row sums in another order than a product with several. So an expert with a single row gets a row
    of zeros besides: then no result depends on whether another token of the batch has chosen the same expert.
    """
    experts, hidden, _ = first.shape
    counts = op.ReduceSum(_one_hot(op, chosen, experts), _ints(op, 0), keepdims=0)
    single = op.Reshape(op.NonZero(op.Equal(counts, op.Constant(value_float=1.0))), _ints(op, -1))
    zeros = op.Expand(op.Constant(value_float=0.0), op.Concat(op.Shape(single), _ints(op, hidden), axis=0))
    tensors = (
        float_rows(f"{name}.gate_up.rows", first, alternating=True),
        float_rows(f"{name}.down.rows", second, alternating=False),
    )
    gate_up, down = (_constant(op, tensor) for tensor in tensors)
    router = _one_hot(op, op.Concat(chosen, single, axis=0), experts)
    rows = op.Concat(rows, zeros, axis=0)
    results = op.MoE(rows, router, gate_up, None, down, k=1, normalize_routing_weights=1, **_GATED, _domain=_MICROSOFT)
    return op.Slice(results, _ints(op, 0), op.Shape(chosen))


def _qmoe(op: Any, rows: Any, chosen: Any, first: ExpertWeights, second: ExpertWeights, name: str) -> Any:
    """Row i of ``[rows, hidden]`` through expert ``chosen[i]``, rounded to int8 per block in front of each product."""
    block = common_block(first, second)
    assert block is not None
    bits, with_zeros = max(first.bits, second.bits), first.zeros is not None or second.zeros is not None
    pack = partial(block_rows, bits=bits, block=block, with_zeros=with_zeros)
    one = pack(f"{name}.gate_up", first, alternating=True)
    two = pack(f"{name}.down", second, alternating=False)
    tensors = (
        one.values, one.scales, None, two.values, two.scales, None, None, None, None, one.zero_points, two.zero_points
    )  # fmt: skip
    return op.QMoE(
        rows, _one_hot(op, chosen, first.shape[0]), *(_constant(op, tensor) for tensor in tensors),
        k=1, expert_weight_bits=bits, block_size=block, accuracy_level=4, weights_prepacked=0,
        **_GATED, _domain=_MICROSOFT,
    )  # fmt: skip


def _one_hot(op: Any, indices: Any, experts: int) -> Any:
    """The router's scores that send each row to one expert: float32 ``[rows, experts]``."""
    return op.OneHot(indices, _ints(op, experts), op.Constant(value_floats=[0.0, 1.0]), axis=-1)


def _constant(op: Any, tensor: ir.TensorProtocol | None) -> Any:
    return None if tensor is None else op.initializer(tensor, name=tensor.name)


def _ints(op: Any, *values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _node(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


class LowerExperts(GraphPass):
    """A token goes through the experts it reaches, instead of all experts computing every token."""

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        widened = [str(node.outputs[0].name) for node in graph.graph if node.op_type == "Experts" and _is_widened(node)]
        apply_rules(graph, [_ExpertsRule.rule()], context)
        if widened:
            context.fallback(f"{len(widened)} mixtures of experts store 4-bit weights in 8 bits: {widened[0]}")
        if left := [str(node.outputs[0].name) for node in graph.graph if node.op_type == "Experts"]:
            context.fallback(f"{len(left)} mixtures of experts compute every expert for every token: {left[0]}")
        if any(node.op_type == "QMoE" for node in graph.graph):
            context.note("QMoE rounds activations to int8 per block inside the kernel (accuracy_level 4)")
        return graph
