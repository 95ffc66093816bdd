"""Applies rewrite rules to a graph and records what they did, and where a near-match was declined and why."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.rewriter import pattern

from llmopt.optimizer.contracts import PassContext

__all__ = ["apply_groups", "apply_rules", "attribute", "producer", "same_shape"]


class _Declined(pattern.MatchingTracer):  # type: ignore[misc]
    """Collects the reasons of rules whose pattern matched and whose check said no.

    A check that fails without a reason has found what needs no rewriting: that is no near-match.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reasons: list[str] = []

    def log(self, rule: Any, container: Any, node: ir.Node, match_result: Any, status: Any) -> None:
        """See ``MatchingTracer.log``."""
        if status == pattern.MatchStatus.CONDITION_FAILED and match_result.reason:
            where = node.outputs[0].name
            self.reasons.append(f"{where}: {match_result.reason}")


def apply_rules(
    graph: ir.Model, rules: Sequence[pattern.RewriteRule], context: PassContext, *, commute: bool = False
) -> None:
    """``apply_groups`` with one group."""
    apply_groups(graph, [rules], context, commute=commute)


def apply_groups(
    graph: ir.Model, groups: Sequence[Sequence[pattern.RewriteRule]], context: PassContext, *, commute: bool = False
) -> None:
    """Apply each group of rules until none of it matches, tidy the graph, and record ``applied`` and ``declined``.

    Args:
        graph: Changed in place.
        groups: One after the other; the rules of a group are tried on each node in their order.
        context: Where the counts and reasons go.
        commute: Whether additions and multiplications also match with their operands exchanged.
    """
    applied, tracer = 0, _Declined()
    # The same graph without the composites' functions: their bodies are references, and no rule may change them.
    main = ir.Model(graph.graph, ir_version=graph.ir_version)
    for rules in groups:
        rule_set = pattern.RewriteRuleSet(list(rules), commute=commute)
        while count := rule_set.apply_to_model(main):
            applied += count
            # Merges what several matches made alike, which lets the next round see one consumer instead of two.
            common.TopologicalSortPass()(main)
            common.CommonSubexpressionEliminationPass()(main)
            common.RemoveUnusedNodesPass()(main)
        rule_set.apply_to_model(main, tracer=tracer)
    if applied:
        common.ShapeInferencePass()(graph)
    context.detail("applied", applied)
    context.detail("declined", sorted(set(tracer.reasons)))


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes ``value``, if its operator is ``op_type``."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute of ``node``."""
    found = node.attributes.get(name)
    return default if found is None else int(found.as_int())


def same_shape(first: ir.Value, second: ir.Value) -> bool:
    """Whether both shapes are known and equal; dimensions that have no name may differ, so they do not count."""
    if first.shape is None or second.shape is None or first.shape.has_unknown_dim():
        return False
    return bool(first.shape == second.shape)
