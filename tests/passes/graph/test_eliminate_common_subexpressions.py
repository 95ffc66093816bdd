"""What several nodes compute alike is computed once."""

X = ("float32", ("batch", "tokens", 8))


def test_equal_nodes_become_one_down_the_line(rewrite, graph_of, numbers):
    def write(builder, x):
        return [
            builder.op(last, builder.op("Abs", builder.op("Sigmoid", builder.op("Exp", x)))) for last in ("Neg", "Sqrt")
        ]

    result = rewrite("eliminate_common_subexpressions", graph_of(write, x=X), {"x": numbers(2, 3, 8)})
    assert result.applied == 3
    assert set(result.ops.values()) == {1}
    assert result.is_identical()


def test_another_attribute_or_operand_keeps_nodes_apart(rewrite, graph_of, numbers):
    def write(builder, x):
        weight = builder.constant(numbers(8), "weight")
        norms = [
            builder.op("RMSNormalization", x, weight, axis=-1, epsilon=epsilon, name=f"n{epsilon}")
            for epsilon in (1e-3, 1e-5)
        ]
        return [*norms, builder.op("Sub", x, norms[0]), builder.op("Sub", norms[0], x)]

    result = rewrite("eliminate_common_subexpressions", graph_of(write, x=X), {"x": numbers(2, 3, 8)})
    assert result.applied == 0
    assert result.ops == {"RMSNormalization": 2, "Sub": 2}
    assert result.is_identical()


def test_equal_small_constants_become_one(rewrite, graph_of, numbers):
    def write(builder, x):
        return [
            builder.op("Add", x, builder.op(kind, builder.op("Constant", value_float=0.5))) for kind in ("Exp", "Abs")
        ]

    result = rewrite("eliminate_common_subexpressions", graph_of(write, x=X), {"x": numbers(2, 3, 8)})
    assert result.ops["Constant"] == 1
    assert result.is_identical()


def test_what_layers_derive_from_the_lengths_is_computed_once(rewrite_model, model_of):
    result = rewrite_model("eliminate_common_subexpressions", model_of(), after=["lower_attention"])
    assert (result.ops["ReduceMax"], result.ops["Cast"], result.ops["Sub"]) == (1, 1, 1)
    assert result.is_identical()
