"""Remove what no output depends on."""

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes import common

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.passes.graph._steps import run_steps

__all__ = ["EliminateDeadCode"]


class EliminateDeadCode(GraphPass):
    """Nodes, initializers, functions and imported operator sets that nothing uses; inputs and outputs stay."""

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        kinds: tuple[Callable[[], ir.passes.PassBase], ...] = (
            common.RemoveUnusedNodesPass,
            common.RemoveUnusedFunctionsPass,
            common.RemoveUnusedOpsetsPass,
        )
        context.detail("applied", run_steps(graph, *(kind() for kind in kinds)))
        context.detail("declined", [])
        return graph
