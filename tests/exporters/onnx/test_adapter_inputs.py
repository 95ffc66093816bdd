"""Inputs for an adapter's factors: optional, of any rank, and nothing where none are given."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from llmopt.exporters.onnx.adapter_inputs import adapter_inputs, is_adapter_input, with_defaults


@pytest.fixture
def session() -> ort.InferenceSession:
    """``y = x + up (down x) + bias`` for x of 4 columns."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(("rows", 4)))
    down, up, bias = adapter_inputs("it", 4, 4, biased=True)
    inner = ir.node("MatMul", [x, down])
    outer = ir.node("MatMul", [inner.outputs[0], up])
    added = ir.node("Add", [x, outer.outputs[0]])
    last = ir.node("Add", [added.outputs[0], bias])
    y = last.outputs[0]
    y.name, y.type, y.shape = "y", x.type, x.shape
    graph = ir.Graph([x, down, up, bias], [y], nodes=[inner, outer, added, last], opset_imports={"": 21}, name="g")
    with_defaults(graph)
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_they_need_not_be_given(session: ort.InferenceSession) -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    assert [value.name for value in session.get_inputs()] == ["x"]
    assert np.array_equal(session.run(None, {"x": x})[0], x)


@pytest.mark.parametrize("rank", [1, 3])
def test_they_may_have_any_rank(session: ort.InferenceSession, rank: int) -> None:
    generator = np.random.default_rng(0)
    x, down, up, bias = (generator.standard_normal(shape, np.float32) for shape in ((2, 4), (4, rank), (rank, 4), (4,)))
    feeds = {"x": x, "it.lora_A.weight": down, "it.lora_B.weight": up, "it.lora_B.bias": bias}
    assert np.allclose(session.run(None, feeds)[0], x + x @ down @ up + bias, atol=1e-5)  # float32, sums of 4


def test_they_are_known_by_their_names() -> None:
    assert all(is_adapter_input(str(value.name)) for value in adapter_inputs("it", 4, 4, biased=True))
    assert not is_adapter_input("past.0.key")
