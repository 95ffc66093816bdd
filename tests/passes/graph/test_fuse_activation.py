"""x * sigmoid(x) as one operator, whichever operand comes first."""

import numpy as np
import onnx_ir as ir
import pytest

X = ("float32", (2, "tokens", 8))
CLOSE = 1e-6
"""QuickGelu evaluates the same formula with another approximation of exp: a few units in the last place."""


def silu(builder, x):
    return builder.op("Mul", x, builder.op("Sigmoid", x))


def silu_exchanged(builder, x):
    return builder.op("Mul", builder.op("Sigmoid", x), x)


@pytest.mark.parametrize("write", [silu, silu_exchanged])
def test_both_orders_become_one_operator(rewrite, graph_of, numbers, write):
    result = rewrite("fuse_activation", graph_of(write, x=X), {"x": 10 * numbers(2, 3, 8)})
    assert result.applied == 1
    assert result.ops == {"QuickGelu": 1}
    assert result.difference() < CLOSE


def test_large_values_do_not_overflow(rewrite, graph_of):
    x = np.array([-1e38, -1e4, -100, -0.0, 0.0, 100, 1e4, 1e38] * 2, np.float32).reshape(2, 1, 8)
    result = rewrite("fuse_activation", graph_of(silu, x=X), {"x": x})
    assert result.applied == 1
    np.testing.assert_allclose(result.after[0][0], result.before[0][0], rtol=1e-6, atol=1e-30)


def test_every_layer_of_a_model_has_one(rewrite_model, model_of):
    result = rewrite_model("fuse_activation", model_of())
    assert result.applied == 3
    assert result.ops["Sigmoid"] == 0
    assert result.difference() < CLOSE


def test_the_sigmoid_of_another_value_is_left(rewrite, graph_of, numbers):
    def write(builder, x, y):
        return builder.op("Mul", x, builder.op("Sigmoid", y))

    result = rewrite("fuse_activation", graph_of(write, x=X, y=X), {"x": numbers(2, 3, 8), "y": numbers(2, 3, 8)})
    assert result.applied == 0
    assert result.unchanged


def test_a_sigmoid_that_is_used_elsewhere_is_left(rewrite, graph_of, numbers):
    def write(builder, x):
        sigmoid = builder.op("Sigmoid", x)
        return builder.op("Mul", x, sigmoid), sigmoid

    result = rewrite("fuse_activation", graph_of(write, x=X), {"x": numbers(2, 3, 8)})
    assert result.applied == 0
    assert result.unchanged


def test_a_type_without_a_kernel_is_declined(rewrite, graph_of, numbers):
    def write(builder, x):
        wide = builder.op("Cast", x, to=ir.DataType.DOUBLE.value)
        return builder.op("Cast", silu(builder, wide), to=ir.DataType.FLOAT.value)

    result = rewrite("fuse_activation", graph_of(write, x=X), {"x": numbers(2, 3, 8)})
    assert result.applied == 0
    assert result.unchanged
    (reason,) = result.declined
    assert reason.endswith("QuickGelu has no CPU kernel for DOUBLE")
