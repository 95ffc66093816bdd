"""The first node that differs between two graphs is found by the names that both have."""

import numpy as np
import onnx_ir as ir
import pytest

from llmopt.exporters.onnx.divergence import first_divergence, relative_errors
from llmopt.exporters.onnx.sessions import Sessions
from llmopt.exporters.onnx.standard import standard_graph


def named(graph, name):
    return next(value for node in graph.graph for value in node.outputs if value.name == name)


def scaled(graph, name):
    """Everything that reads the value reads 1.5 times it; the product takes its name."""
    value = named(graph, name)
    factor = ir.node("Constant", [], attributes={"value_float": 1.5})
    product = ir.node("Mul", [value, factor.outputs[0]])
    graph.graph.insert_after(value.producer(), [factor, product])
    for user, index in value.uses():
        if user is not product:
            user.replace_input_with(index, product.outputs[0])
    value.name, product.outputs[0].name = f"val_{name}", name
    product.outputs[0].type, product.outputs[0].shape = value.type, value.shape


@pytest.fixture
def located(model_of, tmp_path):
    model, sessions = model_of(num_hidden_layers=1), Sessions(tmp_path)

    def locate(change, *, call=0):
        graphs = []
        for changed in (False, True):
            graph = standard_graph(model, capacity=32)
            ir.passes.common.ShapeInferencePass()(graph)
            if changed:
                change(graph)
            graphs.append(sessions.serialized(graph))
        return first_divergence(sessions, tuple(graphs), model.decoder, call=call, seed=0, limit=1e-4)

    return locate


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.input_layernorm.output", "model.layers.0.attention.output", "model.layers.0.mlp.activated"],
)
def test_the_first_value_that_differs_is_named_with_its_operator(located, name):
    assert located(lambda graph: scaled(graph, name)) == f"Mul {name}"


def test_graphs_that_only_differ_in_names_do_not_differ(located):
    def rename(graph):
        for node in graph.graph:
            node.name = f"renamed.{node.name}"

    assert located(rename) == "the logits"


def test_names_that_were_counted_up_are_not_compared(located):
    def confuse(graph):
        anonymous = [value for node in graph.graph for value in node.outputs if value.name.startswith("val_")]
        for value, other in zip(anonymous, reversed([value.name for value in anonymous]), strict=True):
            value.name = other
        scaled(graph, "model.layers.0.mlp.product")

    assert located(confuse) == "Mul model.layers.0.mlp.product"


def test_picked_rows_are_compared_with_the_rows_of_what_they_were_picked_from(located):
    def pick(graph):
        picked = named(graph, "logits")
        made_by = named(graph, "lm_head.output").producer()
        rows = picked.producer().inputs[1]
        hidden = ir.node("SelectRows", [made_by.inputs[0], rows], domain="llmopt")
        doubled = ir.node("Add", [hidden.outputs[0], hidden.outputs[0]])
        head = ir.node("MatMul", [doubled.outputs[0], made_by.inputs[1]])
        graph.graph.insert_before(picked.producer(), [hidden, doubled, head])
        doubled.outputs[0].name, hidden.outputs[0].name = "model.norm.output.rows", "picked"
        for value in (doubled.outputs[0], hidden.outputs[0]):
            value.type = ir.TensorType(ir.DataType.FLOAT)
        picked.producer().replace_input_with(0, head.outputs[0])
        picked.producer().replace_input_with(1, named_rows(graph, rows))

    def named_rows(graph, rows):
        count = ir.node("Shape", [rows])
        scalar = ir.node("Squeeze", [count.outputs[0]])
        zero, one = (ir.node("Constant", [], attributes={"value_int": number}) for number in (0, 1))
        numbers = ir.node("Range", [zero.outputs[0], scalar.outputs[0], one.outputs[0]])
        made = named(graph, "logits").producer()
        graph.graph.insert_before(made, [count, scalar, zero, one, numbers])
        return numbers.outputs[0]

    assert located(pick, call=1) == "Add model.norm.output.rows"


def test_errors_are_relative_to_the_spread_of_each_row():
    expected = np.array([[1.0, 3.0], [10.0, 30.0], [5.0, 5.0]], np.float32)
    found = expected + np.array([[0.1], [0.1], [0.0]], np.float32)
    np.testing.assert_allclose(relative_errors(expected, found), [0.1, 0.01, 0.0], rtol=1e-5)
    assert np.isnan(relative_errors(expected, np.full_like(expected, np.nan))).all()
