"""Slot attention as GroupQueryAttention: the same numbers and the same caches."""

import numpy as np
import pytest

CAPACITY = 8
CACHE = ("float32", ("batch", 2, CAPACITY, 16))
INPUTS = {"packed": ("float32", ("batch", "tokens", 128)), "past_key": CACHE, "past_value": CACHE}
CONTRACT = {"input_ids": ("int64", ("batch", "tokens")), "past_lengths": ("int64", ("batch",))}
CLOSE = 2e-6
"""Both sum the same float32 products, in another order."""


def positions_of(builder, ids, lengths, first=0):
    """Each token's position: it counts from ``first`` behind the cached tokens."""
    start, step = (builder.constant(np.int64(number), f"int.{number}") for number in (first, 1))
    end = builder.op("Add", builder.op("Squeeze", builder.op("Shape", ids, start=1, end=2)), start)
    behind = builder.op("Unsqueeze", lengths, builder.constant(np.array([1]), "axis"))
    return builder.op("Add", behind, builder.op("Range", start, end, step))


def parts_of(builder, packed, sizes):
    split = builder.op("Constant", value_ints=list(sizes))
    return builder.op_multi("Split", packed, split, names=[f"part{i}" for i in range(len(sizes))], axis=-1)


def attend(builder, inputs, caches, lengths, *mask, **changes):
    return builder.op_multi(
        "SlotAttention", *inputs, *caches, lengths, *mask,
        names=["attended", "present.0.key", "present.0.value"], domain="llmopt",
        **({"num_heads": 4, "kv_num_heads": 2, "scale": 0.25, "softcap": 0.0, "is_causal": int(not mask)} | changes),
    )  # fmt: skip


