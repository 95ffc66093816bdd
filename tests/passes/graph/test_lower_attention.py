"""Slot attention as GroupQueryAttention: the same numbers and the same caches."""

import numpy as np
import pytest

CAPACITY = 8
CACHE = ("float32", ("batch", 2, CAPACITY, 16))
INPUTS = {"packed": ("float32", ("batch", "tokens", 128)), "past_key": CACHE, "past_value": CACHE}
CONTRACT = {"input_ids": ("int64", ("batch", "tokens")), "past_lengths": ("int64", ("batch",))}
CLOSE = 2e-6
"""Both sum the same float32 products, in another order."""


@pytest.fixture
def attention(numbers):
    """Writes a Split of ``sizes``, whose parts ``order`` become query, key and value, and the attention of them."""
    angles = np.arange(CAPACITY)[:, None] / 100 ** (np.arange(8) / 8)
    rope = [np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)]

    def writer(sizes=(64, 32, 32), order=(0, 1, 2), *, keep_query=False, **changes):
        def write(builder, packed, past_key, past_value, ids, lengths):
            cos, sin = (builder.constant(array, f"rope{i}") for i, array in enumerate(rope))
            split = builder.op("Constant", value_ints=list(sizes))
            parts = builder.op_multi("Split", packed, split, names=[f"part{i}" for i in range(len(sizes))], axis=-1)
            query, key, value = (parts[i] for i in order)
            attributes = {"num_heads": 4, "kv_num_heads": 2, "scale": 0.25} | changes
            outputs = builder.op_multi(
                "SlotAttention", query, key, value, past_key, past_value, lengths, cos, sin,
                names=["attended", "present.0.key", "present.0.value"], domain="llmopt", **attributes,
            )  # fmt: skip
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
