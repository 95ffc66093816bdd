"""Compute once what several nodes compute from the same values."""

import onnx_ir as ir
from onnx_ir.passes import common

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.passes.graph._steps import run_steps

__all__ = ["EliminateCommonSubexpressions"]


class EliminateCommonSubexpressions(GraphPass):
    """Nodes with the same operator, attributes and inputs become one: what every layer derives from the lengths."""

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        steps = (common.TopologicalSortPass(), common.CommonSubexpressionEliminationPass())
        context.detail("applied", run_steps(graph, *steps))
        context.detail("declined", [])
        return graph