@pytest.fixture
def turned():
    """``turned(builder, x, positions, heads, columns=16, table=0)``: rope of the first ``columns`` of each head."""

    def write(builder, x, positions, heads, *, width=16, columns=16, table=0, **changes):
        angles = np.arange(CAPACITY + 1)[:, None] / (100 + table) ** (np.arange(columns // 2) / columns * 2)
        tables = (builder.constant(f(angles).astype(np.float32), f"{f.__name__}{table}") for f in (np.cos, np.sin))
        settings = {"rotary_embedding_dim": 0 if columns == width else columns, "num_heads": heads} | changes
        return builder.op("RotaryEmbedding", x, *tables, positions, **settings)

    return write


@pytest.fixture
def attention(turned):
    """Writes a Split of ``sizes``, whose parts ``order`` become query, key and value, rope, and the attention."""

    def writer(sizes=(64, 32, 32), order=(0, 1, 2), *, keep_query=False, **changes):
        def write(builder, packed, past_key, past_value, ids, lengths):
            parts = parts_of(builder, packed, sizes)
            query, key, value = (parts[i] for i in order)
            positions = positions_of(builder, ids, lengths)
            inputs = [turned(builder, query, positions, 4), turned(builder, key, positions, 2), value]
            outputs = attend(builder, inputs, (past_key, past_value), lengths, **changes)
            return [*outputs, builder.op("Sigmoid", query)] if keep_query else outputs

        return write

    return writer


@pytest.fixture
def calls(numbers):
    """A chunk behind a past, sequences without one, and a ragged decode step."""

    def call(tokens, lengths, width=128):
        count = len(lengths)
        caches = {name: numbers(count, 2, CAPACITY, 16) for name in ("past_key", "past_value")}
        ids = np.zeros((count, tokens), np.int64)
        return {"packed": numbers(count, tokens, width), "input_ids": ids, "past_lengths": np.array(lengths)} | caches

    return lambda **changes: [call(4, [3], **changes), call(3, [0, 0], **changes), call(1, [7, 0, 2], **changes)]


def of_kernel(result, name):
    """An attribute of the one GroupQueryAttention, or None."""
    (node,) = [node for node in result.graph.graph if node.op_type == "GroupQueryAttention"]
    return node.attributes[name].value if name in node.attributes else None


def test_packed_projections_reach_the_kernel_in_one_piece(rewrite, graph_of, attention, calls):
    result = rewrite("lower_attention", graph_of(attention(), **INPUTS, **CONTRACT), *calls())
    assert result.applied == 1
    assert result.ops["Split"] == 0
    assert result.difference() < CLOSE


def test_parts_that_are_read_elsewhere_stay(rewrite, graph_of, attention, calls):
    result = rewrite("lower_attention", graph_of(attention(keep_query=True), **INPUTS, **CONTRACT), *calls())
    assert result.applied == 1
    assert result.ops["Split"] == 1
    assert result.difference() < CLOSE


@pytest.mark.parametrize(
    ("sizes", "order"),
    [((32, 32, 64), (2, 0, 1)), ((64, 32, 32), (0, 2, 1)), ((64, 32, 32, 8), (0, 1, 2))],
    ids=["query last", "value before key", "one part more"],
)
def test_a_split_in_another_order_is_not_taken_for_packed_projections(
    rewrite, graph_of, attention, calls, sizes, order
):
    inputs = INPUTS | {"packed": ("float32", ("batch", "tokens", sum(sizes)))}
    graph = graph_of(attention(sizes, order), **inputs, **CONTRACT)
    result = rewrite("lower_attention", graph, *calls(width=sum(sizes)))
    assert result.applied == 1
    assert result.ops["Split"] == 1
    assert result.difference() < CLOSE


def test_the_scale_is_kept(rewrite, graph_of, attention, calls):
    result = rewrite("lower_attention", graph_of(attention(scale=1.0), **INPUTS, **CONTRACT), *calls())
    assert result.difference() < CLOSE


def test_the_soft_cap_is_kept(rewrite, graph_of, attention, calls):
    result = rewrite("lower_attention", graph_of(attention(softcap=0.5), **INPUTS, **CONTRACT), *calls())
    assert result.applied == 1
    assert of_kernel(result, "softcap") == 0.5
    assert result.difference() < CLOSE


def test_an_attention_without_rope_is_lowered_without(rewrite, graph_of, calls):
    def write(builder, packed, past_key, past_value, ids, lengths):
        return attend(builder, parts_of(builder, packed, (64, 32, 32)), (past_key, past_value), lengths)

    result = rewrite("lower_attention", graph_of(write, **INPUTS, **CONTRACT), *calls())
    assert result.applied == 1
    assert result.ops["Split"] == 0
    assert of_kernel(result, "do_rotary") is None
    assert result.difference() < CLOSE


WIDE = {
    "packed": ("float32", ("batch", "tokens", 256)),
    **dict.fromkeys(("past_key", "past_value"), ("float32", ("batch", 2, CAPACITY, 32))),
}


@pytest.mark.parametrize("columns", [32, 16, 8, 24])
def test_only_multiples_of_sixteen_columns_are_turned_by_the_kernel(rewrite, graph_of, turned, numbers, columns):
    def write(builder, packed, past_key, past_value, ids, lengths):
        query, key, value = parts_of(builder, packed, (128, 64, 64))
        positions = positions_of(builder, ids, lengths)
        query, key = (turned(builder, x, positions, n, width=32, columns=columns) for x, n in ((query, 4), (key, 2)))
        return attend(builder, (query, key, value), (past_key, past_value), lengths)

    def call(tokens, lengths):
        caches = {name: numbers(len(lengths), 2, CAPACITY, 32) for name in ("past_key", "past_value")}
        ids = np.zeros((len(lengths), tokens), np.int64)
        x = numbers(len(lengths), tokens, 256)
        return {"packed": x, "input_ids": ids, "past_lengths": np.array(lengths)} | caches

    calls = [call(4, [3]), call(3, [0, 0]), call(1, [7, 0, 2])]
    result = rewrite("lower_attention", graph_of(write, **WIDE, **CONTRACT), *calls)
    by_kernel = columns % 16 == 0
    assert result.applied == 1
    assert of_kernel(result, "do_rotary") == (1 if by_kernel else None)
    assert (result.ops["RotaryEmbedding"], result.ops["Split"]) == ((0, 0) if by_kernel else (2, 1))
    assert result.notes == ([] if by_kernel else ["2 rotary embeddings stay operators of their own"])
    assert result.difference() < CLOSE


@pytest.mark.parametrize("what", ["interleaved", "of query alone", "another table", "other positions"])
def test_a_rope_that_the_kernel_does_not_do_stays(rewrite, graph_of, turned, calls, what):
    def write(builder, packed, past_key, past_value, ids, lengths):
        query, key, value = parts_of(builder, packed, (64, 32, 32))
        positions = positions_of(builder, ids, lengths, first=int(what == "other positions"))
        interleaved = int(what == "interleaved")
        query = turned(builder, query, positions, 4, interleaved=interleaved)
        if what != "of query alone":
            key = turned(builder, key, positions, 2, interleaved=interleaved, table=int(what == "another table"))
        return attend(builder, (query, key, value), (past_key, past_value), lengths)

    result = rewrite("lower_attention", graph_of(write, **INPUTS, **CONTRACT), *calls())
    assert result.applied == 1
    assert result.ops["RotaryEmbedding"] == (1 if what == "of query alone" else 2)
    assert of_kernel(result, "do_rotary") is None
    assert result.difference() < CLOSE


def test_rope_behind_the_norms_of_heads_is_taken_along(rewrite, graph_of, turned, numbers, calls):
    weights = [numbers(16), numbers(16)]

    def write(builder, packed, past_key, past_value, ids, lengths):
        *heads, value = parts_of(builder, packed, (64, 32, 32))
        positions, inputs = positions_of(builder, ids, lengths), []
        for i, (x, count) in enumerate(zip(heads, (4, 2), strict=True)):
            split = builder.constant(np.array([0, 0, count, 16]), f"split{i}")
            weight = builder.constant(weights[i], f"norm{i}")
            normed = builder.op("RMSNormalization", builder.op("Reshape", x, split), weight, axis=-1, epsilon=1e-3)
            merged = builder.op("Reshape", normed, builder.constant(np.array([0, 0, -1]), "merge"))
            inputs.append(turned(builder, merged, positions, count))
        return attend(builder, (*inputs, value), (past_key, past_value), lengths)

    result = rewrite("lower_attention", graph_of(write, **INPUTS, **CONTRACT), *calls())
    assert result.applied == 1
    assert (result.ops["RMSNormalization"], result.ops["RotaryEmbedding"], result.ops["Split"]) == (2, 0, 1)
    assert result.difference() < CLOSE


def windowed(turned, window, *, shifted=False, unmasked=False):
    def write(builder, packed, past_key, past_value, ids, lengths):
        query, key, value = parts_of(builder, packed, (64, 32, 32))
        positions = positions_of(builder, ids, lengths)
        query, key = turned(builder, query, positions, 4), turned(builder, key, positions, 2)
        if shifted:
            positions = builder.op("Add", positions, builder.op("Constant", value_int=1))
        mask = builder.op("SlidingWindowMask", positions, past_key, domain="llmopt", window=window)
        if unmasked:
            mask = builder.op("Or", mask, mask)
        return attend(builder, (query, key, value), (past_key, past_value), lengths, mask)

    return write


@pytest.mark.parametrize("window", [1, 3, 7, 100])
def test_a_sliding_window_becomes_the_kernels(rewrite, graph_of, turned, calls, window):
    result = rewrite("lower_attention", graph_of(windowed(turned, window), **INPUTS, **CONTRACT), *calls())
    assert result.applied == 1
    assert of_kernel(result, "local_window_size") == window
    assert result.ops["SlidingWindowMask"] == 0
    assert result.difference() < CLOSE


@pytest.mark.parametrize("changes", [{"shifted": True}, {"unmasked": True}])
def test_any_other_mask_is_declined(rewrite, graph_of, turned, calls, changes):
    result = rewrite("lower_attention", graph_of(windowed(turned, 3, **changes), **INPUTS, **CONTRACT), *calls())
    assert result.applied == 0
    assert result.unchanged
    assert result.declined == ["attended: the kernel takes a sliding window, not any mask"]


def test_attention_to_later_tokens_is_declined(rewrite, graph_of, attention, calls):
    result = rewrite("lower_attention", graph_of(attention(is_causal=0), **INPUTS, **CONTRACT), calls()[1])
    assert result.applied == 0
    assert result.unchanged
    assert result.declined == ["attended: the kernel's attention is causal"]


@pytest.mark.parametrize("after", [(), ("fuse_qkv",)])
@pytest.mark.parametrize("biased", [False, True])
def test_every_layer_of_a_model_is_lowered_and_lengths_are_computed_once(rewrite_model, model_of, after, biased):
    model = model_of(attention_bias=biased, mlp_bias=biased)
    result = rewrite_model("lower_attention", model, after=after)
    assert result.applied == 3
    assert result.ops["GroupQueryAttention"] == 3
    assert (result.ops["ReduceMax"], result.ops["Sub"], result.ops["Split"]) == (1, 1, 0)
    assert result.difference() < CLOSE


def test_every_head_may_have_its_own_key(rewrite_model, model_of):
    result = rewrite_model("lower_attention", model_of(num_key_value_heads=4, num_hidden_layers=1))
    assert result.applied == 1
    assert result.difference() < CLOSE


def test_a_cache_of_another_operator_is_left(rewrite, graph_of, numbers):
    def write(builder, cache, update, lengths):
        return builder.op("TensorScatter", cache, update, lengths, axis=2)

    update = ("float32", ("batch", 2, 1, 16))
    graph = graph_of(write, cache=CACHE, update=update, past_lengths=CONTRACT["past_lengths"])
    feeds = {"cache": numbers(1, 2, CAPACITY, 16), "update": numbers(1, 2, 1, 16), "past_lengths": np.array([2])}
    result = rewrite("lower_attention", graph, feeds)
    assert result.applied == 0
    assert result.unchanged


def test_tokens_that_cannot_be_counted_are_declined(rewrite, graph_of, attention, calls):
    graph = graph_of(attention(), **INPUTS, ids=CONTRACT["input_ids"], past_lengths=CONTRACT["past_lengths"])
    feeds = [{"ids" if name == "input_ids" else name: array for name, array in call.items()} for call in calls()]
    graph.graph.outputs[1].name, graph.graph.outputs[2].name = "key", "value"
    result = rewrite("lower_attention", graph, *feeds)
    assert result.applied == 0
    assert result.unchanged
    assert result.declined == ["attended: the graph has no input_ids to count tokens by"]


def test_heads_the_kernel_does_not_take_stay_standard_operators(rewrite, graph_of, numbers):
    def write(builder, packed, past_key, past_value, ids, lengths):
        return attend(builder, parts_of(builder, packed, (48, 24, 24)), (past_key, past_value), lengths)

    shapes = dict.fromkeys(("past_key", "past_value"), ("float32", ("batch", 2, CAPACITY, 12)))
    graph = graph_of(write, packed=("float32", ("batch", "tokens", 96)), **shapes, **CONTRACT)
    caches = {name: numbers(1, 2, CAPACITY, 12) for name in shapes}
    call = {"packed": numbers(1, 4, 96), "input_ids": np.zeros((1, 4), np.int64), "past_lengths": np.array([3])}
    result = rewrite("lower_attention", graph, call | caches)
    assert (result.applied, result.ops["SlotAttention"]) == (0, 1)
    assert "the kernel takes heads of a multiple of 8 columns, not of 12" in result.declined[0]
    assert result.is_identical()
