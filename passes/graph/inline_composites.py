"""Replace every composite that no kernel took by its standard body."""

import onnx_ir as ir
from onnx_ir.passes import common

from llmopt.optimizer.contracts import GraphPass, PassContext

__all__ = ["InlineComposites"]


class InlineComposites(GraphPass):
    """ONNX Runtime would inline them at every start, and the passes behind this one would not see their bodies."""

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        applied = sum(node.op_identifier() in graph.functions for node in graph.graph)
        if applied:
            common.InlinePass()(graph)
            common.NameFixPass()(graph)
            common.ShapeInferencePass()(graph)
        context.detail("applied", applied)
        context.detail("declined", [])
        return graph
