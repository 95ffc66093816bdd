"""Small graphs, and a pass applied to one with its outputs before and after, computed without other optimizations."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes import common

from llmopt.exporters.onnx.builder import GraphBuilder
from llmopt.exporters.onnx.composites import (
    experts,
    quantize_dequantize_per_token,
    select_rows,
    sliding_window_mask,
    slot_attention,
)
from llmopt.exporters.onnx.standard import IR_VERSION, standard_graph
from llmopt.optimizer import kernels, loader
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.decoder import Decoder
from llmopt.optimizer.model import Model
from llmopt.optimizer.sources import load_model
from llmopt.passes.round_to_nearest import RoundToNearest

Feeds = Mapping[str, np.ndarray]
Outputs = list[np.ndarray]

DTYPES = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64}


@dataclass(frozen=True)
class Rewritten:
    """What a pass did to a graph.

    Attributes:
        graph: After it.
        applied: Recorded count.
        declined: Recorded reasons.
        notes: What it told the manifest.
        fallbacks: Which fallbacks it told.
        unchanged: Whether the main graph is the same, byte for byte.
        before, after: Outputs of every call.
    """

    graph: ir.Model
    applied: int
    declined: list[str]
    notes: list[str]
    fallbacks: list[str]
    unchanged: bool
    before: list[Outputs]
    after: list[Outputs]

    @property
    def ops(self) -> Counter[str]:
        """How often each operator occurs in the main graph."""
        return Counter(node.op_type for node in self.graph.graph)

    def difference(self) -> float:
        """The largest difference of any output, in units of the largest value of that output."""
        worst = 0.0
        for before, after in zip(self.before, self.after, strict=True):
            for expected, found in zip(before, after, strict=True):
                assert expected.shape == found.shape
                assert np.isfinite(found).all()
                worst = max(worst, float(np.abs(expected - found).max() / max(np.abs(expected).max(), 1e-30)))
        return worst

    def is_identical(self) -> bool:
        """Whether every output has the same bits as before."""
        pairs = zip(self.before, self.after, strict=True)
        return all(np.array_equal(a, b) for before, after in pairs for a, b in zip(before, after, strict=True))


def session_of(graph: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    kernels.register(options)
    data = ir.to_proto(graph).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def held(name: str, array: np.ndarray, feeds: Feeds) -> np.ndarray:
    """Of a cache the positions that hold tokens: what lies behind them is nobody's."""
    if not name.startswith("present."):
        return array
    tokens = feeds["input_ids"].shape[1]
    return np.concatenate([row[:, : n + tokens].ravel() for row, n in zip(array, feeds["past_lengths"], strict=True)])


def execute(graph: ir.Model, calls: Sequence[Feeds]) -> list[Outputs]:
    session = session_of(graph)
    names = [value.name for value in session.get_outputs()]
    return [
        [held(name, array, feeds) for name, array in zip(names, session.run(names, dict(feeds)), strict=True)]
        for feeds in calls
    ]


def apply(name: str, graph: ir.Model, *calls: Feeds, **chosen: Any) -> Rewritten:
    common.ShapeInferencePass()(graph)
    data = ir.to_proto(graph).graph.SerializeToString(deterministic=True)
    before = execute(graph, calls)
    details: dict[str, Any] = {}
    notes: list[str] = []
    fallbacks: list[str] = []
    options = loader.load("passes.graph", name)(**chosen)
    context = PassContext(detail=details.__setitem__, note=notes.append, fallback=fallbacks.append)
    result = options.run(graph, context)
    assert result is graph
    unchanged = ir.to_proto(graph).graph.SerializeToString(deterministic=True) == data
    told = (details["applied"], details["declined"], notes, fallbacks)
    return Rewritten(graph, *told, unchanged, before, execute(graph, calls))


