"""What no output depends on is gone; the engine's inputs and outputs stay."""

X = ("float32", ("batch", "tokens", 8))


def test_a_chain_that_nothing_reads_is_removed_with_its_weights(rewrite, graph_of, numbers):
    def write(builder, x):
        builder.op("Sigmoid", builder.op("MatMul", x, builder.constant(numbers(8, 8), "unread")))
        return builder.op("MatMul", x, builder.constant(numbers(8, 8), "read"))

    result = rewrite("eliminate_dead_code", graph_of(write, x=X), {"x": numbers(2, 3, 8)})
    assert result.ops == {"MatMul": 1}
    assert list(result.graph.graph.initializers) == ["read"]
    # two nodes, a weight, the functions and operator sets that every small graph of these tests imports
    assert result.applied == 2 + 1 + 5 + 2
    assert result.is_identical()


def test_inputs_and_outputs_stay(rewrite, graph_of, numbers):
    def write(builder, x, y):
        return x_only(builder, x), builder.op("Exp", x)

    def x_only(builder, x):
        return builder.op("Abs", x)

    result = rewrite("eliminate_dead_code", graph_of(write, x=X, y=X), {"x": numbers(1, 2, 8), "y": numbers(1, 2, 8)})
    assert [value.name for value in result.graph.graph.inputs] == ["x", "y"]
    assert len(result.graph.graph.outputs) == 2
    assert result.is_identical()


def test_a_node_with_one_output_that_is_read_stays(rewrite, graph_of, numbers):
    def write(builder, x):
        first, _ = builder.op_multi("Split", x, axis=-1, num_outputs=2, names=["first", "second"])
        return builder.op("Abs", first)

    result = rewrite("eliminate_dead_code", graph_of(write, x=X), {"x": numbers(2, 3, 8)})
    assert result.ops == {"Split": 1, "Abs": 1}
    assert result.is_identical()


def test_composites_that_are_used_keep_their_functions(rewrite_model, model_of):
    result = rewrite_model("eliminate_dead_code", model_of("W8A8", num_hidden_layers=1))
    names = {function.name for function in result.graph.functions.values()}
    assert names == {"SlotAttention", "QuantizeDequantizePerToken", "SelectRows"}
    assert result.applied == 0
    assert result.unchanged
