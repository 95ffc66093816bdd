"""A graph computes the same under an older number, and what that version lacks is named."""

import numpy as np
import onnx_ir as ir
import pytest

from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import PassError
from llmopt.passes.graph.lower_opset import LowerOpset

X = ("float32", ("batch", "tokens", 8))


def test_the_same_nodes_are_of_an_older_opset(rewrite, graph_of, numbers):
    def write(builder, x):
        axes = builder.constant(np.array([0]), "axes")
        squeezed = builder.op("Squeeze", builder.op("Unsqueeze", x, axes), axes)
        return builder.op("Cast", builder.op("Shape", squeezed), to=ir.DataType.FLOAT.value)

    result = rewrite("lower_opset", graph_of(write, x=X), {"x": numbers(2, 3, 8)})
    assert result.graph.graph.opset_imports[""] == 23
    assert (result.applied, result.declined) == (1, [])
    assert result.is_identical()


def test_an_operator_that_is_newer_is_an_error_with_its_name():
    values = [ir.Value(name=name) for name in ("cache", "update")]
    node = ir.node("TensorScatter", values, name="layers.0.cache")
    graph = ir.Model(ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 24}), ir_version=10)
    with pytest.raises(PassError, match=r"TensorScatter layers\.0\.cache is no operator of opset 23: there is none"):
        run(graph)


def test_an_attribute_that_is_newer_is_an_error_with_its_name():
    value = ir.Value(name="x")
    node = ir.node("Cast", [value], {"to": 1, "round_mode": "up"}, name="cast")
    graph = ir.Model(ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 24}), ir_version=10)
    with pytest.raises(PassError, match="it has no round_mode"):
        run(graph)


def test_an_input_that_is_newer_is_an_error():
    values = [ir.Value(name=f"x{number}") for number in range(7)]
    node = ir.node("Attention", values, name="attention")
    graph = ir.Model(ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 24}), ir_version=10)
    with pytest.raises(PassError, match="it has fewer inputs"):
        run(graph)


def run(graph):
    return LowerOpset().run(graph, PassContext())
