"""Adapters behind linears become one operator for all that were packed into one."""

import numpy as np
import onnx_ir as ir
import pytest

from llmopt.exporters.onnx.composites import lora_add
from llmopt.optimizer.kernels import DOMAIN

MAX_RANK, INPUTS, WIDTH = 4, 8, 20
PARTS = ([0, 0, 32, 0, 6, 0], [1, 56, 88, 7, 6, 0], [2, 112, 144, 13, 6, 0])


@pytest.fixture
def chain(graph_of):
    """``chain(count)``: linears' results in columns of ``y``, with an adapter each."""

    def make(count, *, other_input=False, kept=False):
        def write(builder, y, x, z, adapters, factors, ranks):
            outputs = []
            for number in range(count):
                part = builder.constant(np.array([PARTS[number]]), f"part{number}")
                read = z if other_input and number else x
                inputs = (y, read, adapters, factors, ranks, part)
                y = builder.op("LoraAdd", *inputs, name=f"y{number}", domain="llmopt", max_rank=MAX_RANK)
                y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(("n", WIDTH))
                outputs.append(y)
            return outputs if kept else outputs[-1:]

        graph = graph_of(
            write,
            y=("float32", ("n", WIDTH)),
            x=("float32", ("n", INPUTS)),
            z=("float32", ("n", INPUTS)),
            adapters=("int64", ("n", 1)),
            factors=("float32", (2, 168)),
            ranks=("int64", (2, 3)),
        )
        function = lora_add(biased=False)
        graph.functions[function.identifier()] = function
        return graph

    return make


@pytest.fixture
def feeds(numbers):
    return {
        "y": numbers(5, WIDTH),
        "x": numbers(5, INPUTS),
        "z": numbers(5, INPUTS),
        "adapters": np.array([[0], [2], [1], [1], [0]]),
        "factors": numbers(2, 168),
        "ranks": np.array([[4, 2, 0], [1, 4, 3]]),
    }


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_operator_adds_to_all_linears_of_an_input(rewrite, chain, feeds, count):
    result = rewrite("lower_lora", chain(count), feeds)
    (node,) = [node for node in result.graph.graph if node.op_type == "LoraAdd"]
    assert node.domain == DOMAIN
    assert node.inputs[5].const_value.numpy().tolist() == [*map(list, PARTS[:count])]
    assert result.applied == 2 * count - 1
    assert result.difference() < 1e-5


def test_linears_of_other_inputs_keep_their_own(rewrite, chain, feeds):
    result = rewrite("lower_lora", chain(2, other_input=True), feeds)
    assert result.ops["LoraAdd"] == 2
    assert result.difference() < 1e-5


def test_a_result_that_is_read_twice_stays(rewrite, chain, feeds):
    result = rewrite("lower_lora", chain(2, kept=True), feeds)
    assert result.ops["LoraAdd"] == 2
    assert result.difference() < 1e-5
