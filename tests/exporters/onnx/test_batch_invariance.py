import onnx_ir as ir
import pytest

from llmopt.exporters.onnx.batch_invariance import batch_dependent
from llmopt.optimizer import instructions


def model_of(op, domain="", **attributes):
    x = ir.Value(name="x", shape=ir.Shape([1, 2]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node(op, [x], attributes=attributes, domain=domain, name="it")
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 24, "com.microsoft": 1})
    return ir.Model(graph, ir_version=10)


@pytest.fixture(autouse=True)
def vnni(monkeypatch):
    monkeypatch.setattr("llmopt.exporters.onnx.batch_invariance.host_instructions", lambda: "vnni")


@pytest.mark.parametrize(
    ("op", "domain"),
    [
        ("MatMul", ""),
        ("Softmax", ""),
        ("GroupQueryAttention", "com.microsoft"),
        ("MatMulIntegerToFloat", "com.microsoft"),
    ],
)
def test_kernels_that_compute_rows_one_by_one_are_accepted(op, domain):
    assert batch_dependent(model_of(op, domain)) == []


@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (8, 64), (2, 64)])
def test_small_blocks_are_accepted(bits, block):
    assert (
        batch_dependent(model_of("MatMulNBits", "com.microsoft", bits=bits, block_size=block, accuracy_level=4)) == []
    )


@pytest.mark.parametrize(
    ("op", "domain", "attributes", "words"),
    [
        ("MatMulNBits", "com.microsoft", {"bits": 4, "block_size": 128, "accuracy_level": 4}, "blocks of 128 columns"),
        ("MatMulNBits", "com.microsoft", {"bits": 4, "block_size": 32, "accuracy_level": 0}, "multiplies floats"),
        ("DynamicQuantizeMatMul", "com.microsoft", {}, "not measured"),
        ("Attention", "", {}, "may sum rows together"),
    ],
)
def test_kernels_whose_rows_depend_on_each_other_are_named(op, domain, attributes, words):
    (found,) = batch_dependent(model_of(op, domain, **attributes))
    assert found.startswith(f"{op} it: ")
    assert words in found


def test_blocks_of_32_depend_on_the_batch_without_vnni(monkeypatch):
    model = model_of("MatMulNBits", "com.microsoft", bits=4, block_size=32, accuracy_level=4)
    assert instructions.LARGEST_BLOCK["avx2"][4] == 16
    monkeypatch.setattr("llmopt.exporters.onnx.batch_invariance.host_instructions", lambda: "avx2")
    assert batch_dependent(model)
