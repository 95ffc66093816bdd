"""Weights as initializers: what ONNX dequantizes is what the model says they stand for."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from llmopt.exporters.onnx.builder import GraphBuilder
from llmopt.exporters.onnx.standard import IR_VERSION
from llmopt.exporters.onnx.weights import linear_weight, table, vector
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
    weight = QuantWeight.of(*quantize(random(), scheme), scheme)
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
    linear_weight(builder, "layer", QuantWeight.of(*weight, scheme))
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
