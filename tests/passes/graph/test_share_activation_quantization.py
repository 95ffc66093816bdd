"""The rounding of a value is spelled out once, whoever reads it."""

import numpy as np
import pytest

X = ("float32", ("batch", "tokens", 8))


def rounded(builder, x):
    return builder.op("QuantizeDequantizePerToken", x, domain="llmopt")


@pytest.fixture
def feeds(numbers):
    x = numbers(2, 3, 8)
    x[1, 2] = 0
    return {"x": x}


def test_a_rounding_becomes_integers_and_their_scales(rewrite, graph_of, feeds):
    result = rewrite("share_activation_quantization", graph_of(rounded, x=X), feeds)
    assert result.applied == 1
    kinds = ("Abs", "ReduceMax", "Div", "QuantizeLinear", "DequantizeLinear", "Mul")
    assert [result.ops[kind] for kind in kinds] == [1] * 6
    assert "QuantizeDequantizePerToken" not in result.ops
    assert result.is_identical()


def test_several_roundings_of_one_value_become_one(rewrite, graph_of, feeds):
    def write(builder, x):
        return [builder.op("Sigmoid", rounded(builder, x)) for _ in range(3)]

    result = rewrite("share_activation_quantization", graph_of(write, x=X), feeds)
    assert (result.ops["QuantizeLinear"], result.ops["ReduceMax"], result.ops["Mul"]) == (1, 1, 1)
    assert result.is_identical()


def test_roundings_of_different_values_stay_apart(rewrite, graph_of, feeds):
    def write(builder, x):
        return rounded(builder, x), rounded(builder, builder.op("Sigmoid", x))

    result = rewrite("share_activation_quantization", graph_of(write, x=X), feeds)
    assert (result.applied, result.ops["QuantizeLinear"]) == (2, 2)
    assert result.is_identical()


def test_numbers_on_the_border_of_two_integers_round_as_before(rewrite, graph_of):
    x = (np.arange(-127, 129, dtype=np.float32) / 2).reshape(1, 2, 128)
    x[..., 0] = 127
    wide = ("float32", ("batch", "tokens", 128))
    assert rewrite("share_activation_quantization", graph_of(rounded, x=wide), {"x": x}).is_identical()


@pytest.mark.parametrize("after", [(), ("select_rows", "fuse_qkv", "fuse_gate_up")])
def test_a_layer_rounds_four_values_and_the_head_one(rewrite_model, model_of, after):
    result = rewrite_model("share_activation_quantization", model_of("W8A8", num_hidden_layers=2), after=after)
    assert result.applied == result.ops["QuantizeLinear"] == 9
    assert result.is_identical()


def test_a_float_model_is_left(rewrite_model, model_of):
    result = rewrite_model("share_activation_quantization", model_of(num_hidden_layers=1))
    assert result.applied == 0
    assert result.unchanged
