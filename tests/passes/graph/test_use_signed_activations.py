"""Rounded activations as signed integers: the same numbers, with no zero point."""

import numpy as np
import onnx_ir as ir

from llmopt.exporters.onnx.builder import GraphBuilder
from llmopt.exporters.onnx.composites import DOMAIN, quantize_dequantize_static
from llmopt.exporters.onnx.standard import IR_VERSION
from llmopt.optimizer.contracts import PassContext
from llmopt.passes.graph.inline_composites import InlineComposites
from llmopt.passes.graph.use_signed_activations import UseSignedActivations


def rounding_graph(kind: str) -> ir.Model:
    builder = GraphBuilder()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([3, 8]))
    function = quantize_dequantize_static(kind)
    y = builder.op(function.name, x, builder.constant(np.float32(0.05), "scale"), name="y", domain=DOMAIN)
    y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), x.shape
    graph = ir.Graph(
        [x], [y], nodes=builder.nodes, initializers=builder.initializers, opset_imports={"": 24, DOMAIN: 1}, name="r"
    )
    model = ir.Model(graph, ir_version=IR_VERSION, functions=[function])
    return InlineComposites().run(model, PassContext())


def test_the_numbers_are_the_same(rewrite):
    x = np.linspace(-8, 8, 24, dtype=np.float32).reshape(3, 8)  # beyond the range at both ends

    result = rewrite("use_signed_activations", rounding_graph("int"), {"x": x})

    assert result.is_identical()
    assert result.applied == 1
    kinds = {node.inputs[2].dtype for node in result.graph.graph if node.op_type.endswith("eLinear")}
    assert kinds == {ir.DataType.INT8}


def test_fp8_stays_as_it_is():
    details = {}

    UseSignedActivations().run(rounding_graph("float"), PassContext(detail=details.__setitem__))

    assert details["applied"] == 0
