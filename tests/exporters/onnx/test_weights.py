"""Weights as initializers: what ONNX dequantizes is what the model says they stand for."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from llmopt.exporters.onnx.builder import GraphBuilder
from llmopt.exporters.onnx.standard import IR_VERSION
from llmopt.exporters.onnx.weights import expert_weights, linear_weight, table, vector
from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.model import DenseWeight, QuantWeight
from llmopt.optimizer.rounding import quantize
from llmopt.optimizer.scheme import PRESETS

SCHEMES = [
    PRESETS["W8A8"],
    PRESETS["W8A16"].with_group_size(16),
    PRESETS["W4A16"].with_group_size(16),
    PRESETS["W4A16"].with_group_size(-1),
    PRESETS["W4A16_ASYM"].with_group_size(16),
    PRESETS["W4A16_ASYM"].with_group_size(-1),
]


def computed(builder, value):
    """The value, made by ONNX Runtime without folding anything."""
    output = builder.op("Identity", value, name="output")
    output.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [], [output], nodes=builder.nodes, initializers=builder.initializers, opset_imports={"": 24}, name="weight"
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    data = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, {})[0]


def random(rows=6, columns=48):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_float_linear_is_stored_transposed_in_float32(dtype):
    weight = DenseWeight.of(random().to(dtype))
    builder = GraphBuilder()
    value = linear_weight(builder, "layer", weight)
    assert (value.name, value.dtype, list(value.shape)) == ("layer.weight", ir.DataType.FLOAT, [48, 6])
    np.testing.assert_array_equal(computed(builder, value), weight.dense().numpy().T)


def test_a_float_table_is_stored_as_it_is():
    weight = DenseWeight.of(random())
    builder = GraphBuilder()
    np.testing.assert_array_equal(computed(builder, table(builder, "embed.weight", weight)), weight.dense().numpy())


def test_a_vector_is_stored_in_float32():
    weight = DenseWeight.of(random()[0].to(torch.bfloat16))
    builder = GraphBuilder()
    np.testing.assert_array_equal(computed(builder, vector(builder, "norm.weight", weight)), weight.dense().numpy())


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_integers_are_dequantized_to_what_they_stand_for(scheme):
    weight = QuantWeight.of(quantize(random(), scheme), scheme)
    for write, expected in (
        (lambda builder: linear_weight(builder, "layer", weight), weight.dense().numpy().T),
        (lambda builder: table(builder, "layer.weight", weight), weight.dense().numpy()),
    ):
        builder = GraphBuilder()
        np.testing.assert_allclose(computed(builder, write(builder)), expected, rtol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_the_initializers_are_the_models_own_numbers(scheme):
    weight = quantize(random(), scheme)
    builder = GraphBuilder()
    linear_weight(builder, "layer", QuantWeight.of(weight, scheme))
    stored = {value.name: value.const_value for value in builder.initializers}
    integers = ir.DataType.INT8 if scheme.weights.num_bits == 8 else ir.DataType.INT4
    assert stored["layer.weight"].dtype == integers
    np.testing.assert_array_equal(stored["layer.weight"].numpy().astype(np.int8), weight.values.numpy().T)
    flat = scheme.weights.group_size is None
    np.testing.assert_array_equal(
        stored["layer.weight_scale"].numpy(), weight.scale.numpy()[:, 0] if flat else weight.scale.numpy().T
    )
    assert ("layer.weight_zero_point" in stored) == (weight.zero is not None)
    if weight.zero is not None:
        zero = stored["layer.weight_zero_point"].numpy().astype(np.int8)
        np.testing.assert_array_equal(zero, weight.zero.numpy()[:, 0] if flat else weight.zero.numpy().T)


def test_nothing_is_read_before_it_is_asked_for():
    reads = []

    def load():
        reads.append(1)
        return random()

    builder = GraphBuilder()
    value = linear_weight(builder, "layer", DenseWeight((6, 48), torch.float32, load))
    assert reads == []
    value.const_value.numpy()
    assert reads == [1]


INNER, HIDDEN = 32, 48


def random_experts(count=3):
    """Gate, up and down of each, float32 ``[out, in]``."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    return [tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(count)]


def rounded(matrix, scheme):
    return QuantWeight.of(quantize(matrix, scheme), scheme)


