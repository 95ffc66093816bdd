"""Query, key and value from one matrix multiplication."""

import numpy as np
import onnx_ir as ir
import pytest

WIDTH, KV_WIDTH, CAPACITY = 64, 32, 8
CACHE = ("float32", ("batch", 2, CAPACITY, 16))
INPUTS = {
    "x": ("float32", ("batch", "tokens", WIDTH)),
    "input_ids": ("int64", ("batch", "tokens")),
    "past_lengths": ("int64", ("batch",)),
    "past_key": CACHE,
    "past_value": CACHE,
}


@pytest.fixture
def feeds(numbers):
    caches = {name: numbers(2, 2, CAPACITY, 16) for name in ("past_key", "past_value")}
    return {
        "x": numbers(2, 3, WIDTH),
        "input_ids": np.zeros((2, 3), np.int64),
        "past_lengths": np.array([2, 0]),
    } | caches


@pytest.fixture
def attention():
    """Writes ``SlotAttention`` of three linears.

    ``product`` is called with a linear's builder, input and index, ``between`` with its builder, result and index.
    """

    def writer(product, between=None):
        def write(builder, x, input_ids, lengths, past_key, past_value):
            inputs = [product(builder, x, i) for i in range(3)]
            if between is not None:
                inputs = [between(builder, value, i) for i, value in enumerate(inputs)]
            return builder.op_multi(
                "SlotAttention", *inputs, past_key, past_value, lengths,
                names=["attended", "present.key", "present.value"],
                domain="llmopt", num_heads=4, kv_num_heads=2, scale=0.25, softcap=0.0, is_causal=1,
            )  # fmt: skip

        return write

    return writer


def normed(numbers):
    """The norm of each head of query and key."""
    weights = [numbers(16), numbers(16)]

    def write(builder, x, i):
        if i == 2:
            return x
        split = builder.constant(np.array([0, 0, (4, 2)[i], 16]), f"split{i}")
        weight = builder.constant(weights[i], f"norm{i}")
        heads = builder.op("RMSNormalization", builder.op("Reshape", x, split), weight, axis=-1, epsilon=1e-3)
        return builder.op("Reshape", heads, builder.constant(np.array([0, 0, -1]), "merge"))

    return write


def normed_together(numbers):
    """LayerNorm of all heads of query and key of a token."""
    weights = [[numbers(width), numbers(width)] for width in (WIDTH, KV_WIDTH)]

    def write(builder, x, i):
        if i == 2:
            return x
        inputs = (builder.constant(array, f"norm{i}.{j}") for j, array in enumerate(weights[i]))
        return builder.op("LayerNormalization", x, *inputs, axis=-1, epsilon=1e-3)

    return write


