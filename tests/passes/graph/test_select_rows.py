"""The rows that need logits are picked before the work instead of after it."""

import numpy as np
import pytest

X = ("float32", ("batch", "tokens", 8))
ROWS = ("int64", ("rows",))
ONE = np.array([1, 0])
CLOSE = 1e-6
"""Fewer rows may take another kernel of the same matrix multiplication."""


def picked(builder, value, rows):
    return builder.op("SelectRows", value, rows, domain="llmopt")


@pytest.fixture
def feeds(numbers):
    return {"x": numbers(2, 3, 8), "rows": np.array([5, 0, 5, 2])}


def order_of(result):
    return [node.op_type for node in result.graph.graph if node.op_type != "Constant"]


def test_rows_are_picked_before_what_treats_each_alone(rewrite, graph_of, numbers, feeds):
    def write(builder, x, rows):
        normed = builder.op("RMSNormalization", x, builder.constant(numbers(8), "norm.weight"), axis=-1, epsilon=1e-3)
        rounded = builder.op("QuantizeDequantizePerToken", normed, domain="llmopt")
        product = builder.op("MatMul", rounded, builder.constant(numbers(8, 16), "weight"))
        return picked(builder, builder.op("Sigmoid", product), rows)

    result = rewrite("select_rows", graph_of(write, x=X, rows=ROWS), feeds)
    assert result.applied == 4
    assert order_of(result) == ["SelectRows", "RMSNormalization", "QuantizeDequantizePerToken", "MatMul", "Sigmoid"]
    assert result.difference() < CLOSE


@pytest.mark.parametrize("op_type", ["Sigmoid", "Tanh", "Relu", "Gelu"])
def test_rows_are_picked_before_an_activation(rewrite, graph_of, feeds, op_type):
    def write(builder, x, rows):
        attributes = {"approximate": "tanh"} if op_type == "Gelu" else {}
        return picked(builder, builder.op(op_type, x, **attributes), rows)

    result = rewrite("select_rows", graph_of(write, x=X, rows=ROWS), feeds)
    assert order_of(result) == ["SelectRows", op_type]
    assert result.is_identical()


def test_rows_are_picked_before_a_layer_norm_with_its_bias(rewrite, graph_of, numbers, feeds):
    def write(builder, x, rows):
        weights = (builder.constant(numbers(8), name) for name in ("weight", "bias"))
        return picked(builder, builder.op("LayerNormalization", x, *weights, axis=-1, epsilon=1e-3), rows)

    result = rewrite("select_rows", graph_of(write, x=X, rows=ROWS), feeds)
    assert order_of(result) == ["SelectRows", "LayerNormalization"]
    assert result.is_identical()


@pytest.mark.parametrize("constant", [np.float32(3), np.full(1, 3, np.float32), np.arange(1, 9, dtype=np.float32)])
@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div"])
def test_a_constant_is_every_rows(rewrite, graph_of, feeds, op_type, exchanged, constant):
    def write(builder, x, rows):
        operands = (x, builder.constant(constant, "constant"))
        return picked(builder, builder.op(op_type, *(reversed(operands) if exchanged else operands)), rows)

    result = rewrite("select_rows", graph_of(write, x=X, rows=ROWS), feeds)
    assert order_of(result) == ["SelectRows", op_type]
    assert result.is_identical()


def test_the_soft_cap_of_logits_is_that_of_picked_rows(rewrite, graph_of, feeds):
    def write(builder, x, rows):
        limit = builder.constant(np.float32(2), "limit")
        return picked(builder, builder.op("Mul", builder.op("Tanh", builder.op("Div", x, limit)), limit), rows)

    result = rewrite("select_rows", graph_of(write, x=X, rows=ROWS), feeds)
    assert order_of(result) == ["SelectRows", "Div", "Tanh", "Mul"]
    assert result.is_identical()


def test_a_split_whose_parts_are_all_picked_is_one_of_picked_rows(rewrite, graph_of, feeds):
    def write(builder, x, rows):
        gate, up = builder.op_multi("Split", x, axis=-1, num_outputs=2, names=["gate", "up"])
        return picked(builder, builder.op("Mul", builder.op("Gelu", gate), up), rows)

    result = rewrite("select_rows", graph_of(write, x=X, rows=ROWS), feeds)
    assert order_of(result) == ["SelectRows", "Split", "Gelu", "Mul"]
    assert result.is_identical()