def stacked(experts):
    """What a layer's initializers stand for, from float32 matrices ``[out, in]``."""
    gate_up = np.stack([np.concatenate([gate.numpy(), up.numpy()]).T for gate, up, _ in experts])
    return gate_up, np.stack([down.numpy().T for *_, down in experts])


def written_experts(experts):
    """Both weights as ONNX Runtime computes them, and the initializers by name."""
    found = []
    for i in range(2):
        builder = GraphBuilder()
        found.append(computed(builder, expert_weights(builder, "layer", experts)[i]))
    return found, {value.name: value for value in builder.initializers}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_experts_are_stacked_transposed_with_up_behind_gate(dtype):
    experts = [tuple(matrix.to(dtype) for matrix in expert) for expert in random_experts()]
    found, stored = written_experts([tuple(DenseWeight.of(matrix) for matrix in expert) for expert in experts])
    for array, expected in zip(found, stacked([[m.float() for m in expert] for expert in experts]), strict=True):
        np.testing.assert_array_equal(array, expected)
    assert {name: value.dtype for name, value in stored.items()} == {
        "layer.gate_up": ir.DataType.FLOAT,
        "layer.down": ir.DataType.FLOAT,
    }


@pytest.mark.parametrize("down", [None, PRESETS["W8A16"]], ids=["one scheme", "down in 8 bits"])
@pytest.mark.parametrize("scheme", SCHEMES[1:], ids=lambda scheme: scheme.name)
def test_integer_experts_are_dequantized_to_what_they_stand_for(scheme, down):
    schemes = (scheme, scheme, down or scheme)
    experts = [tuple(map(rounded, expert, schemes)) for expert in random_experts()]
    found, stored = written_experts(experts)
    for array, expected in zip(found, stacked([[w.dense() for w in expert] for expert in experts]), strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-6)
    integers = ir.DataType.INT8 if scheme.weights.num_bits == 8 else ir.DataType.INT4
    assert (stored["layer.gate_up"].dtype, list(stored["layer.gate_up"].shape)) == (integers, [3, HIDDEN, 2 * INNER])
    assert ("layer.gate_up_zero_point" in stored) == (not scheme.weights.symmetric)
    gate, up, _ = experts[1]
    np.testing.assert_array_equal(
        stored["layer.gate_up"].const_value.numpy()[1].astype(np.int8),
        torch.cat([gate.load().values, up.load().values]).numpy().T,
    )


@pytest.mark.parametrize("which", [0, 1, 2], ids=["gate", "up", "down"])
@pytest.mark.parametrize("other", ["W4A16_ASYM", "float"])
def test_experts_of_different_schemes_are_refused_by_name(which, other):
    experts = [[rounded(matrix, PRESETS["W8A16"]) for matrix in expert] for expert in random_experts()]
    matrix = random_experts()[1][which]
    scheme = PRESETS["W4A16_ASYM"].with_group_size(16)
    experts[1][which] = DenseWeight.of(matrix) if other == "float" else rounded(matrix, scheme)
    part = "down" if which == 2 else "gate_up"
    names = "W4A16_ASYM g16, W8A16" if other == "W4A16_ASYM" else "W8A16, float"
    with pytest.raises(UnsupportedError, match=f"layer.{part}: its experts have different schemes: {names}"):
        expert_weights(GraphBuilder(), "layer", [tuple(expert) for expert in experts])


def test_experts_with_quantized_activations_are_refused():
    experts = [tuple(rounded(matrix, PRESETS["W8A8"]) for matrix in expert) for expert in random_experts()]
    with pytest.raises(UnsupportedError, match="experts with quantized activations have no graph"):
        expert_weights(GraphBuilder(), "layer", experts)


def test_an_expert_is_read_when_it_is_written_and_only_that_one():
    reads = []

    def load(e):
        reads.append(e)
        return torch.ones(INNER, HIDDEN)

    experts = []
    for e in range(3):
        weight = DenseWeight((INNER, HIDDEN), torch.float32, lambda e=e: load(e))
        experts.append((weight, weight, DenseWeight.of(torch.ones(HIDDEN, INNER))))
    gate_up, _ = expert_weights(GraphBuilder(), "layer", experts)
    assert reads == []
    gate_up.const_value.part(1)
    assert set(reads) == {1}
