"""A residual sum and the norm that reads it as one operator."""

import numpy as np
import pytest

X = ("float32", ("batch", "tokens", 8))
CLOSE = 2e-6
"""The fused kernel sums the squares in another order."""


def writer(weight, *, exchanged=False, keep_sum=True, **attributes):
    def write(builder, x, y):
        total = builder.op("Add", *((y, x) if exchanged else (x, y)), name="residual")
        settings = {"axis": -1, "epsilon": 1e-3} | attributes
        normed = builder.op("RMSNormalization", total, builder.constant(weight, "norm.weight"), **settings)
        return (normed, total) if keep_sum else normed

    return write


@pytest.fixture
def feeds(numbers):
    return {"x": numbers(2, 3, 8), "y": numbers(2, 3, 8)}


@pytest.mark.parametrize("keep_sum", [True, False])
@pytest.mark.parametrize("exchanged", [True, False])
def test_sum_and_norm_become_one_operator(rewrite, graph_of, numbers, feeds, exchanged, keep_sum):
    write = writer(numbers(8), exchanged=exchanged, keep_sum=keep_sum)
    result = rewrite("fuse_norm", graph_of(write, x=X, y=X), feeds)
    assert result.applied == 1
    assert result.ops == {"SkipSimplifiedLayerNormalization": 1}
    assert result.difference() < CLOSE


def test_the_epsilon_is_kept(rewrite, graph_of, feeds):
    write = writer(np.ones(8, np.float32), epsilon=100.0)
    result = rewrite("fuse_norm", graph_of(write, x=X, y=X), feeds)
    assert result.applied == 1
    assert result.difference() < CLOSE


def test_a_norm_over_the_last_axis_counted_from_the_front_is_fused(rewrite, graph_of, numbers, feeds):
    result = rewrite("fuse_norm", graph_of(writer(numbers(8), axis=2), x=X, y=X), feeds)
    assert result.applied == 1
    assert result.difference() < CLOSE


def test_picked_rows_are_fused_too(rewrite, graph_of, numbers):
    x = ("float32", ("rows", 8))
    result = rewrite("fuse_norm", graph_of(writer(numbers(8)), x=x, y=x), {"x": numbers(5, 8), "y": numbers(5, 8)})
    assert result.applied == 1
    assert result.difference() < CLOSE


@pytest.mark.parametrize("biased", [False, True])
def test_a_model_has_two_a_layer_but_for_its_first_norm_and_one_behind_the_layers(rewrite_model, model_of, biased):
    result = rewrite_model("fuse_norm", model_of(attention_bias=biased, mlp_bias=biased))
    assert result.applied == 6
    assert result.ops["RMSNormalization"] == 1
    assert result.difference() < CLOSE


@pytest.mark.parametrize(
    ("family_name", "fused", "left"),
    [
        ("gemma2", 6, 7),  # of four norms a layer, two read what a branch adds
        ("olmo2", 1, 12),  # norms of branches, and of query and key; the last one reads a sum
        ("granite", 6, 1),  # branches are multiplied before they are added
        ("qwen3", 6, 7),  # and norms of query and key
        ("falcon", 0, 0),  # LayerNorms stay operators of their own
    ],
)
def test_every_family_has_its_sums_and_norms_fused(rewrite_model, family_model, family_name, fused, left):
    result = rewrite_model("fuse_norm", family_model(family_name))
    assert result.applied == fused
    assert result.ops["RMSNormalization"] == left
    assert result.unchanged == (fused == 0)
    assert result.difference() < 1e-5  # several norms one behind the other


def test_the_picked_rows_of_a_model_are_fused(rewrite_model, model_of):
    assert rewrite_model("fuse_norm", model_of(), after=["select_rows"]).applied == 6


def test_a_broadcast_operand_is_declined(rewrite, graph_of, numbers):
    graph = graph_of(writer(numbers(8)), x=X, y=("float32", ("batch", 1, 8)))
    result = rewrite("fuse_norm", graph, {"x": numbers(2, 3, 8), "y": numbers(2, 1, 8)})
    assert result.applied == 0
    assert result.unchanged
    assert "the residual's operands differ in shape" in result.declined[0]


def test_operands_of_unknown_shape_are_declined(rewrite, graph_of, numbers):
    unknown = ("float32", (None, None, 8))
    graph = graph_of(writer(numbers(8)), x=unknown, y=unknown)
    result = rewrite("fuse_norm", graph, {"x": numbers(2, 3, 8), "y": numbers(2, 1, 8)})
    assert result.applied == 0
    assert result.unchanged
    assert result.declined


def test_a_norm_over_two_axes_is_declined(rewrite, graph_of, numbers):
    x = ("float32", ("batch", 3, 8))
    graph = graph_of(writer(numbers(3, 8), axis=1), x=x, y=x)
    result = rewrite("fuse_norm", graph, {"x": numbers(2, 3, 8), "y": numbers(2, 3, 8)})
    assert result.applied == 0
    assert result.unchanged
    assert result.declined == [f"{graph.graph[-1].outputs[0].name}: the norm is not over the last axis alone"]


def test_four_dimensions_are_declined(rewrite, graph_of, numbers):
    x = ("float32", (2, 2, 3, 8))
    result = rewrite(
        "fuse_norm", graph_of(writer(numbers(8)), x=x, y=x), {"x": numbers(2, 2, 3, 8), "y": numbers(2, 2, 3, 8)}
    )
    assert result.applied == 0
    assert result.unchanged
    assert "two or three dimensions, not 4" in result.declined[0]


def test_a_norm_of_something_else_is_left(rewrite, graph_of, numbers):
    def write(builder, x):
        return builder.op("RMSNormalization", x, builder.constant(numbers(8), "norm.weight"), axis=-1)

    result = rewrite("fuse_norm", graph_of(write, x=X), {"x": numbers(2, 3, 8)})
    assert result.applied == 0
    assert result.unchanged
