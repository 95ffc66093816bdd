"""The graph builder: names, constants made once, several outputs."""

import numpy as np
import onnx_ir as ir
import pytest

from llmopt.exporters.onnx.builder import GraphBuilder


@pytest.fixture
def builder():
    return GraphBuilder()


def test_nodes_come_in_the_order_they_were_written(builder):
    x = ir.Value(name="x")
    y = builder.op("Abs", x, name="y")
    z = builder.op("Add", x, y)
    assert [node.op_type for node in builder.nodes] == ["Abs", "Add"]
    assert list(builder.nodes[1].inputs) == [x, y]
    assert y.name == "y"
    assert z.producer() is builder.nodes[1]


def test_attributes_and_the_domain_go_where_they_belong(builder):
    value = builder.op("Made", ir.Value(name="x"), domain="llmopt", axis=-1, epsilon=0.5, name="made")
    node = value.producer()
    assert (node.domain, node.op_type) == ("llmopt", "Made")
    assert node.attributes["axis"].as_int() == -1
    assert node.attributes["epsilon"].as_float() == 0.5
    assert "domain" not in node.attributes


def test_an_input_may_be_left_out(builder):
    x = ir.Value(name="x")
    assert list(builder.op("Clip", x, None, x).producer().inputs) == [x, None, x]


def test_several_outputs_have_their_names(builder):
    values = builder.op_multi("Split", ir.Value(name="x"), names=["a", "b", "c"], axis=0)
    assert [value.name for value in values] == ["a", "b", "c"]
    assert list(values[0].producer().outputs) == values


def test_equal_constants_are_made_once_under_the_first_name(builder):
    first = builder.constant(np.arange(4, dtype=np.float32), "first")
    second = builder.constant(np.arange(4, dtype=np.float32), "second")
    assert first is second
    assert [value.name for value in builder.initializers] == ["first"]


@pytest.mark.parametrize(
    "other", [np.arange(4, dtype=np.int32), np.zeros((2, 2), np.float32), np.zeros((1, 4), np.float32)]
)
def test_constants_of_another_type_or_shape_are_not_equal(builder, other):
    first = builder.constant(np.zeros(4, np.float32), "first")
    assert builder.constant(other, "other") is not first
    assert len(builder.initializers) == 2


def test_a_transposed_constant_keeps_its_numbers(builder):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    straight, turned = builder.constant(array, "a"), builder.constant(array.T, "b")
    np.testing.assert_array_equal(straight.const_value.numpy(), array)
    np.testing.assert_array_equal(turned.const_value.numpy(), array.T)


def test_an_initializer_has_its_tensors_name(builder):
    value = builder.initializer(ir.tensor(np.ones(2, np.float32), name="weight"))
    assert value.name == "weight"
    assert value.is_initializer() or value.const_value is not None
