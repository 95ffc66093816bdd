"""Turn every float of a graph into one of 16 bits, except the logits or vectors that leave it."""

from typing import Literal

import onnx_ir as ir
from pydantic import Field

from llmopt.optimizer.contracts import GraphPass, PassContext
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.graph_precision import set_precision

__all__ = ["UseHalfPrecision"]


class UseHalfPrecision(GraphPass):
    """For executors that compute in float16 or bfloat16. Norms still add in float32, as their operators say."""

    dtype: Literal["float16", "bfloat16"] = Field("float16", description="What floats become.")

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``.

        Raises:
            PassError: A composite is left, or a constant or scale is outside of the type's range. Of weights the
                latter is found when the file is written.
        """
        if left := [str(node.outputs[0].name) for node in graph.graph if node.op_identifier() in graph.functions]:
            raise PassError(
                f"{left[0]} is a composite, whose body would stay in float32", hint="inline_composites first"
            )
        context.detail("applied", set_precision(graph, self.dtype))
        context.detail("declined", [])
        return graph
