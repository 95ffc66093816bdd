"""What the exporter writes, describes, refuses and repeats."""

import hashlib
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from llmopt.exporters.onnx.exporter import Onnx
from llmopt.optimizer import kernels
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import UnsupportedError, VerificationError
from llmopt.optimizer.target import TARGETS
from llmopt.passes.graph import fuse_activation
from llmopt.runtime.backends.onnxruntime import open_backend

OURS = TARGETS["cpu"].with_kernels()
SCHEMES = [(None, {}), ("W8A8", {}), ("W8A16", {"group_size": 32}), ("W4A16_ASYM", {"group_size": 32})]


def exported(model, directory, context=None, **options):
    directory.mkdir(exist_ok=True)
    return Onnx(**options).export(model, directory, context or PassContext(verify="none"))


def digests(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (directory / "engine").iterdir()}


def data_bytes(directory):
    return (directory / "engine/model.onnx.data").stat().st_size


@pytest.mark.parametrize(("scheme", "options"), SCHEMES)
def test_the_engine_runs_from_its_files(model_of, tmp_path, ids, reference_logits, row_error, scheme, options):
    model = model_of(scheme, options)
    engine, _ = exported(model, tmp_path)
    assert sorted(digests(tmp_path)) == ["model.onnx", "model.onnx.data"]
    onnx.checker.check_model(str(tmp_path / engine.path))
    backend = open_backend(tmp_path, engine, slots=2, capacity=16, threads=1)
    logits = backend.prefill(1, ids[0], 0, np.arange(12))
    assert np.median(row_error(logits, reference_logits(model, ids[:1])[0])) < (0.05 if "A16" in str(scheme) else 1e-4)


def test_the_engine_is_described_for_the_runtime(model_of, tmp_path):
    engine, _ = exported(model_of(), tmp_path, capacity=100)
    assert (engine.exporter, engine.target, engine.path) == ("onnx", "cpu", "engine/model.onnx")
    assert (engine.num_layers, engine.kv_heads, engine.head_dim, engine.kv_dtype) == (2, 2, 16, "float32")
    assert (engine.vocab_size, engine.capacity, engine.max_chunk, engine.min_chunk) == (512, 100, 100, 2)
    options = ort.SessionOptions()
    kernels.register(options)
    session = ort.InferenceSession(tmp_path / engine.path, options, providers=["CPUExecutionProvider"])
    kinds = {"float32": "tensor(float)", "int64": "tensor(int64)"}
    for described, found in ((engine.inputs, session.get_inputs()), (engine.outputs, session.get_outputs())):
        assert [(t.name, kinds[t.dtype], t.dims) for t in described] == [(v.name, v.type, v.shape) for v in found]


def test_the_capacity_is_the_models_unless_named(model_of, tmp_path):
    engine, _ = exported(model_of(max_position_embeddings=64), tmp_path)
    assert (engine.capacity, engine.max_chunk) == (64, 64)
    engine, _ = exported(model_of(max_position_embeddings=2048), tmp_path / "long")
    assert (engine.capacity, engine.max_chunk) == (2048, 512)


def test_the_last_position_of_the_capacity_can_be_written(model_of, tmp_path, ids, reference_logits):
    model = model_of()
    engine, _ = exported(model, tmp_path, capacity=12)
    backend = open_backend(tmp_path, engine, slots=1, capacity=12, threads=1)
    backend.prefill(0, ids[0, :11], 0, np.array([], np.int64))
    found = backend.decode(ids[0, 11:], np.array([11]))
    np.testing.assert_allclose(found, reference_logits(model, ids[:1])[:, -1], atol=1e-4)


@pytest.mark.parametrize(("scheme", "options"), SCHEMES)
def test_two_exports_are_the_same_bytes(model_of, tmp_path, scheme, options):
    model = model_of(scheme, options)
    first, second = (exported(model, tmp_path / name) for name in ("first", "second"))
    assert first == second
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("scheme", "options"), [*SCHEMES, ("W8A16", {})])
def test_the_estimate_is_nearly_the_size_of_the_data(model_of, tmp_path, scheme, options, tied):
    changes = {"hidden_size": 128, "head_dim": 32, "vocab_size": 2048, "tie_word_embeddings": tied}
    model = model_of(scheme, options, **changes)
    exported(model, tmp_path, capacity=32)
    # Tensors start at multiples of 4096 bytes; scales of a channel are repeated for each block of 64 columns.
    padding = 4096 * len(model.weights) * 3
    estimate = Onnx().estimate(model)
    assert estimate * 0.95 < data_bytes(tmp_path) < estimate * 1.1 + padding


@pytest.mark.parametrize(
    ("scheme", "options"), [*SCHEMES, ("W8A16", {}), ("W4A16", {"group_size": 32, "head": "W8A8"})]
)
def test_a_tied_table_is_stored_once(model_of, tmp_path, scheme, options):
    sizes = {"hidden_size": 64, "vocab_size": 8192, "num_hidden_layers": 1}
    model = model_of(scheme, options, **sizes)
    exported(model, tmp_path, capacity=32)
    table = Onnx().estimate(model)  # nearly all of it is the table
    assert data_bytes(tmp_path) < 1.3 * table
    largest = sorted(t.const_value.nbytes for t in initializers(tmp_path))[-2:]
    assert largest[0] < largest[1] / 2


