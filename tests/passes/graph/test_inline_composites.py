"""Composites that no kernel took become their standard bodies."""

import numpy as np
import onnx
import onnx_ir as ir

X = ("float32", ("batch", "tokens", 8))


def test_a_composite_becomes_its_body(rewrite, graph_of, numbers):
    def write(builder, x, rows):
        rounded = builder.op("QuantizeDequantizePerToken", x, domain="llmopt")
        return builder.op("SelectRows", rounded, rows, domain="llmopt")

    graph = graph_of(write, x=X, rows=("int64", ("rows",)))
    result = rewrite("inline_composites", graph, {"x": numbers(2, 3, 8), "rows": np.array([5, 0, 5])})
    assert result.applied == 2
    assert {node.domain for node in result.graph.graph} == {""}
    assert result.is_identical()


def test_every_composite_of_a_model_is_valid_standard_onnx(rewrite_model, model_of):
    result = rewrite_model("inline_composites", model_of("W8A8"))
    assert result.applied == 3 + 13 + 1  # attentions, roundings, and the selection of rows
    onnx.checker.check_model(ir.to_proto(result.graph), full_check=True)
    assert result.is_identical()


def test_a_composite_that_is_used_twice_gets_values_of_its_own(rewrite, graph_of, numbers):
    def write(builder, x):
        once = builder.op("QuantizeDequantizePerToken", x, domain="llmopt", name="rounded")
        return builder.op("QuantizeDequantizePerToken", builder.op("Sigmoid", once), domain="llmopt", name="again")

    result = rewrite("inline_composites", graph_of(write, x=X), {"x": numbers(2, 3, 8)})
    assert result.applied == 2
    names = [value.name for node in result.graph.graph for value in node.outputs]
    assert len(names) == len(set(names))
    assert result.is_identical()


def test_a_graph_without_composites_is_left(rewrite, graph_of, numbers):
    graph = graph_of(lambda builder, x: builder.op("Sigmoid", x), x=X)
    result = rewrite("inline_composites", graph, {"x": numbers(2, 3, 8)})
    assert result.applied == 0
    assert result.unchanged