def test_a_split_with_a_part_that_all_rows_need_is_declined(rewrite, graph_of, feeds):
    def write(builder, x, rows):
        gate, up = builder.op_multi("Split", x, axis=-1, num_outputs=2, names=["gate", "up"])
        return picked(builder, gate, rows), builder.op("Abs", up)

    result = rewrite("select_rows", graph_of(write, x=X, rows=ROWS), feeds)
    assert result.applied == 0
    assert result.unchanged
    assert result.declined == [
        f"{result.graph.graph.outputs[0].name}: another part of the Split is needed for all rows"
    ]


def test_a_split_of_tokens_is_declined(rewrite, graph_of, feeds):
    def write(builder, x, rows):
        first, _ = builder.op_multi("Split", x, axis=1, num_outputs=3, names=["first", "second", "third"])[:2]
        return picked(builder, first, rows)

    result = rewrite("select_rows", graph_of(write, x=("float32", ("batch", 3, 8)), rows=ROWS), {**feeds, "rows": ONE})
    assert result.applied == 0
    assert result.unchanged
    assert "may part rows" in result.declined[0]


def test_experts_compute_for_picked_rows(rewrite, graph_of, numbers, feeds):
    arrays = {"gate_up": numbers(4, 8, 12), "down": numbers(4, 6, 8), "router": numbers(8, 4)}

    def write(builder, x, rows):
        weights = {name: builder.constant(array, name) for name, array in arrays.items()}
        scores = builder.op("MatMul", x, weights["router"])
        inputs = (x, scores, weights["gate_up"], weights["down"])
        settings = {"top_k": 2, "normalize": 1, "activation": "silu"}
        return picked(builder, builder.op("Experts", *inputs, domain="llmopt", **settings), rows)

    result = rewrite("select_rows", graph_of(write, x=X, rows=ROWS), feeds)
    assert order_of(result) == ["SelectRows", "MatMul", "Experts"]
    assert result.difference() < CLOSE


FAMILIES = ["gemma2", "granite", "gpt2", "gpt_neox", "falcon-40b", "opt-350m", "phi3", "olmo2", "mixtral", "qwen3_moe"]


@pytest.mark.parametrize("family_name", FAMILIES)
def test_every_family_picks_rows_behind_its_last_attention(rewrite_model, family_model, family_name):
    result = rewrite_model("select_rows", family_model(family_name))
    assert result.declined == []
    for node in result.graph.graph:
        if node.op_type == "SelectRows":
            made_by, readers = node.inputs[0].producer(), node.inputs[0].uses()
            assert made_by.op_type == "SlotAttention" or len(readers) > 1
    assert result.difference() < 1e-5


@pytest.mark.parametrize("exchanged", [False, True])
def test_a_bias_is_added_to_picked_rows(rewrite, graph_of, numbers, feeds, exchanged):
    def write(builder, x, rows):
        bias = builder.constant(numbers(8), "bias")
        return picked(builder, builder.op("Add", *((bias, x) if exchanged else (x, bias))), rows)

    result = rewrite("select_rows", graph_of(write, x=X, rows=ROWS), feeds)
    assert result.applied == 1
    assert order_of(result) == ["SelectRows", "Add"]
    assert result.is_identical()


@pytest.mark.parametrize("op_type", ["Add", "Mul"])
def test_both_operands_are_picked(rewrite, graph_of, numbers, feeds, op_type):
    def write(builder, x, y, rows):
        return picked(builder, builder.op(op_type, x, y), rows)

    result = rewrite("select_rows", graph_of(write, x=X, y=X, rows=ROWS), feeds | {"y": numbers(2, 3, 8)})
    assert result.applied == 1
    assert order_of(result) == ["SelectRows", "SelectRows", op_type]
    assert result.is_identical()


def test_what_is_read_twice_is_picked_once(rewrite, graph_of, feeds):
    def write(builder, x, rows):
        hidden = builder.op("Sigmoid", x)
        return picked(builder, builder.op("Add", hidden, builder.op("Sigmoid", hidden)), rows)

    result = rewrite("select_rows", graph_of(write, x=X, rows=ROWS), feeds)
    assert order_of(result) == ["SelectRows", "Sigmoid", "Sigmoid", "Add"]
    assert result.is_identical()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scheme", [None, "W8A8"])
