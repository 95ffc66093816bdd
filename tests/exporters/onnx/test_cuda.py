"""The engine for CUDA, executed by the CPU: what can be known of it without a GPU."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from llmopt.exporters.onnx.exporter import Onnx
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.sources import load_model
from llmopt.passes.dequantize import Dequantize
from llmopt.passes.round_to_nearest import RoundToNearest
from llmopt.runtime.backends.onnxruntime import open_backend
from llmopt.runtime.backends.session import _OF_LENGTHS

CAPACITY = 48
FAMILIES = ["llama", "llama-odd", "qwen3", "gemma3", "phi3-longrope", "gpt2", "falcon", "opt-350m"]

TOLERANCE = 0.01
"""Largest difference of logits, of their largest: some twenty roundings to 11 bits a layer. Measured: 0.1 to 0.6 %."""

OF_CUDA = {
    "": {
        "Add", "Cast", "Constant", "Div", "Gather", "Gelu", "LayerNormalization", "MatMul", "Mul", "Relu", "Reshape",
        "RotaryEmbedding", "Sigmoid", "SimplifiedLayerNormalization", "Split", "Tanh", "Transpose", "Unsqueeze",
    },
    "com.microsoft": {
        "FusedMatMul", "GatherBlockQuantized", "GroupQueryAttention", "MatMulNBits", "QuickGelu", "RotaryEmbedding",
        "SkipSimplifiedLayerNormalization",
    },
}  # fmt: skip
"""Operators with a kernel for float16, or for the integers they are used with, in ONNX Runtime's OperatorKernels.md."""


@pytest.fixture(scope="module")
def exported(family_of, tmp_path_factory):
    """``exported(family, scheme, target)``: a backend on the CPU, the engine's description, the graph."""
    made = {}

    def make(family, scheme=None, target="cuda"):
        if (family, scheme, target) not in made:
            directory = tmp_path_factory.mktemp("build")
            model = load_model(str(family_of(family)), cache=directory / "cache")
            if scheme:
                model = RoundToNearest(scheme=scheme, group_size=32 if "W4" in scheme else None).run(
                    model, PassContext()
                )
            if target == "cpu":
                model = Dequantize().run(model, PassContext())
            exporter = Onnx(target=target, capacity=CAPACITY, kernels=None if target == "cuda" else "onnxruntime")
            exporter.check(model)
            engine, records = exporter.export(model, directory, PassContext(verify="quick"))
            backend = open_backend(directory, engine, slots=2, capacity=CAPACITY, threads=1)
            made[family, scheme, target] = backend, engine, ir.load(directory / engine.path), records
        return made[family, scheme, target]

    return make


CASES = [(family, None) for family in FAMILIES] + [("llama", s) for s in ("W8A16", "W4A16", "W4A16_ASYM")]


def logits(backend, ids):
    prompt = backend.prefill(0, ids[:20], 0, np.arange(20))
    return np.concatenate([prompt, backend.decode(ids[20:21], np.array([20]))])


@pytest.mark.parametrize(("family", "scheme"), CASES)
def test_it_computes_what_the_engine_for_the_cpu_does(exported, family, scheme):
    backend, engine, _, _ = exported(family, scheme)
    ids = np.random.default_rng(1).integers(3, engine.vocab_size, 21)
    expected = logits(exported(family, scheme, "cpu")[0], ids)
    found = logits(backend, ids)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize(("family", "scheme"), CASES)
def test_every_operator_has_a_kernel_for_cuda_or_computes_lengths(exported, family, scheme):
    """By ONNX Runtime's own list; a graph of a newer opset would have none for some."""
    graph = exported(family, scheme)[2]
    assert graph.graph.opset_imports[""] == 23
    found = Counter((node.domain, node.op_type) for node in graph.graph)
    unknown = [f"{domain}::{name}" for domain, name in found if name not in OF_CUDA.get(domain, set()) | _OF_LENGTHS]
    assert unknown == []


def test_the_manifest_describes_it(exported):
    _, engine, graph, records = exported("llama", "W4A16")
    assert (engine.target, engine.path, engine.kv_dtype) == ("cuda", "cuda/model.onnx", "float16")
    assert (engine.batch_invariant, engine.features) == (False, [])
    kinds = {value.name: value.dtype for value in [*graph.graph.inputs, *graph.graph.outputs]}
    assert kinds["past.0.key"] == kinds["present.0.value"] == ir.DataType.FLOAT16
    assert (kinds["logits"], kinds["input_ids"]) == (ir.DataType.FLOAT, ir.DataType.INT64)
    assert {"lower_norm", "use_half_precision", "lower_opset", "verify_lowering"} <= {record.name for record in records}


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        ("mixtral", {}, "no kernels for a mixture of experts"),
        ("llama", {"flavor": "genai"}, "flavor: genai is for target: cpu"),
        ("llama", {"kernels": "llmopt"}, "kernels: llmopt is for target: cpu"),
    ],
)
def test_what_it_has_no_place_for_is_refused(family_of, tmp_path, family, options, why):
    with pytest.raises(UnsupportedError, match=why):
        Onnx(target="cuda", **options).check(load_model(str(family_of(family)), cache=tmp_path))


def test_an_encoder_is_refused(encoder_of, tmp_path):
    with pytest.raises(UnsupportedError, match="target: cuda is for decoders"):
        Onnx(target="cuda").check(load_model(str(encoder_of("bert")), cache=tmp_path))


def test_an_int8_cache_has_no_place_in_it():
    assert Onnx(target="cuda").holds == {"an online rotation"}
    assert "an int8 cache" in Onnx().holds


def test_a_build_may_have_one_for_each_target():
    assert {Onnx().folder, Onnx(target="cuda").folder, Onnx(flavor="genai").folder} == {"engine", "cuda", "genai"}
