"""Write a graph in an older version of ONNX's operators, where that changes nothing but the number."""

import onnx.defs
import onnx_ir as ir
from pydantic import Field

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.optimizer.errors import PassError

__all__ = ["LowerOpset"]


class LowerOpset(GraphPass):
    """For executors whose kernels are for operators of an older version.

    ONNX Runtime's provider for CUDA registers Shape, Squeeze and others up to opset 23. In a graph of opset 24 it has
    no kernel for them, although nothing about them has changed but the types they take.
    """

    version: int = Field(23, ge=13, description="Of ai.onnx.")

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``.

        Raises:
            PassError: A node is not an operator of that version.
        """
        found = graph.graph.opset_imports[""]
        for node in graph.graph:
            if not node.domain and (reason := self._refusal(node)):
                name = node.name or node.outputs[0].name
                raise PassError(f"{node.op_type} {name} is no operator of opset {self.version}: {reason}")
        is_lower = self.version < found
        if is_lower:
            graph.graph.opset_imports[""] = self.version
        context.detail("applied", int(is_lower))
        context.detail("declined", [])
        return graph

    def _refusal(self, node: ir.Node) -> str | None:
        """Why a node cannot be one of the version's operators; None where it can."""
        if not onnx.defs.has(node.op_type):
            return None  # ONNX Runtime's own, which it puts into this domain
        try:
            schema = onnx.defs.get_schema(node.op_type, self.version, "")
        except onnx.defs.SchemaError:
            return "there is none of this name"
        if new := sorted(set(node.attributes) - set(schema.attributes)):
            return f"it has no {', '.join(new)}"
        if len(node.inputs) > schema.max_input or len(node.outputs) > schema.max_output:
            return "it has fewer inputs or outputs"
        return None
