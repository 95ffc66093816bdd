"""An encoder's attention as one operator: with masks and biases, however its heads come and go."""

import numpy as np
import pytest

HEADS, WIDTH = 2, 4
ROWS = ("float32", ("batch", "tokens", HEADS * WIDTH))
HEADED = ("float32", ("batch", HEADS, "tokens", WIDTH))
CLOSE = 1e-6
"""The kernel scales query and key, where the graph scales their product."""


def ints(builder, *values):
    return builder.constant(np.array(values), f"ints.{'.'.join(map(str, values))}")


def headed(builder, x, perm):
    return builder.op("Transpose", builder.op("Reshape", x, ints(builder, 0, 0, HEADS, WIDTH)), perm=perm)


def attention(builder, scores, value, *, perm=(0, 2, 1, 3)):
    attended = builder.op("MatMul", builder.op("Softmax", scores, axis=-1), value)
    return builder.op("Reshape", builder.op("Transpose", attended, perm=perm), ints(builder, 0, 0, HEADS * WIDTH))


def scaled(builder, query, key, *, by="Mul", number=0.37):
    product = builder.op("MatMul", query, key)
    return builder.op(by, product, builder.constant(np.float32(number), "scale"))


@pytest.fixture
def feeds(numbers):
    mask = np.zeros((3, 1, 1, 5), np.float32)
    mask[1, ..., 3:] = mask[2, ..., 1:] = np.finfo(np.float32).min
    rows = {name: numbers(3, 5, HEADS * WIDTH) for name in ("query", "key", "value")}
    return rows | {"mask": mask, "bias": numbers(3, HEADS, 5, 5)}


def only(feeds, *names):
    return {name: feeds[name] for name in names}


@pytest.mark.parametrize(("by", "number"), [("Mul", 0.37), ("Div", 1.7)])
@pytest.mark.parametrize("exchanged", [False, True])
def test_rows_of_tokens_go_in_and_come_out(rewrite, graph_of, feeds, by, number, exchanged):
    def write(builder, query, key, value, mask):
        parts = headed(builder, query, (0, 2, 1, 3)), headed(builder, key, (0, 2, 3, 1))
        scores = scaled(builder, *parts, by=by, number=number)
        masked = builder.op("Add", *((mask, scores) if exchanged else (scores, mask)))
        return attention(builder, masked, headed(builder, value, (0, 2, 1, 3)))

    graph = graph_of(write, query=ROWS, key=ROWS, value=ROWS, mask=("float32", ("batch", 1, 1, "tokens")))
    result = rewrite("fuse_self_attention", graph, only(feeds, "query", "key", "value", "mask"))
    assert result.applied == 1
    assert result.ops["Attention"] == 1
    assert not result.ops.keys() & {"MatMul", "Softmax", "Transpose", "Reshape"}
    assert result.difference() < CLOSE


def test_a_bias_is_added_to_the_mask(rewrite, graph_of, feeds):
    def write(builder, query, key, value, mask, bias):
        scores = scaled(builder, headed(builder, query, (0, 2, 1, 3)), headed(builder, key, (0, 2, 3, 1)))
        added = builder.op("Add", builder.op("Add", scores, bias), mask)
        return attention(builder, added, headed(builder, value, (0, 2, 1, 3)))

    shapes = {"mask": ("float32", ("batch", 1, 1, "tokens")), "bias": ("float32", ("batch", HEADS, "tokens", "tokens"))}
    result = rewrite("fuse_self_attention", graph_of(write, query=ROWS, key=ROWS, value=ROWS, **shapes), feeds)
    assert result.applied == 1
    assert result.ops == {"Attention": 1, "Add": 1}
    assert result.difference() < CLOSE


def test_without_a_mask_every_token_sees_all(rewrite, graph_of, feeds):
    def write(builder, query, key, value):
        scores = scaled(builder, headed(builder, query, (0, 2, 1, 3)), headed(builder, key, (0, 2, 3, 1)))
        return attention(builder, scores, headed(builder, value, (0, 2, 1, 3)))

    graph = graph_of(write, query=ROWS, key=ROWS, value=ROWS)
    result = rewrite("fuse_self_attention", graph, only(feeds, "query", "key", "value"))
    assert result.ops == {"Attention": 1}
    assert result.difference() < CLOSE


def test_heads_that_something_has_changed_stay_in_front(rewrite, graph_of, numbers):
    def write(builder, query, key, value):
        scores = scaled(builder, query, builder.op("Transpose", key, perm=(0, 1, 3, 2)))
        return attention(builder, scores, value)

    feeds = {name: numbers(3, HEADS, 5, WIDTH) for name in ("query", "key", "value")}
    result = rewrite("fuse_self_attention", graph_of(write, query=HEADED, key=HEADED, value=HEADED), feeds)
    assert result.applied == 1
    assert result.ops == {"Attention": 1, "Transpose": 1, "Reshape": 1}
    assert result.difference() < CLOSE


def test_a_scale_that_is_no_number_is_declined(rewrite, graph_of, feeds):
    def write(builder, query, key, value, mask):
        product = builder.op("MatMul", headed(builder, query, (0, 2, 1, 3)), headed(builder, key, (0, 2, 3, 1)))
        scores = builder.op("Mul", product, builder.op("Exp", mask))
        return attention(builder, scores, headed(builder, value, (0, 2, 1, 3)))

    graph = graph_of(write, query=ROWS, key=ROWS, value=ROWS, mask=("float32", ("batch", 1, 1, "tokens")))
    result = rewrite("fuse_self_attention", graph, only(feeds, "query", "key", "value", "mask"))
    assert result.unchanged
    assert [reason.partition(": ")[2] for reason in result.declined] == [
        "scores are scaled by something else than a number"
    ]


def test_a_mask_before_the_scale_is_declined(rewrite, graph_of, feeds):
    def write(builder, query, key, value, mask):
        product = builder.op("MatMul", headed(builder, query, (0, 2, 1, 3)), headed(builder, key, (0, 2, 3, 1)))
        scores = builder.op("Mul", builder.op("Add", product, mask), builder.constant(np.float32(0.5), "scale"))
        return attention(builder, scores, headed(builder, value, (0, 2, 1, 3)))

    graph = graph_of(write, query=ROWS, key=ROWS, value=ROWS, mask=("float32", ("batch", 1, 1, "tokens")))
    result = rewrite("fuse_self_attention", graph, only(feeds, "query", "key", "value", "mask"))
    assert result.unchanged
    assert [reason.partition(": ")[2] for reason in result.declined] == [
        "the softmax is not of a query times a transposed key"
    ]


def test_heads_put_back_in_another_order_are_no_attention(rewrite, graph_of, feeds):
    def write(builder, query, key, value):
        scores = scaled(builder, headed(builder, query, (0, 2, 1, 3)), headed(builder, key, (0, 2, 3, 1)))
        return attention(builder, scores, headed(builder, value, (0, 2, 1, 3)), perm=(0, 2, 3, 1))

    graph = graph_of(write, query=ROWS, key=ROWS, value=ROWS)
    result = rewrite("fuse_self_attention", graph, only(feeds, "query", "key", "value"))
    assert result.unchanged
    assert result.declined == []