def written(write: Callable[..., Any], **inputs: tuple[str, Sequence[int | str]]) -> ir.Model:
    builder = GraphBuilder()
    values = {
        name: ir.Value(name=name, type=ir.TensorType(DTYPES[dtype]), shape=ir.Shape(dims))
        for name, (dtype, dims) in inputs.items()
    }
    result = write(builder, *values.values())
    outputs = list(result) if isinstance(result, list | tuple) else [result]
    for value in outputs:
        value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        list(values.values()),
        outputs,
        nodes=builder.nodes,
        initializers=builder.initializers,
        opset_imports={"": 24, "llmopt": 1, "com.microsoft": 1},
        name="small",
    )
    functions = [
        slot_attention(),
        sliding_window_mask(),
        experts("silu"),
        select_rows(),
        quantize_dequantize_per_token(),
    ]
    return ir.Model(graph, ir_version=IR_VERSION, functions=functions)


def calls_of(decoder: Decoder, capacity: int, *, int8: bool = False) -> list[Feeds]:
    generator = np.random.default_rng(3)
    layers, heads, width = len(decoder.layers), decoder.kv_heads, decoder.head_dim

    def call(tokens: int, lengths: list[int], rows: list[int]) -> Feeds:
        feeds = {
            "input_ids": generator.integers(0, decoder.vocab_size, (len(lengths), tokens)),
            "past_lengths": np.array(lengths),
            "logit_rows": np.array(rows),
        }
        for i in range(layers):
            for kind in ("key", "value"):
                shape = (len(lengths), heads, capacity, width)
                cache = generator.standard_normal(shape, np.float32)
                feeds[f"past.{i}.{kind}"] = (cache * 40).astype(np.int8) if int8 else cache
        return feeds

    return [call(5, [3], [4, 0, 4]), call(4, [0, 0], [7, 3]), call(1, [6, 2], [0, 1])]


@pytest.fixture(scope="session")
def rewrite() -> Callable[..., Rewritten]:
    """``rewrite(name, graph, *calls, **options)``: apply a graph pass and run the graph before and after it."""
    return apply


@pytest.fixture(scope="session")
def graph_of() -> Callable[..., ir.Model]:
    """``graph_of(write, x=("float32", dims), ...)``: ``write(builder, *inputs)`` returns the outputs."""
    return written


@pytest.fixture(scope="session")
def model_of(llama_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """A tiny Llama, quantized when ``scheme`` is given with ``options``; keywords change its config."""
    cache = tmp_path_factory.mktemp("cache")
    loaded: dict[str, Model] = {}

    def make(scheme: str | None = None, options: Mapping[str, Any] | None = None, **changes: Any) -> Model:
        key = repr(sorted(changes.items()))
        if key not in loaded:
            loaded[key] = load_model(str(llama_of(**changes)), cache=cache)
        model = loaded[key]
        if scheme is None:
            return model
        return RoundToNearest(scheme=scheme, **(options or {})).run(model, PassContext())

    return make


@pytest.fixture(scope="session")
def family_model(family_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """``family_model(name, scheme=None, options={})``: a family's tiny random model, quantized with a scheme."""
    directory = tmp_path_factory.mktemp("cache")

    def make(name: str, scheme: str | None = None, options: Mapping[str, Any] | None = None) -> Model:
        model = load_model(str(family_of(name)), cache=directory)
        if scheme is None:
            return model
        return RoundToNearest(scheme=scheme, **(options or {})).run(model, PassContext())

    return make


@pytest.fixture(scope="session")
def rewrite_model() -> Callable[..., Rewritten]:
    """``rewrite_model(name, model, after=())``: apply a graph pass to a model's standard graph.

    The passes in ``after`` run before it. The calls are a chunk behind a past, a batch without one, and a ragged
    decode step, as the engine contract allows.
    """

    def make(name: str, model: Model, *, after: Sequence[str] = (), capacity: int = 16) -> Rewritten:
        graph = standard_graph(model, capacity=capacity)
        common.ShapeInferencePass()(graph)
        for earlier in after:
            loader.load("passes.graph", earlier)().run(graph, PassContext())
        int8 = model.cache_scales(0) is not None
        return apply(name, graph, *calls_of(model.decoder, capacity, int8=int8))

    return make


@pytest.fixture
def numbers() -> Callable[..., np.ndarray]:
    """``numbers(*shape)``: standard normal float32, the same in every run of a test."""
    generator = np.random.default_rng(0)
    return lambda *shape: generator.standard_normal(shape, np.float32)
