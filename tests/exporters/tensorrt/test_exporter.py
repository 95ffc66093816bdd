"""What the tensorrt exporter writes, describes, checks and refuses; engines themselves need their GPU."""

import json
import sys
from types import SimpleNamespace

import onnx
import onnx_ir as ir
import pytest

from llmopt.exporters.tensorrt.compiler import Compiler
from llmopt.exporters.tensorrt.exporter import TensorRT
from llmopt.exporters.tensorrt.graph import name_nodes
from llmopt.exporters.tensorrt.network import check_network
from llmopt.exporters.tensorrt.package import find_package
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import MissingExtraError, UnsupportedError, VerificationError
from llmopt.optimizer.sources import load_model
from llmopt.passes.round_to_nearest import RoundToNearest

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


@pytest.fixture(scope="module")
def model(llama_of, tmp_path_factory):
    return load_model(str(llama_of()), cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def quantized(model):
    return RoundToNearest(scheme="W4A16", group_size=32, head="none").run(model, PassContext())


@pytest.fixture(scope="module")
def build(quantized, tmp_path_factory):
    """An engine for two GPUs: the build directory, its description and the records."""
    directory = tmp_path_factory.mktemp("build")
    engine, records = TensorRT(targets=["sm89", "sm120"], capacity=32, slots=4, max_chunk=16).export(
        quantized, directory, PassContext()
    )
    return directory, engine, {record.name: record for record in records}


def test_every_gpu_has_its_own_file(build):
    directory, engine, records = build
    assert engine.compiled == {"sm89": "tensorrt/sm89.engine", "sm120": "tensorrt/sm120.engine"}
    sizes = {gpu: (directory / path).stat().st_size for gpu, path in engine.compiled.items()}
    assert {gpu: records["compile"].details[gpu] for gpu in sizes} == sizes
    assert (directory / "tensorrt/build.log").read_text().count("compiling for sm") == 2


def test_what_is_compiled_is_the_same_bytes_twice(build, quantized, tmp_path):
    directory, engine, _ = build
    again, _ = TensorRT(targets=["sm89"], capacity=32, slots=4, max_chunk=16).export(quantized, tmp_path, PassContext())

    for path in ("tensorrt/model.onnx", "tensorrt/model.onnx.data", "tensorrt/network.json"):
        assert (tmp_path / path).read_bytes() == (directory / path).read_bytes()
    assert again.inputs == engine.inputs


def test_the_engine_is_described_for_the_runtime(build):
    _, engine, _ = build
    assert (engine.exporter, engine.target, engine.path) == ("tensorrt", "tensorrt", "tensorrt/model.onnx")
    assert (engine.capacity, engine.slots, engine.max_chunk, engine.kv_dtype) == (32, 4, 16, "float16")
    assert engine.inputs[3].dims == ["batch", 2, 32, 16]
    assert [info.dtype for info in (engine.inputs[3], engine.outputs[0])] == ["float16", "float32"]
    assert not engine.batch_invariant


def test_the_network_is_written_down_as_it_was_parsed(build):
    directory, _, records = build
    network = json.loads((directory / "tensorrt/network.json").read_text())
    assert network["package"] == "tensorrt_rtx"
    assert network["profiles"]["decode"] == {"batch": [1, 4, 4], "tokens": [1, 1, 1], "rows": [1, 4, 4]}
    kinds = [layer["type"] for layer in network["layers"]]
    assert kinds.count("KV_CACHE_UPDATE") == 2 * 3
    # Of each of three layers seven linears, and the head, which stays in float.
    assert records["compile"].details["network"] == {"products": 22, "quantized": 21, "caches in place": 6}
    names = {layer["name"] for layer in network["layers"]}
    assert {"model.layers.1.mlp.down_proj.output", "logits"} <= names


def test_the_onnx_file_is_valid_and_holds_nothing_but_standard_operators(build):
    directory, engine, _ = build
    onnx.checker.check_model(str(directory / engine.path))
    graph = ir.load(directory / engine.path)
    assert {node.domain for node in graph.graph} == {""}
    assert not graph.functions


def test_the_capacity_is_at_most_the_models(model):
    assert TensorRT(targets=["sm89"]).longest(model) == model.decoder.max_positions
    with pytest.raises(UnsupportedError, match=r"capacity 4096 is beyond the model's \d+ positions"):
        TensorRT(targets=["sm89"], capacity=4096).check(model)


def test_a_gpu_that_the_package_has_no_code_for_is_refused(model):
    with pytest.raises(UnsupportedError, match="does not compile for sm90, only for sm120, sm121, sm75") as caught:
        TensorRT(targets=["sm89", "sm90"]).check(model)
    assert "full tensorrt" in caught.value.hint


def test_a_gpu_is_named_once():
    with pytest.raises(ValueError, match="sm89 is given twice"):
        TensorRT(targets=["sm89", "sm89"])


def test_the_missing_extra_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match="tensorrt_rtx") as caught:
        TensorRT(targets=["sm89"]).check(model)
    assert "llmopt[tensorrt-rtx]" in caught.value.hint


