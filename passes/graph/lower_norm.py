"""RMS norms as ONNX Runtime's own operator, which its provider for CUDA has a kernel for."""

import onnx_ir as ir

from llmopt.optimizer.contracts import GraphPass, PassContext

__all__ = ["LowerNorm"]


class LowerNorm(GraphPass):
    """``RMSNormalization`` -> ``SimplifiedLayerNormalization``: the same under the name it had before ONNX knew it.

    Its attributes and their defaults are the same. ONNX Runtime has it in ONNX's own domain.
    """

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        norms = [node for node in graph.graph if (node.domain, node.op_type) == ("", "RMSNormalization")]
        for node in norms:
            node.op_type = "SimplifiedLayerNormalization"
        context.detail("applied", len(norms))
        context.detail("declined", [])
        return graph
