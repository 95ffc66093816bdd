"""Runs the lowered graph against the standard graph, one decoder layer at a time.

Whole quantized models cannot be compared closely: one activation that rounds the other way in the first layer
changes every later one, and after 30 layers two exact executions of one W8A8 model differ by a tenth of the logits'
spread. A single layer with embedding and head shows every mistake of a lowering, and needs the memory of one layer.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from llmopt.exporters.onnx.lowering import lowered_graph
from llmopt.exporters.onnx.standard import standard_graph
from llmopt.optimizer.decoder import Decoder
from llmopt.optimizer.errors import MissingExtraError, VerificationError
from llmopt.optimizer.model import DenseWeight, Model, QuantWeight, Weight
from llmopt.optimizer.target import Target

__all__ = ["Level", "verify_lowering"]

Level = Literal["none", "quick", "full"]

_CAPACITY = 32
_VOCABULARY = 1024
_LIMIT = 1e-4
"""Accepted median over a call's rows of ``rms(difference) / std(logits)``. Float kernels only order their sums
differently. W8A8 is exact but for activations that lie on the border of two integers: they reach few rows, and the
median none."""


def verify_lowering(model: Model, target: Target, *, level: Level, seed: int) -> dict[str, float]:
    """Compare both graphs on single layers of ``model``.

    Args:
        model: The model as it will be exported.
        target: Whose lowering is verified.
        level: quick: the first, a middle and the last layer; full: every layer; none: nothing.
        seed: Of the token ids fed to both.

    Returns:
        ``layers.{i}`` -> the relative difference of logits: a median over rows, and of the calls the largest.

    Raises:
        VerificationError: Naming the layer and the difference.
        MissingExtraError: onnxruntime is not installed.
    """
    if level == "none":
        return {}
    count = model.num_layers
    model = _small_vocabulary(model)
    chosen = range(count) if level == "full" else sorted({0, count // 2, count - 1})
    differences = {}
    for i in chosen:
        single = replace(model.decoder, layers=(model.decoder.layers[i],))
        lowered, _ = lowered_graph(model, target, capacity=_CAPACITY, decoder=single)
        _without_rounding(lowered)
        standard = standard_graph(model, capacity=_CAPACITY, decoder=single)
        difference = _difference(standard, lowered, _Calls(single, seed))
        if not difference <= _LIMIT:
            raise VerificationError(
                f"layer {i}: the lowered graph's logits differ from the standard graph's by {difference:.2g} "
                f"of their spread, {_LIMIT:g} is accepted",
                hint="this is a bug in a graph pass; verify: none builds all the same",
            )
        differences[f"layers.{i}"] = float(f"{difference:.3g}")
    return differences


def _small_vocabulary(model: Model) -> Model:
    """The model with the first rows of its tables: a lowering treats all rows alike, and they are most of the bytes."""
    size = min(_VOCABULARY, model.config["vocab_size"])
    names = {f"{model.arch.embedding}.weight", model.weight_of(model.arch.head)}
    first = {name: _first_rows(model.weights[name], size) for name in names}
    return replace(model.with_weights(first), config={**model.config, "vocab_size": size})


def _first_rows(weight: Weight, count: int) -> Weight:
    if isinstance(weight, DenseWeight):
        return DenseWeight.of(weight.rows(0, count).clone())
    return QuantWeight.of(*weight.load().rows(slice(count)), weight.scheme)


def _without_rounding(graph: ir.Model) -> None:
    """Let MatMulNBits compute in float32: in the engine it rounds activations, the standard graph does not."""
    for node in graph.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)


@dataclass(frozen=True, slots=True)
class _Calls:
    """A prompt in two chunks for one sequence, then one token for each of several, within the contract."""

    decoder: Decoder
    seed: int

    def run(self, session: Any) -> list[np.ndarray]:
        """Logits of each call, float32 ``[rows, vocabulary]``; of the second chunk some rows, in another order."""
        generator = np.random.default_rng(self.seed)
        shape = (1, self.decoder.kv_heads, _CAPACITY, self.decoder.head_dim)
        key, value = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        logits = []
        lengths = np.zeros(1, np.int64)
        for batch, tokens, step in ((1, 11, 1), (1, 8, -2), (5, 1, 1)):
            if batch > len(lengths):
                lengths, key, value = (np.repeat(array, batch, axis=0) for array in (lengths, key, value))
            feeds = {
                "input_ids": generator.integers(0, self.decoder.vocab_size, (batch, tokens)),
                "past_lengths": lengths,
                "logit_rows": np.arange(batch * tokens)[::step].copy(),
                "past.0.key": key,
                "past.0.value": value,
            }
            rows, key, value = session.run(["logits", "present.0.key", "present.0.value"], feeds)
            logits.append(rows)
            lengths = lengths + tokens
        return logits


def _difference(standard: ir.Model, lowered: ir.Model, calls: _Calls) -> float:
    """The largest over the calls of the median over their rows."""
    pairs = zip(*(calls.run(_session(graph)) for graph in (standard, lowered)), strict=True)
    return max(_median(expected, found) for expected, found in pairs)


def _median(expected: np.ndarray, found: np.ndarray) -> float:
    rms = np.sqrt(np.mean((expected - found) ** 2, axis=-1, dtype=np.float64))
    return float(np.median(rms / expected.std(axis=-1)))


def _session(graph: ir.Model) -> Any:
    """The graph in ONNX Runtime without its own optimizations, which would rewrite both sides."""
    try:
        import onnxruntime as ort
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnxruntime", "cpu") from error
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(graph, path, external_data="model.onnx.data")
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
