"""A norm computes the same under its other name."""

X = ("float32", ("batch", "tokens", "heads", 8))


def test_every_rms_norm_has_the_other_name_and_the_same_result(rewrite, graph_of, numbers):
    def write(builder, x):
        first = builder.op("RMSNormalization", x, builder.constant(numbers(8), "first"))
        second = builder.constant(numbers(8), "second")
        return builder.op("RMSNormalization", first, second, epsilon=1e-3, axis=-1, stash_type=1)

    result = rewrite("lower_norm", graph_of(write, x=X), {"x": numbers(2, 3, 4, 8)}, {"x": numbers(1, 1, 4, 8)})
    assert (result.ops, result.applied) == ({"SimplifiedLayerNormalization": 2}, 2)
    assert result.difference() < 1e-6  # eight squares, added in another order


def test_other_norms_are_left(rewrite, graph_of, numbers):
    def write(builder, x):
        return builder.op("LayerNormalization", x, builder.constant(numbers(8), "scale"))

    result = rewrite("lower_norm", graph_of(write, x=X), {"x": numbers(2, 3, 4, 8)})
    assert (result.unchanged, result.applied) == (True, 0)