def rotated(numbers, *, dim=0):
    """Rope of query and key, of the first ``dim`` columns of each head."""
    tables = [numbers(CAPACITY, (dim or 16) // 2) for _ in range(2)]
    positions = np.array([[2, 3, 4], [0, 1, 2]])

    def write(builder, x, i):
        if i == 2:
            return x
        inputs = [builder.constant(array, f"rope{j}") for j, array in enumerate([*tables, positions])]
        return builder.op("RotaryEmbedding", x, *inputs, num_heads=(4, 2)[i], rotary_embedding_dim=dim)

    return write


def one_behind_the_other(*steps):
    def write(builder, x, i):
        for step in steps:
            x = step(builder, x, i)
        return x

    return write


def plain(numbers, prefix=""):
    weights = [numbers(WIDTH, width) for width in (WIDTH, KV_WIDTH, KV_WIDTH)]
    return lambda builder, x, i: builder.op("MatMul", x, builder.constant(weights[i], f"{prefix}weight{i}"))


def biased(numbers, *, exchanged=()):
    product = plain(numbers)
    biases = [numbers(width) for width in (WIDTH, KV_WIDTH, KV_WIDTH)]

    def write(builder, x, i):
        operands = (product(builder, x, i), builder.constant(biases[i], f"bias{i}"))
        return builder.op("Add", *(reversed(operands) if i in exchanged else operands))

    return write


def test_three_multiplications_become_one(rewrite, graph_of, attention, numbers, feeds):
    result = rewrite("fuse_qkv", graph_of(attention(plain(numbers)), **INPUTS), feeds)
    assert result.applied == 1
    assert result.ops["MatMul"] == 1
    assert result.declined == []
    assert result.difference() < 1e-6


@pytest.mark.parametrize("exchanged", [None, (), (0, 2)])
@pytest.mark.parametrize("chain", ["norm", "all heads", "rope", "partial rope", "norm, rope"])
def test_what_lies_between_the_linears_and_the_attention_stays(
    rewrite, graph_of, attention, numbers, feeds, chain, exchanged
):
    between = {
        "norm": normed(numbers),
        "all heads": normed_together(numbers),
        "rope": rotated(numbers),
        "partial rope": rotated(numbers, dim=8),
        "norm, rope": one_behind_the_other(normed(numbers), rotated(numbers)),
    }[chain]
    product = plain(numbers) if exchanged is None else biased(numbers, exchanged=exchanged)
    graph = graph_of(attention(product, between), **INPUTS)
    kept = {"RMSNormalization", "LayerNormalization", "RotaryEmbedding", "Reshape"}
    before = {kind: sum(node.op_type == kind for node in graph.graph) for kind in kept}
    result = rewrite("fuse_qkv", graph, feeds)
    assert result.applied == 1
    assert (result.ops["MatMul"], result.ops["Add"], result.ops["Split"]) == (1, int(exchanged is not None), 1)
    assert {kind: result.ops[kind] for kind in kept} == before
    assert result.declined == []
    assert result.difference() < 1e-6


@pytest.mark.parametrize("exchanged", [(), (1,), (0, 1, 2)])
def test_biases_are_packed_on_either_side(rewrite, graph_of, attention, numbers, feeds, exchanged):
    result = rewrite("fuse_qkv", graph_of(attention(biased(numbers, exchanged=exchanged)), **INPUTS), feeds)
    assert result.applied == 1
    assert (result.ops["MatMul"], result.ops["Add"]) == (1, 1)
    assert result.difference() < 1e-6


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("scheme", "options"),
    [(None, {}), ("W8A8", {}), ("W8A16", {}), ("W4A16", {"group_size": 32}), ("W4A16_ASYM", {"group_size": 16})],
)
def test_every_scheme_is_packed_without_rounding_again(rewrite_model, model_of, scheme, options, bias):
    model = model_of(scheme, options, num_hidden_layers=2, attention_bias=bias, mlp_bias=bias)
    result = rewrite_model("fuse_qkv", model)
    assert result.applied == 2
    assert result.ops["Split"] == 2
    assert not [name for name in result.graph.graph.initializers if "q_proj" in name]
    assert result.difference() < 1e-6


def test_different_schemes_are_declined(rewrite_model, model_of):
    options = {"group_size": 32, "overrides": [{"match": "model.layers.0.self_attn.k_proj", "scheme": "W8A16"}]}
    result = rewrite_model("fuse_qkv", model_of("W4A16", options, num_hidden_layers=2))
    assert result.applied == 1
    assert result.declined == ["model.layers.0.attention.output: the linears have different schemes"]
    assert result.difference() < 1e-6


def test_a_linear_kept_in_float_is_declined(rewrite_model, model_of):
    options = {"overrides": [{"match": "model.layers.1.self_attn.v_proj", "scheme": "none"}]}
    result = rewrite_model("fuse_qkv", model_of("W8A16", options, num_hidden_layers=2))
    assert result.applied == 1
    assert result.declined == ["model.layers.1.attention.output: some of the linears are quantized and some are not"]


def test_an_addend_that_is_no_bias_is_declined(rewrite, graph_of, attention, numbers, feeds):
    product = plain(numbers)

    def write(builder, x, i):
        rows = builder.op("ReduceSum", x, builder.op("Constant", value_ints=[-1]), keepdims=1)
        return builder.op("Add", product(builder, x, i), rows)

    result = rewrite("fuse_qkv", graph_of(attention(write), **INPUTS), feeds)
    assert result.applied == 0
    assert result.unchanged
    assert "attended: an addend is no constant vector with one value per output" in result.declined


def test_a_scalar_addend_is_declined(rewrite, graph_of, attention, numbers, feeds):
    product = plain(numbers)

    def write(builder, x, i):
        return builder.op("Add", product(builder, x, i), builder.constant(np.array([0.5 + i], np.float32), f"bias{i}"))

    result = rewrite("fuse_qkv", graph_of(attention(write), **INPUTS), feeds)
    assert result.applied == 0
    assert result.unchanged
    assert result.declined


@pytest.mark.parametrize("scale_shape", [(), (WIDTH,)])
def test_scales_that_are_not_per_output_are_declined(rewrite, graph_of, attention, numbers, feeds, scale_shape):
    integers = [(20 * numbers(WIDTH, width)).astype(np.int8) for width in (WIDTH, KV_WIDTH, KV_WIDTH)]
    scales = [np.abs(numbers(*scale_shape)) for _ in range(3)]

    def write(builder, x, i):
        values, scale = builder.constant(integers[i], f"weight{i}"), builder.constant(scales[i], f"scale{i}")
        return builder.op("MatMul", x, builder.op("DequantizeLinear", values, scale, axis=0))

    result = rewrite("fuse_qkv", graph_of(attention(write), **INPUTS), feeds)
    assert result.applied == 0
    assert result.unchanged
    assert "attended: the linears' scales are not one per output" in result.declined


def test_weights_that_are_not_constant_are_declined(rewrite, graph_of, attention, numbers, feeds):
    weights = [numbers(WIDTH, width) for width in (WIDTH, KV_WIDTH, KV_WIDTH)]

    def write(builder, x, i):
        weight = builder.constant(weights[i], f"weight{i}")
        integers = builder.op("Cast", weight, to=ir.DataType.INT8.value)
        scale = builder.constant(np.full(weights[i].shape[1], 0.1 + i, np.float32), f"scale{i}")
        return builder.op("MatMul", x, builder.op("DequantizeLinear", integers, scale, axis=1))

    result = rewrite("fuse_qkv", graph_of(attention(write), **INPUTS), feeds)
    assert result.applied == 0
    assert result.declined


def test_two_attentions_do_not_mix_their_weights(rewrite, graph_of, attention, numbers, feeds):
    first, second = attention(plain(numbers, "first.")), attention(biased(numbers))

    def write(builder, x, *rest):
        outputs = first(builder, x, *rest)
        for value in outputs:
            value.name = f"first.{value.name}"
        return second(builder, builder.op("Add", x, outputs[0]), *rest)[0]

    result = rewrite("fuse_qkv", graph_of(write, **INPUTS), feeds)
    assert result.applied == 2
    assert result.difference() < 1e-6


def test_linears_of_different_inputs_are_declined(rewrite, graph_of, attention, numbers, feeds):
    product = plain(numbers)

    def write(builder, x, i):
        return product(builder, builder.op("Sigmoid", x) if i == 1 else x, i)

    result = rewrite("fuse_qkv", graph_of(attention(write), **INPUTS), feeds)
    assert result.applied == 0
    assert result.unchanged
    assert result.declined == ["attended: the linears read different inputs"]


def test_a_bias_on_some_of_the_linears_is_declined(rewrite, graph_of, attention, numbers, feeds):
    with_bias, without = biased(numbers), plain(numbers)

    def write(builder, x, i):
        return (without if i == 1 else with_bias)(builder, x, i)

    result = rewrite("fuse_qkv", graph_of(attention(write), **INPUTS), feeds)
    assert result.applied == 0
    assert result.unchanged
    assert result.declined == ["attended: some of the linears have a bias and some have none"]


def test_a_value_that_is_no_product_is_declined(rewrite, graph_of, attention, numbers, feeds):
    product = plain(numbers)

    def write(builder, x, i):
        y = product(builder, x, i)
        return builder.op("Sigmoid", y) if i == 2 else y

    result = rewrite("fuse_qkv", graph_of(attention(write), **INPUTS), feeds)
    assert result.applied == 0
    assert result.unchanged
    assert result.declined == ["attended: query, key and value are not each the product of a linear"]


@pytest.mark.parametrize("role", [0, 2])
def test_a_product_that_is_read_elsewhere_is_declined(rewrite, graph_of, attention, numbers, feeds, role):
    product, kept = plain(numbers), {}

    def keep(builder, x, i):
        kept[i] = product(builder, x, i)
        return kept[i]

    def write(builder, *inputs):
        return [*attention(keep, rotated(numbers))(builder, *inputs), builder.op("Sigmoid", kept[role])]

    result = rewrite("fuse_qkv", graph_of(write, **INPUTS), feeds)
    assert result.applied == 0
    assert result.unchanged
    assert result.declined == ["attended: a linear's result is read by something else too"]


def test_what_is_packed_already_is_no_near_match(rewrite, graph_of, attention, numbers, feeds):
    weight = numbers(WIDTH, WIDTH + 2 * KV_WIDTH)

    def write(builder, x, *rest):
        packed = builder.op("MatMul", x, builder.constant(weight, "weight"))
        sizes = builder.constant(np.array([WIDTH, KV_WIDTH, KV_WIDTH]), "sizes")
        parts = builder.op_multi("Split", packed, sizes, axis=-1, names=["query", "key", "value"])
        return attention(lambda builder, x, i: parts[i], rotated(numbers))(builder, x, *rest)

    result = rewrite("fuse_qkv", graph_of(write, **INPUTS), feeds)
    assert result.applied == 0
    assert result.unchanged
    assert result.declined == []


def test_a_graph_without_attention_is_left(rewrite, graph_of, numbers, feeds):
    product = plain(numbers)
    graph = graph_of(lambda builder, x: [product(builder, x, i) for i in range(3)], x=INPUTS["x"])
    result = rewrite("fuse_qkv", graph, {"x": feeds["x"]})
    assert result.applied == 0
    assert result.unchanged