def test_the_last_layer_of_a_model_picks_rows_before_its_mlp(rewrite_model, model_of, scheme, biased):
    model = model_of(scheme, attention_bias=biased, mlp_bias=biased)
    result = rewrite_model("select_rows", model)
    # norm and head; per layer: two residuals, four linears, silu and product, a norm; o, gate, up and down have biases,
    # and a rounding of the inputs of the head, o, gate with up, and down.
    # W8A8: the inputs of output, down and head, and that of gate and up once for each before they are merged.
    assert result.applied == 12 + 4 * biased + 5 * (scheme == "W8A8")
    assert result.ops["SelectRows"] == 2
    assert result.declined == []
    tail = [node for node in result.graph.graph if node.op_type == "MatMul"][-5:]
    assert all(len(node.outputs[0].shape) == 2 for node in tail)
    assert result.difference() < CLOSE


def test_operands_of_different_shape_are_declined(rewrite, graph_of, numbers, feeds):
    def write(builder, x, y, rows):
        return picked(builder, builder.op("Mul", x, y), rows)

    graph = graph_of(write, x=X, y=("float32", ("batch", 1, 8)), rows=ROWS)
    result = rewrite("select_rows", graph, feeds | {"y": numbers(2, 1, 8)})
    assert result.applied == 0
    assert result.unchanged
    assert "the operands of Mul differ in shape" in result.declined[0]


def test_operands_of_unknown_shape_are_declined(rewrite, graph_of, numbers, feeds):
    def write(builder, x, y, rows):
        return picked(builder, builder.op("Mul", x, y), rows)

    unknown = ("float32", (None, None, 8))
    result = rewrite("select_rows", graph_of(write, x=unknown, y=unknown, rows=ROWS), feeds | {"y": numbers(2, 1, 8)})
    assert result.applied == 0
    assert result.unchanged


def test_a_matrix_for_each_sequence_is_declined(rewrite, graph_of, numbers, feeds):
    def write(builder, x, y, rows):
        return picked(builder, builder.op("MatMul", x, y), rows)

    graph = graph_of(write, x=X, y=("float32", ("batch", 8, 4)), rows=ROWS)
    result = rewrite("select_rows", graph, feeds | {"y": numbers(2, 8, 4)})
    assert result.applied == 0
    assert result.unchanged
    assert "MatMul" in result.declined[0]


@pytest.mark.parametrize("axis", [1, 2])
def test_a_norm_whose_axis_counts_from_the_front_is_declined(rewrite, graph_of, numbers, feeds, axis):
    def write(builder, x, rows):
        weight = builder.constant(numbers(*(3, 8)[axis - 1 :]), "norm.weight")
        return picked(builder, builder.op("RMSNormalization", x, weight, axis=axis, epsilon=1e-3), rows)

    result = rewrite("select_rows", graph_of(write, x=("float32", ("batch", 3, 8)), rows=ROWS), feeds)
    assert result.applied == 0
    assert result.unchanged
    assert "RMSNormalization" in result.declined[0]


def test_a_value_that_is_read_elsewhere_is_computed_for_all_rows(rewrite, graph_of, feeds):
    def write(builder, x, rows):
        hidden = builder.op("Sigmoid", x)
        return picked(builder, hidden, rows), hidden

    result = rewrite("select_rows", graph_of(write, x=X, rows=ROWS), feeds)
    assert result.applied == 0
    assert result.unchanged


def test_attention_is_never_passed(rewrite_model, model_of):
    result = rewrite_model("select_rows", model_of(num_hidden_layers=1))
    order = order_of(result)
    assert order.index("SlotAttention") < order.index("SelectRows")


def test_a_graph_that_picks_nothing_is_left(rewrite, graph_of, feeds):
    result = rewrite("select_rows", graph_of(lambda b, x: b.op("Sigmoid", x), x=X), {"x": feeds["x"]})
    assert result.applied == 0
    assert result.unchanged


def test_rounding_is_done_again_for_the_picked_rows(rewrite, graph_of, feeds):
    """A value that is rounded for all rows and for some, as where attention and MLP share a norm."""

    def write(builder, x, rows):
        rounded = builder.op("QuantizeDequantizePerToken", x, domain="llmopt")
        return picked(builder, rounded, rows), builder.op("Relu", rounded)

    result = rewrite("select_rows", graph_of(write, x=X, rows=ROWS), feeds)
    assert result.applied == 1
    assert (result.ops["QuantizeDequantizePerToken"], result.ops["SelectRows"]) == (2, 1)
    assert result.is_identical()
