"""Equal initializers are stored once, and no large weight is read to find them."""

import numpy as np
import onnx_ir as ir
import pytest

X = ("float32", ("batch", "tokens", 8))


def times(*weights):
    """Writes ``x`` times each weight, an array or a tensor."""

    def write(builder, x):
        values = []
        for i, weight in enumerate(weights):
            tensor = ir.tensor(weight) if isinstance(weight, np.ndarray) else weight
            tensor.name = f"weight{i}"
            values.append(builder.initializer(tensor))
        return [builder.op("Mul", x, value) for value in values]

    return write


def lazy(array, reads):
    def make():
        reads.append(1)
        return ir.tensor(array)

    return ir.LazyTensor(make, dtype=ir.DataType(ir.tensor(array).dtype), shape=ir.Shape(array.shape), name="lazy")


@pytest.fixture
def feeds(numbers):
    return {"x": numbers(2, 3, 8)}


def test_equal_weights_become_one(rewrite, graph_of, numbers, feeds):
    first, other = numbers(8), numbers(8)
    result = rewrite("share_weights", graph_of(times(first, other, first.copy(), first.copy()), x=X), feeds)
    assert result.applied == 2
    assert list(result.graph.graph.initializers) == ["weight0", "weight1"]
    assert result.is_identical()


def test_the_same_bytes_in_another_shape_or_type_stay(rewrite, graph_of, feeds):
    zeros = [np.zeros(8, np.float32), np.zeros((1, 8), np.float32), np.zeros((1, 1, 8), np.float32)]
    result = rewrite("share_weights", graph_of(times(*zeros), x=X), feeds)
    assert result.applied == 0
    assert result.unchanged


def test_small_weights_are_compared_before_the_engine_is_written(rewrite, graph_of, numbers, feeds):
    array = numbers(8)
    result = rewrite("share_weights", graph_of(times(lazy(array, []), lazy(array, [])), x=X), feeds)
    assert (result.applied, result.declined) == (1, [])
    assert result.is_identical()


def test_large_weights_that_are_not_in_memory_are_not_read(rewrite, graph_of, numbers):
    array, reads = numbers(3, 8192), []
    wide = ("float32", ("batch", 3, 8192))
    graph = graph_of(times(lazy(array, reads), lazy(array, reads)), x=wide)
    result = rewrite("share_weights", graph)
    assert (result.applied, result.unchanged) == (0, True)
    assert result.declined == ["2 initializers of more than 65536 bytes: to compare them is to read the model"]
    # the fixture saves both weights four times, the pass reads none
    assert len(reads) == 8


def test_large_weights_in_memory_are_compared(rewrite, graph_of, numbers):
    array = numbers(3, 8192)
    result = rewrite("share_weights", graph_of(times(array, array.copy()), x=("float32", ("batch", 3, 8192))))
    assert (result.applied, result.declined) == (1, [])


def test_four_bit_weights_are_compared_by_their_values(rewrite, graph_of, feeds):
    def write(builder, x):
        scale = builder.constant(np.float32(0.5), "scale")
        values = [np.arange(8, dtype=np.int8) - 4, np.arange(8, dtype=np.int8)[::-1] - 4]
        outputs = []
        for i, which in enumerate((0, 1, 0)):
            tensor = ir.tensor(np.ascontiguousarray(values[which]), dtype=ir.DataType.INT4, name=f"values{i}")
            weight = builder.op("DequantizeLinear", builder.initializer(tensor), scale)
            outputs.append(builder.op("Mul", x, weight))
        return outputs

    result = rewrite("share_weights", graph_of(write, x=X), feeds)
    assert result.applied == 1
    assert result.is_identical()
