"""Gate and up of a gated MLP from one matrix multiplication."""

import numpy as np
import pytest

X = ("float32", ("batch", "tokens", 8))


@pytest.fixture
def feeds(numbers):
    return {"x": numbers(2, 3, 8)}


ACTIVATIONS = {
    "silu": ("QuickGelu", {"alpha": 1.0, "domain": "com.microsoft"}),
    "gelu": ("Gelu", {"approximate": "none"}),
    "gelu_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
}


def activated(builder, x, kind="silu"):
    op_type, attributes = ACTIVATIONS[kind]
    return builder.op(op_type, x, **attributes)


def mlp(gate, up, kind="silu", *, up_first=False):
    """Writes ``activation(gate) * up``; ``gate`` and ``up`` are called with the builder and x."""

    def write(builder, x):
        factors = [activated(builder, gate(builder, x), kind), up(builder, x)]
        return builder.op("Mul", *(reversed(factors) if up_first else factors), name="mlp.product")

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


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("up_first", [False, True])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_both_products_become_one_multiplication(rewrite, graph_of, numbers, feeds, kind, up_first, biased):
    biases = [numbers(16), numbers(16)] if biased else [None, None]
    gate, up = (linear(numbers, name, bias=bias) for name, bias in zip(("gate", "up"), biases, strict=True))
    result = rewrite("fuse_gate_up", graph_of(mlp(gate, up, kind, up_first=up_first), x=X), feeds)
    assert result.applied == 1
    assert (result.ops["MatMul"], result.ops["Add"], result.ops[ACTIVATIONS[kind][0]]) == (1, int(biased), 1)
    assert result.declined == []
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
    result = rewrite_model("fuse_gate_up", model, after=["select_rows", "fuse_activation"])
    assert result.applied == 2
    names = [name for name in result.graph.graph.initializers if "mlp" in name]
    assert not [name for name in names if "gate_proj" in name or "up_proj" in name.replace("gate_up", "")]
    assert result.difference() < 1e-6


def test_different_schemes_are_declined(rewrite_model, model_of):
    options = {"group_size": 32, "overrides": [{"match": "model.layers.0.mlp.up_proj", "scheme": "W8A16"}]}
    result = rewrite_model("fuse_gate_up", model_of("W4A16", options, num_hidden_layers=2), after=["fuse_activation"])
    assert result.applied == 1
    assert result.declined == ["model.layers.0.mlp.product: the linears have different schemes"]
    assert result.difference() < 1e-6


def test_a_linear_kept_in_float_is_declined(rewrite_model, model_of):
    options = {"overrides": [{"match": "model.layers.1.mlp.gate_proj", "scheme": "none"}]}
    result = rewrite_model("fuse_gate_up", model_of("W8A16", options, num_hidden_layers=2), after=["fuse_activation"])
    assert result.applied == 1
    assert result.declined == ["model.layers.1.mlp.product: some of the linears are quantized and some are not"]


def test_different_widths_are_declined(rewrite, graph_of, numbers, feeds):
    graph = graph_of(mlp(linear(numbers, "gate"), linear(numbers, "up", width=1)), x=X)
    result = rewrite("fuse_gate_up", graph, feeds)
    assert result.applied == 0
    assert result.unchanged
    assert result.declined == ["mlp.product: gate and up have 16 and 1 columns"]


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


def test_linears_of_different_inputs_are_declined(rewrite, graph_of, numbers, feeds):
    up = linear(numbers, "up")

    def other(builder, x):
        return up(builder, builder.op("Abs", x))

    result = rewrite("fuse_gate_up", graph_of(mlp(linear(numbers, "gate"), other), x=X), feeds)
    assert result.applied == 0
    assert result.unchanged
    assert result.declined == ["mlp.product: the linears read different inputs"]


@pytest.mark.parametrize("part", ["gate", "activated", "up"])
def test_a_result_that_is_read_elsewhere_is_declined(rewrite, graph_of, numbers, feeds, part):
    gate, up = linear(numbers, "gate"), linear(numbers, "up")

    def write(builder, x):
        parts = {"gate": gate(builder, x), "up": up(builder, x)}
        parts["activated"] = activated(builder, parts["gate"])
        return builder.op("Mul", parts["activated"], parts["up"], name="mlp.product"), builder.op("Abs", parts[part])

    result = rewrite("fuse_gate_up", graph_of(write, x=X), feeds)
    assert result.applied == 0
    assert result.unchanged
    assert result.declined == ["mlp.product: a linear's result is read by something else too"]


def test_a_bias_on_one_side_only_is_declined(rewrite, graph_of, numbers, feeds):
    graph = graph_of(mlp(linear(numbers, "gate", bias=numbers(16)), linear(numbers, "up")), x=X)
    result = rewrite("fuse_gate_up", graph, feeds)
    assert result.applied == 0
    assert result.unchanged
    assert result.declined == ["mlp.product: some of the linears have a bias and some have none"]


def test_a_weight_that_is_read_elsewhere_is_declined(rewrite, graph_of, numbers, feeds):
    weights = [numbers(8, 16), numbers(8, 16)]

    def write(builder, x):
        gate, up = (builder.constant(array, f"weight{i}") for i, array in enumerate(weights))
        product = mlp(lambda b, x: b.op("MatMul", x, gate), lambda b, x: b.op("MatMul", x, up))(builder, x)
        return product, builder.op("Abs", gate)

    result = rewrite("fuse_gate_up", graph_of(write, x=X), feeds)
    assert result.applied == 0
    assert result.unchanged
    assert result.declined == ["mlp.product: a weight is read by something else too, and would be stored twice"]


def test_a_packed_linear_is_left_as_it_is(rewrite, graph_of, numbers, feeds):
    packed = linear(numbers, "gate_up", width=32)

    def write(builder, x):
        gate, up = builder.op_multi("Split", packed(builder, x), axis=-1, num_outputs=2, names=["gate", "up"])
        return builder.op("Mul", activated(builder, gate), up)

    result = rewrite("fuse_gate_up", graph_of(write, x=X), feeds)
    assert result.applied == 0
    assert result.unchanged
    assert result.declined == []


def test_two_unnamed_mlps_do_not_mix_their_weights(rewrite, graph_of, numbers, feeds):
    layers = [[linear(numbers, f"{name}{i}", width=8) for name in ("gate", "up")] for i in range(2)]

    def write(builder, x):
        for gate, up in layers:
            x = builder.op("Mul", activated(builder, gate(builder, x)), up(builder, x))
        return x

    result = rewrite("fuse_gate_up", graph_of(write, x=X), feeds)
    assert result.applied == 2
    assert result.difference() < 1e-6


def test_a_plain_mlp_is_left(rewrite, graph_of, numbers, feeds):
    result = rewrite("fuse_gate_up", graph_of(linear(numbers, "up", bias=np.ones(16, np.float32)), x=X), feeds)
    assert result.applied == 0
    assert result.unchanged
