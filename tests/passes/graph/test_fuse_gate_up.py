"""Gate and up of a gated MLP from one matrix multiplication."""

import itertools

import numpy as np
import pytest

X = ("float32", ("batch", "tokens", 8))


@pytest.fixture
def feeds(numbers):
    return {"x": numbers(2, 3, 8)}


def mlp(gate, up):
    """Writes ``silu(gate) * up``; ``gate`` and ``up`` are called with the builder and x."""

    def write(builder, x):
        g = gate(builder, x)
        return builder.op("Mul", builder.op("Mul", g, builder.op("Sigmoid", g)), up(builder, x), name="mlp.product")

    return write


def linear(numbers, name, width=16, bias=None, *, bias_first=False):
    weight = numbers(8, width)

    def write(builder, x):
        y = builder.op("MatMul", x, builder.constant(weight, f"{name}.weight"))
        if bias is None:
            return y
        operands = (y, builder.constant(bias, f"{name}.bias"))
        return builder.op("Add", *(reversed(operands) if bias_first else operands))

    return write


ORDERS = list(itertools.product([False, True], repeat=3))


@pytest.mark.parametrize(("gate_last", "silu_last", "biased"), ORDERS)
def test_every_order_of_the_products_becomes_one_multiplication(
    rewrite, graph_of, numbers, feeds, gate_last, silu_last, biased
):
    biases = [numbers(16), numbers(16)] if biased else [None, None]
    gate, up = (linear(numbers, name, bias=bias) for name, bias in zip(("gate", "up"), biases, strict=True))

    def write(builder, x):
        g = gate(builder, x)
        silu = [g, builder.op("Sigmoid", g)]
        product = [builder.op("Mul", *(reversed(silu) if silu_last else silu)), up(builder, x)]
        return builder.op("Mul", *(reversed(product) if gate_last else product))

    result = rewrite("fuse_gate_up", graph_of(write, x=X), feeds)
    assert result.applied == 1
    assert (result.ops["MatMul"], result.ops["Add"]) == (1, int(biased))
    assert result.difference() < 1e-6


def test_biases_are_packed_on_either_side(rewrite, graph_of, numbers, feeds):
    gate, up = (linear(numbers, name, bias=numbers(16), bias_first=name == "up") for name in ("gate", "up"))
    result = rewrite("fuse_gate_up", graph_of(mlp(gate, up), x=X), feeds)
    assert result.applied == 1
    assert result.difference() < 1e-6


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("scheme", "options"),
    [(None, {}), ("W8A8", {}), ("W8A16", {}), ("W4A16", {"group_size": 32}), ("W4A16_ASYM", {"group_size": 16})],
)
def test_every_scheme_is_packed_without_rounding_again(rewrite_model, model_of, scheme, options, bias):
    model = model_of(scheme, options, num_hidden_layers=2, attention_bias=bias, mlp_bias=bias)
    result = rewrite_model("fuse_gate_up", model, after=["select_rows"])
    assert result.applied == 2
    names = [name for name in result.graph.graph.initializers if "mlp" in name]
    assert not [name for name in names if "gate_proj" in name or "up_proj" in name.replace("gate_up", "")]
    assert result.difference() < 1e-6


def test_different_schemes_are_declined(rewrite_model, model_of):
    options = {"group_size": 32, "overrides": [{"match": "model.layers.0.mlp.up_proj", "scheme": "W8A16"}]}
    result = rewrite_model("fuse_gate_up", model_of("W4A16", options, num_hidden_layers=2))
    assert result.applied == 1
    assert result.declined == ["model.layers.0.mlp.product: the linears have different schemes"]
    assert result.difference() < 1e-6


def test_a_linear_kept_in_float_is_declined(rewrite_model, model_of):
    options = {"overrides": [{"match": "model.layers.1.mlp.gate_proj", "scheme": "none"}]}
    result = rewrite_model("fuse_gate_up", model_of("W8A16", options, num_hidden_layers=2))
    assert result.applied == 1
    assert result.declined == ["model.layers.1.mlp.product: some of the linears are quantized and some are not"]


def test_different_widths_are_declined(rewrite, graph_of, numbers, feeds):
    graph = graph_of(mlp(linear(numbers, "gate"), linear(numbers, "up", width=1)), x=X)
    result = rewrite("fuse_gate_up", graph, feeds)
    assert result.applied == 0
    assert result.unchanged
    assert result.declined == ["mlp.product: gate and up differ in shape: [8,16] and [8,1]"]


@pytest.mark.parametrize("shape", [(1,), (3, 16)])
def test_an_addend_that_is_no_bias_is_declined(rewrite, graph_of, numbers, feeds, shape):
    gate, up = (linear(numbers, name, bias=numbers(*shape)) for name in ("gate", "up"))
    result = rewrite("fuse_gate_up", graph_of(mlp(gate, up), x=X), feeds)
    assert result.applied == 0
    assert result.unchanged
    assert result.declined == ["mlp.product: an addend is no constant vector with one value per output"]


def test_an_addend_that_is_not_constant_is_declined(rewrite, graph_of, numbers, feeds):
    weight = numbers(8, 8)

    def residual(name):
        return lambda builder, x: builder.op("Add", builder.op("MatMul", x, builder.constant(weight, "w")), x)

    result = rewrite("fuse_gate_up", graph_of(mlp(residual("gate"), residual("up")), x=X), feeds)
    assert result.applied == 0
    assert result.declined


def test_a_gate_that_is_read_elsewhere_is_left(rewrite, graph_of, numbers, feeds):
    gate, up = linear(numbers, "gate"), linear(numbers, "up")

    def write(builder, x):
        g = gate(builder, x)
        return builder.op("Mul", builder.op("Mul", g, builder.op("Sigmoid", g)), up(builder, x)), g

    result = rewrite("fuse_gate_up", graph_of(write, x=X), feeds)
    assert result.applied == 0
    assert result.unchanged


def test_a_bias_on_one_side_only_is_left(rewrite, graph_of, numbers, feeds):
    graph = graph_of(mlp(linear(numbers, "gate", bias=numbers(16)), linear(numbers, "up")), x=X)
    result = rewrite("fuse_gate_up", graph, feeds)
    assert result.applied == 0
    assert result.unchanged


def test_two_unnamed_mlps_do_not_mix_their_weights(rewrite, graph_of, numbers, feeds):
    layers = [[linear(numbers, f"{name}{i}", width=8) for name in ("gate", "up")] for i in range(2)]

    def write(builder, x):
        for gate, up in layers:
            g = gate(builder, x)
            x = builder.op("Mul", builder.op("Mul", g, builder.op("Sigmoid", g)), up(builder, x))
        return x

    result = rewrite("fuse_gate_up", graph_of(write, x=X), feeds)
    assert result.applied == 2
    assert result.difference() < 1e-6


def test_a_plain_mlp_is_left(rewrite, graph_of, numbers, feeds):
    result = rewrite("fuse_gate_up", graph_of(linear(numbers, "up", bias=np.ones(16, np.float32)), x=X), feeds)
    assert result.applied == 0
    assert result.unchanged
