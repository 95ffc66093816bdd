"""Compute once what depends on nothing but constants."""

import onnx_ir as ir
from onnxscript.optimizer import fold_constants

from llmopt.optimizer.contracts import GraphPass, PassContext

__all__ = ["FoldConstants"]

_LIMIT = 1 << 16
"""Bytes. Weights are larger: folding would read them, and store a second form of them."""


class FoldConstants(GraphPass):
    """Sums of constants and sizes that are known become constants; weights stay as they are stored."""

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        declined: list[str] = []

        def should_fold(node: ir.Node) -> bool:
            reason = _refusal(node)
            if reason is not None:
                declined.append(f"{_title(node)}: {reason}")
            return reason is None

        main = ir.Model(graph.graph, ir_version=graph.ir_version)  # without functions: their bodies are references
        before = set(main.graph)
        fold_constants(main, input_size_limit=_LIMIT, output_size_limit=_LIMIT, should_fold=should_fold)
        context.detail("applied", len(before - set(main.graph)))
        context.detail("declined", sorted(declined))
        return graph


def _title(node: ir.Node) -> str:
    """A node by its operator and the largest constant it reads: results are often named by their number alone."""
    inputs = (value for value in node.inputs if value is not None)
    sizes = {value.name: value.const_value.nbytes for value in inputs if value.const_value is not None}
    return f"{node.op_type} of {max(sizes, key=sizes.__getitem__)}" if sizes else str(node.outputs[0].name)


def _refusal(node: ir.Node) -> str | None:
    """Why ``node``, whose inputs are all constant, stays; None when it need not."""
    if node.op_type == "DequantizeLinear":
        return "integers would be stored as floats"
    tensors = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
    if any(tensor.nbytes > _LIMIT for tensor in tensors):
        return f"a constant of more than {_LIMIT} bytes would be stored in a second form"
    return None
