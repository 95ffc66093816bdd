"""Floats of 16 bits: what becomes of weights, scales, caches and logits, and what has no place in them."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from llmopt.exporters.onnx.builder import GraphBuilder
from llmopt.exporters.onnx.lowering import finished, stages
from llmopt.exporters.onnx.standard import IR_VERSION, standard_graph
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.graph_precision import set_precision
from llmopt.optimizer.model import DenseWeight
from llmopt.optimizer.target import TARGETS
from llmopt.passes.graph.use_half_precision import UseHalfPrecision
from llmopt.passes.round_to_nearest import RoundToNearest


def small_graph(scale: float = 0.01, factor: float = 2.0, weight: float = 3.0) -> ir.Model:
    """``y = x @ dequantized * factor + weight``, with one scale for each column."""
    builder = GraphBuilder()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", 4]))
    values = builder.constant(np.arange(12, dtype=np.int8).reshape(4, 3), "values")
    scales = builder.constant(np.full(3, scale, np.float32), "scales")
    product = builder.op("MatMul", x, builder.op("DequantizeLinear", values, scales, axis=1, name="matrix"))
    scaled = builder.op("Mul", product, builder.constant(np.float32(factor), "factor"))
    y = builder.op("Add", scaled, builder.constant(np.full(3, weight, np.float32), "bias"), name="y")
    for value in (node.outputs[0] for node in builder.nodes):
        value.type = ir.TensorType(ir.DataType.FLOAT)
    y.shape = ir.Shape(["rows", 3])
    graph = ir.Graph(
        [x], [y], nodes=builder.nodes, initializers=builder.initializers, opset_imports={"": 24}, name="small"
    )
    return ir.Model(graph, ir_version=IR_VERSION)


@pytest.mark.parametrize(("dtype", "kind"), [("float16", ir.DataType.FLOAT16), ("bfloat16", ir.DataType.BFLOAT16)])
def test_everything_but_the_scales_and_the_output_is_of_16_bits(dtype, kind):
    graph = small_graph()

    UseHalfPrecision(dtype=dtype).run(graph, PassContext())

    stored = {name: value.const_value.dtype for name, value in graph.graph.initializers.items()}
    assert stored == {
        "values": ir.DataType.INT8, "scales": ir.DataType.FLOAT, "factor": kind, "bias": kind,
    }  # fmt: skip
    assert graph.graph.inputs[0].dtype == kind
    dequantized, *between, cast = graph.graph
    assert dequantized.attributes["output_dtype"].as_int() == kind.value
    assert {node.outputs[0].dtype for node in between} == {kind}
    assert cast.op_type == "Cast"
    assert [(value.name, value.dtype) for value in graph.graph.outputs] == [("y", ir.DataType.FLOAT)]


def test_the_scales_of_groups_have_the_type_of_the_result(model_of):
    model = RoundToNearest(scheme="W4A16", group_size=16).run(model_of(), PassContext())
    graph, _ = finished(stages(model, TARGETS["tensorrt"], capacity=16))

    scales = [value for name, value in graph.graph.initializers.items() if name.endswith("q_proj.weight_scale")]
    assert [value.const_value.dtype for value in scales] == [ir.DataType.FLOAT16] * model.num_layers


def test_there_and_back_is_the_same_graph_with_rounded_numbers(model_of):
    graph = standard_graph(model_of(), capacity=16)
    small, _ = finished(stages(model_of(), TARGETS["tensorrt"], capacity=16))
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = graph.graph.initializers[name].const_value.numpy()

    set_precision(small, "float32")

    found = small.graph.initializers[name].const_value.numpy()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.astype(np.float16).astype(np.float32))
    kinds = {value.dtype for node in small.graph for value in node.outputs}
    assert not kinds & {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


def test_bfloat16_rounds_to_the_nearest():
    graph = small_graph(weight=1.00391)  # just above the middle of two numbers that are 2^-7 apart

    set_precision(graph, "bfloat16")

    assert graph.graph.initializers["bias"].const_value.numpy().tolist() == [ml_dtypes.bfloat16(1.0078125)] * 3


def test_a_number_that_has_no_place_is_named():
    with pytest.raises(PassError, match=r"bias holds 7e\+04, which is beyond float16"):
        UseHalfPrecision().run(small_graph(weight=70000.0), PassContext())
    UseHalfPrecision(dtype="bfloat16").run(small_graph(weight=70000.0), PassContext())


@pytest.mark.parametrize(("factor", "found"), [(1e-12, 2**-14), (-3.4e38, -65504.0)])
def test_what_keeps_a_divisor_from_zero_or_masks_a_score_still_does(factor, found):
    graph = small_graph(factor=factor)

    UseHalfPrecision().run(graph, PassContext())

    assert graph.graph.initializers["factor"].const_value.numpy() == np.float16(found)


def test_a_scale_that_would_become_zero_is_named(model_of):
    model = model_of()
    name = "model.layers.0.self_attn.q_proj.weight"
    tiny = model.with_weights({name: DenseWeight.of(model.weights[name].dense() * 1e-9)})
    quantized = RoundToNearest(scheme="W4A16", group_size=16).run(tiny, PassContext())
    graph, _ = finished(stages(quantized, TARGETS["tensorrt"], capacity=16))

    with pytest.raises(PassError, match=r"q_proj\.weight_scale holds .* which becomes 0 in float16"):
        graph.graph.initializers[f"{name}_scale"].const_value.numpy()


def test_a_composite_that_is_left_is_named(model_of):
    with pytest.raises(PassError, match=r"model\.layers\.0\.attention\.output is a composite"):
        UseHalfPrecision().run(standard_graph(model_of(), capacity=16), PassContext())
