"""Keep the integers of rounded activations signed, around 0, where the kernels take no other zero point."""

import numpy as np
import onnx_ir as ir

from llmopt.optimizer.contracts import GraphPass, PassContext

__all__ = ["UseSignedActivations"]

_MIDDLE = 128


class UseSignedActivations(GraphPass):
    """``QuantizeLinear(x, scale, uint8 128)`` -> ``QuantizeLinear(x, scale, int8 0)``, and its DequantizeLinear too.

    The standard graph has uint8, which the CPU's kernels want. The numbers are the same: -128..127 in either.
    """

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        zero: ir.Value | None = None
        applied = 0
        for node in graph.graph:
            if node.op_type != "QuantizeLinear" or not _is_middle(node):
                continue
            if zero is None:
                zero = ir.Value(
                    name="int8.zero", const_value=ir.tensor(np.int8(0), name="int8.zero"),
                    type=ir.TensorType(ir.DataType.INT8), shape=ir.Shape([]),
                )  # fmt: skip
                graph.graph.register_initializer(zero)
            node.replace_input_with(2, zero)
            node.outputs[0].type = ir.TensorType(ir.DataType.INT8)
            for use in node.outputs[0].uses():
                if use.node.op_type == "DequantizeLinear":
                    use.node.replace_input_with(2, zero)
            applied += 1
        context.detail("applied", applied)
        context.detail("declined", [])
        return graph


def _is_middle(node: ir.Node) -> bool:
    """Whether the zero point is the constant uint8 128, for all numbers."""
    if len(node.inputs) < 3 or node.inputs[2] is None or node.inputs[2].dtype == ir.DataType.INT8:
        return False
    tensor = ir.convenience.get_const_tensor(node.inputs[2])
    return tensor is not None and tensor.dtype == ir.DataType.UINT8 and bool((tensor.numpy() == _MIDDLE).all())
