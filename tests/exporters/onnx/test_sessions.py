"""Graphs at several stages share one file of weights, and stay what they were."""

import numpy as np
import onnx_ir as ir
import pytest

from llmopt.exporters.onnx.builder import GraphBuilder
from llmopt.exporters.onnx.sessions import Sessions

COLUMNS = 512


class Counted:
    """Weights that count how often they are read."""

    def __init__(self, **arrays):
        self.reads = []
        self.tensors = {name: self._tensor(name, array) for name, array in arrays.items()}

    def _tensor(self, name, array):
        def make():
            self.reads.append(name)
            return ir.tensor(array, name=name)

        return ir.LazyTensor(make, dtype=ir.tensor(array).dtype, shape=ir.Shape(array.shape), name=name)


def sum_of(*tensors):
    """``x`` plus each tensor."""
    builder = GraphBuilder()
    x = y = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((1, COLUMNS)))
    for tensor in tensors:
        y = builder.op("Add", y, builder.initializer(tensor))
    y.name, y.type, y.shape = "y", x.type, x.shape
    graph = ir.Graph(
        [x], [y], nodes=builder.nodes, initializers=builder.initializers, opset_imports={"": 24}, name="sum"
    )
    return ir.Model(graph, ir_version=11)


@pytest.fixture
def weights():
    generator = np.random.default_rng(0)
    return Counted(**{name: generator.standard_normal((1, COLUMNS), np.float32) for name in ("a", "b", "c")})


def test_a_graph_runs_from_its_bytes_and_the_folder(tmp_path, weights):
    sessions = Sessions(tmp_path)
    data = sessions.serialized(sum_of(*weights.tensors.values()))
    x = np.ones((1, COLUMNS), np.float32)
    (y,) = sessions.open(data).run(["y"], {"x": x})
    expected = x
    for tensor in weights.tensors.values():
        expected = expected + tensor.numpy()
    np.testing.assert_array_equal(y, expected)
    assert len(data) < 1024


def test_a_weight_of_two_graphs_is_read_and_written_once(tmp_path, weights):
    sessions, (a, b, c) = Sessions(tmp_path), weights.tensors.values()
    sessions.serialized(sum_of(a, b))
    size = (tmp_path / "weights").stat().st_size
    sessions.serialized(sum_of(b, a))
    assert (tmp_path / "weights").stat().st_size == size
    sessions.serialized(sum_of(a, c))
    assert weights.reads == ["a", "b", "c"]


def test_the_graph_keeps_its_own_tensors(tmp_path, weights):
    graph = sum_of(*weights.tensors.values())
    before = {name: value.const_value for name, value in graph.graph.initializers.items()}
    Sessions(tmp_path).serialized(graph)
    assert all(value.const_value is before[name] for name, value in graph.graph.initializers.items())


def test_equal_graphs_are_equal_bytes(tmp_path, weights):
    sessions, (a, b, _) = Sessions(tmp_path), weights.tensors.values()
    assert sessions.serialized(sum_of(a, b)) == sessions.serialized(sum_of(a, b))
    assert sessions.serialized(sum_of(a, b)) != sessions.serialized(sum_of(b, a))


def test_four_bit_weights_are_what_they_were(tmp_path):
    generator = np.random.default_rng(1)
    values = generator.integers(-8, 8, (COLUMNS, 8)).astype(np.int8)
    builder = GraphBuilder()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((1, COLUMNS)))
    weight = builder.initializer(ir.tensor(values, dtype=ir.DataType.INT4, name="values"))
    scale = builder.constant(np.float32(0.5), "scale")
    y = builder.op("MatMul", x, builder.op("DequantizeLinear", weight, scale), name="y")
    y.type = x.type
    graph = ir.Graph(
        [x], [y], nodes=builder.nodes, initializers=builder.initializers, opset_imports={"": 24}, name="product"
    )
    sessions = Sessions(tmp_path)
    data = sessions.serialized(ir.Model(graph, ir_version=11))
    ones = generator.integers(-3, 4, (1, COLUMNS)).astype(np.float32)
    (found,) = sessions.open(data).run(["y"], {"x": ones})
    np.testing.assert_array_equal(found, ones @ (values * 0.5))