def initializers(directory):
    import onnx_ir as ir

    return ir.load(directory / "engine/model.onnx").graph.initializers.values()


def test_records_are_the_graph_passes_and_the_verification(model_of, tmp_path):
    _, records = exported(model_of("W8A8"), tmp_path, PassContext(verify="quick"))
    assert [record.name for record in records] == [*OURS.graph_passes, "verify_lowering"]
    verification = records[-1]
    assert verification.options == {"level": "quick"}
    assert not verification.changed
    assert list(verification.details) == ["layers.0", "layers.1"]


def test_a_broken_lowering_writes_nothing(model_of, tmp_path, monkeypatch):
    monkeypatch.setattr(fuse_activation._SiluRule, "rewrite", lambda self, op, x: op.Mul(x, x))
    with pytest.raises(VerificationError, match="layer 0"):
        exported(model_of(), tmp_path, PassContext(verify="quick"))
    assert list(tmp_path.iterdir()) == []


def test_progress_reaches_its_total(model_of, tmp_path):
    steps = []
    exported(model_of(), tmp_path, PassContext(verify="none", progress=lambda *step: steps.append(step)))
    done, total = steps[-1]
    assert done == total
    assert [step[0] for step in steps] == list(range(1, total + 1))


def refusal(model, **options):
    with pytest.raises(UnsupportedError) as caught:
        Onnx(**options).check(model)
    assert caught.value.exit_code == 5
    return caught.value


def test_models_of_the_family_pass_the_check(model_of):
    for kind in ({}, {"tie_word_embeddings": False}, {"attention_bias": True, "mlp_bias": True}):
        Onnx().check(model_of(**kind))
    Onnx(capacity=256).check(model_of())


def test_a_rope_that_depends_on_the_length_is_fixed_and_the_build_says_so(model_of, tmp_path):
    parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model, notes = model_of(rope_parameters=parameters), []
    exported(model, tmp_path, PassContext(verify="none", note=notes.append), capacity=512)
    assert any("dynamic rope is fixed at the frequencies for 512 tokens" in note for note in notes)
    assert refusal(model, capacity=513).message == "capacity 513 is beyond the model's 512 positions"


def test_an_unknown_rope_is_refused(model_of):
    model = model_of()
    unknown = {"rope_type": "spiral", "rope_theta": 10000.0}
    error = refusal(replace(model, config={**model.config, "rope_parameters": unknown}))
    assert error.message == "rope type 'spiral' is not supported"


def test_a_capacity_beyond_the_models_positions_is_refused(model_of):
    assert "257 is beyond the model's 256 positions" in refusal(model_of(), capacity=257).message


@pytest.mark.parametrize("options", [{"capacity": 0}, {"capacity": -1}, {"target": "tpu"}, {"threads": 1}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Onnx(**options)


def test_the_target_is_what_executes_it():
    assert Onnx().executors() == Onnx(kernels="llmopt").executors() == [OURS]
    assert Onnx(kernels="onnxruntime").executors() == Onnx(flavor="genai").executors() == [TARGETS["cpu"]]


def test_every_onnx_runtime_loads_an_engine_with_its_own_kernels(model_of, tmp_path, ids, reference_logits):
    model = model_of()
    engine, _ = exported(model, tmp_path, kernels="onnxruntime")
    assert kernels.FEATURE not in engine.features
    assert ort.InferenceSession(tmp_path / engine.path, providers=["CPUExecutionProvider"]).get_inputs()
    found = open_backend(tmp_path, engine, slots=1, capacity=16, threads=1).prefill(0, ids[0], 0, np.array([11]))
    np.testing.assert_allclose(found, reference_logits(model, ids[:1])[:, -1], atol=1e-4)


def test_without_a_compiler_engines_get_onnx_runtimes_kernels_and_say_so(model_of, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: None)
    notes = []
    engine, _ = exported(model_of(), tmp_path, PassContext(verify="quick", note=notes.append))
    assert kernels.FEATURE not in engine.features
    assert notes == ["kernels: onnxruntime, because llmopt was installed without a C++ compiler"]
    assert "installed without a C++ compiler" in refusal(model_of(), kernels="llmopt").message


def test_an_engine_of_our_kernels_is_refused_where_they_are_missing(model_of, tmp_path, monkeypatch):
    engine, _ = exported(model_of(), tmp_path)
    monkeypatch.setattr(kernels, "library", lambda: None)
    with pytest.raises(UnsupportedError, match="this llmopt was installed without them"):
        open_backend(tmp_path, engine, slots=1, capacity=16, threads=1)


def test_genai_cannot_have_our_kernels(model_of):
    assert "kernels: llmopt cannot be loaded by genai" in refusal(model_of(), kernels="llmopt", flavor="genai").message


@pytest.mark.parametrize(
    ("scheme", "host", "features"), [("W8A8", "vnni", ["vnni"]), ("W8A8", "avx2", []), (None, "vnni", [])]
)
def test_an_engine_of_integers_says_what_its_kernels_were_chosen_for(
    model_of, tmp_path, monkeypatch, scheme, host, features
):
    for module in (
        "llmopt.exporters.onnx.engine_files",
        "llmopt.passes.graph.lower_linear",
        "llmopt.passes.graph._nbits",
    ):
        monkeypatch.setattr(f"{module}.host_instructions", lambda: host)
    engine, _ = exported(model_of(scheme), tmp_path)
    assert engine.features == [kernels.FEATURE, *features]