def test_the_full_tensorrt_compiles_for_the_gpu_that_is_here(monkeypatch):
    full = SimpleNamespace(__name__="tensorrt", __version__="10.16.0.72")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt", full)
    package = find_package()
    assert (package.title, package.compiles_ahead) == ("tensorrt 10.16.0.72", False)
    with pytest.raises(UnsupportedError, match="compiles for the GPU that is here, which is none, not for sm89"):
        package.check_targets(("sm89",))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (8, 9))
    package.check_targets(("sm89",))


def test_a_tensorrt_without_cache_updates_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__name__="tensorrt", __version__="10.9.0.34"))
    with pytest.raises(UnsupportedError, match=r"10\.9\.0\.34 is too old"):
        find_package()


def edited(directory, change):
    """The graph of a build after ``change(graph)``, saved and parsed."""
    graph = ir.load(directory / "tensorrt/model.onnx")
    change(graph)
    path = directory / "tensorrt/edited.onnx"
    ir.save(graph, path)
    return Compiler(find_package(), path), graph


def test_the_parsers_error_names_the_node(build):
    def change(graph):
        for node in graph.graph:
            if node.op_type == "DequantizeLinear" and "layers.1.mlp.up_proj" in str(node.name):
                zeros = ir.tensor(node.inputs[1].const_value.numpy().astype("int8") + 1, dtype=ir.DataType.INT4)
                zero = ir.Value(name="zero", const_value=zeros, type=ir.TensorType(ir.DataType.INT4), shape=zeros.shape)
                zeros.name = "zero"
                graph.graph.register_initializer(zero)
                node.resize_inputs(3)
                node.replace_input_with(2, zero)

    with pytest.raises(
        UnsupportedError, match=r"does not take the node model\.layers\.1\.mlp\.up_proj\.weight_dequant"
    ):
        edited(build[0], change)


def test_a_product_that_lost_its_integers_is_found(build):
    def change(graph):
        (node,) = (node for node in graph.graph if node.outputs[0].name == "model.layers.0.mlp.up_proj.output")
        halves = ir.tensor(node.inputs[1].producer().inputs[0].const_value.numpy().astype("float16"), name="halves")
        value = ir.Value(name="halves", const_value=halves, type=ir.TensorType(ir.DataType.FLOAT16), shape=halves.shape)
        graph.graph.register_initializer(value)
        node.replace_input_with(1, value)

    compiler, _ = edited(build[0], change)
    meant = ir.load(build[0] / "tensorrt/model.onnx")
    with pytest.raises(VerificationError, match=r"multiplies model\.layers\.0\.mlp\.up_proj\.output with floats"):
        check_network(compiler.network, meant)


def test_a_cache_that_is_copied_is_found(build):
    def change(graph):
        output = next(value for value in graph.graph.outputs if value.name == "present.1.key")
        copy = ir.node("Identity", [output])
        graph.graph.insert_after(output.producer(), copy)
        copy.outputs[0].name, output.name = output.name, "inside"
        copy.outputs[0].type, copy.outputs[0].shape = output.type, output.shape
        graph.graph.outputs[:] = [copy.outputs[0] if each is output else each for each in graph.graph.outputs]

    compiler, graph = edited(build[0], change)
    with pytest.raises(VerificationError, match=r"copies the cache present\.1\.key"):
        check_network(compiler.network, graph)


def test_nodes_are_named_after_what_they_contribute_to(build):
    graph = ir.load(build[0] / "tensorrt/model.onnx")
    names = [str(node.name) for node in graph.graph]
    assert len(set(names)) == len(names)
    anonymous = [name for name in names if name.startswith(("val_", "node_", "/"))]
    assert anonymous == []
    before = list(names)
    name_nodes(graph)
    assert [str(node.name) for node in graph.graph] == before


def test_what_the_compiler_has_no_kernel_for_is_said(llama_of, tmp_path, monkeypatch):
    monkeypatch.setattr("llmopt.passes.graph.expand_attention._HEAD_MULTIPLE", 1)
    model = load_model(str(llama_of(head_dim=20)), cache=tmp_path / "cache")
    with pytest.raises(UnsupportedError, match=r"cannot compile the graph for sm89: .*Attention"):
        TensorRT(targets=["sm89"], capacity=32).export(model, tmp_path, PassContext(verify="none"))
