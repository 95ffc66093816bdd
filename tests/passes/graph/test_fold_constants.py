"""What depends on constants alone is computed once; weights stay as they are stored."""

import numpy as np
import onnx_ir as ir

X = ("float32", ("batch", "tokens", 8))


def test_a_sum_of_constants_becomes_a_constant(rewrite, graph_of, numbers):
    def write(builder, x):
        first, second = (builder.constant(numbers(8), name) for name in ("first", "second"))
        return builder.op("Add", x, builder.op("Mul", first, builder.op("Add", first, second)))

    result = rewrite("fold_constants", graph_of(write, x=X), {"x": numbers(2, 3, 8)})
    assert result.applied == 2
    assert {kind for kind in result.ops if kind != "Constant"} == {"Add"}
    assert result.is_identical()


def test_a_size_that_is_known_becomes_a_constant(rewrite, graph_of, numbers):
    def write(builder, x):
        size = builder.op("Concat", builder.op("Constant", value_ints=[-1]), builder.op("Shape", x, start=-1), axis=0)
        return builder.op("Reshape", x, size)

    result = rewrite("fold_constants", graph_of(write, x=X), {"x": numbers(2, 3, 8)})
    assert result.applied == 2
    assert {kind for kind in result.ops if kind != "Constant"} == {"Reshape"}
    assert result.is_identical()


def test_a_size_that_each_call_decides_stays(rewrite, graph_of, numbers):
    graph = graph_of(lambda builder, x: builder.op("Shape", x, start=0, end=2), x=X)
    graph.graph.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    result = rewrite("fold_constants", graph, {"x": numbers(2, 3, 8)}, {"x": numbers(1, 4, 8)})
    assert result.applied == 0
    assert result.unchanged
    assert result.is_identical()


def test_a_weight_is_not_stored_in_a_second_form(rewrite, graph_of, numbers):
    table = numbers(4096, 8)

    def write(builder, x):
        weight = builder.op("Transpose", builder.constant(table, "table"), perm=[1, 0], name="transposed")
        return builder.op("MatMul", x, weight)

    result = rewrite("fold_constants", graph_of(write, x=X), {"x": numbers(2, 3, 8)})
    assert result.applied == 0
    assert result.unchanged
    assert result.declined == [
        "Transpose of table: a constant of more than 65536 bytes would be stored in a second form"
    ]


def test_no_weight_is_read(rewrite, graph_of):
    reads = []

    def make():
        reads.append(1)
        return ir.tensor(np.ones((4096, 8), np.float32))

    def write(builder, x):
        tensor = ir.LazyTensor(make, dtype=ir.DataType.FLOAT, shape=ir.Shape((4096, 8)), name="table")
        return builder.op("MatMul", x, builder.op("Transpose", builder.initializer(tensor), perm=[1, 0]))

    rewrite("fold_constants", graph_of(write, x=X))
    assert len(reads) == 4  # by the fixture, which saves the graph twice before and twice after


def test_integers_are_not_stored_as_floats(rewrite, graph_of, numbers):
    def write(builder, x):
        values = builder.constant(np.arange(64, dtype=np.int8).reshape(8, 8), "values")
        scale = builder.constant(np.float32(0.5), "scale")
        return builder.op("MatMul", x, builder.op("DequantizeLinear", values, scale, name="weight"))

    result = rewrite("fold_constants", graph_of(write, x=X), {"x": numbers(2, 3, 8)})
    assert result.applied == 0
    assert result.unchanged
    assert result.declined == ["DequantizeLinear of values: integers would be stored as floats"]


def test_the_bodies_of_composites_are_left(rewrite_model, model_of):
    result = rewrite_model("fold_constants", model_of(num_hidden_layers=1))
    bodies = {function.name: [node.op_type for node in function] for function in result.graph.functions.values()}
    assert "Shape" in bodies["SelectRows"]
    assert "Constant" in bodies["SlotAttention"]
