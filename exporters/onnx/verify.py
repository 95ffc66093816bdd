"""Runs the graph before and after every graph pass, one decoder layer at a time.

Whole quantized models cannot be compared closely: one activation that rounds the other way in the first layer
changes every later one, and after 30 layers two exact executions of one W8A8 model differ by a tenth of the logits'
spread. A single layer with embedding and head shows every mistake of a graph pass, and needs the memory of one layer.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from llmopt.exporters.onnx.calls import CALLS, CAPACITY, run_calls
from llmopt.exporters.onnx.divergence import first_divergence, relative_errors
from llmopt.exporters.onnx.lowering import Stage, stages
from llmopt.exporters.onnx.sessions import Sessions
from llmopt.optimizer.decoder import Decoder, Layer
from llmopt.optimizer.errors import MissingExtraError, VerificationError, is_out_of_memory
from llmopt.optimizer.model import DenseWeight, Model, QuantWeight, Weight
from llmopt.optimizer.target import Target

__all__ = ["LIMIT", "ROUNDED_LIMIT", "Level", "verify_lowering"]

Level = Literal["none", "quick", "full"]

_VOCABULARY = 1024
_WINDOW = 6
"""Tokens of a sliding window while it is verified: the calls have more, so that it is seen to slide."""

LIMIT = 1e-4
"""Accepted ``rms(difference) / std(logits)`` of a row: float kernels only order their sums differently."""

ROUNDED_LIMIT = 0.1
"""The same of a single row where activations are rounded. An activation on the border of two integers may round either
way, one row in a thousand has one, and moves by up to 0.02; the median of a call's rows stays below ``LIMIT``."""


def verify_lowering(model: Model, target: Target, *, level: Level, seed: int) -> dict[str, dict[str, float]]:
    """Compare the graphs before and after each graph pass, and the first with the last, on single layers.

    Args:
        model: The model as it will be exported.
        target: Whose graph passes are verified.
        level: quick: the first, a middle and the last layer, and one of every other kind; full: every layer; none:
            nothing.
        seed: Of the token ids that are fed.

    Returns:
        ``layers.{i}`` -> graph pass -> the relative difference of logits (a median over rows, and of the calls the
        largest), for each pass that changed something; ``all`` is the lowered graph against the standard one.

    Raises:
        VerificationError: Naming the graph pass, the layer, the node, the input and the difference.
        MissingExtraError: onnxruntime is not installed.
    """
    if level == "none":
        return {}
    model = _small_vocabulary(model)
    chosen = range(model.num_layers) if level == "full" else _quick(model)
    found = {}
    for i in chosen:
        with tempfile.TemporaryDirectory() as folder:
            found[f"layers.{i}"] = _Layer(model, i, seed, Sessions(Path(folder))).verify(target)
    return found


def _quick(model: Model) -> list[int]:
    """The first, a middle and the last layer, and the first of each kind that is computed in another way."""
    layers = model.decoder.layers
    chosen = {0, len(layers) // 2, len(layers) - 1}
    kinds = [_kind(model, layer) for layer in layers]
    covered = {kinds[i] for i in chosen}
    return sorted(chosen | {kinds.index(kind) for kind in set(kinds) - covered})


def _kind(model: Model, layer: Layer) -> tuple[object, ...]:
    """What decides how a layer is lowered: its description without its number, its biases, its schemes."""
    description = repr(replace(layer, name="")).replace(f"{layer.name}.", "")
    biases = tuple(f"{name}.bias" in model.weights for name in layer.linears)
    weights = [model.weights[f"{name}.weight"] for name in layer.linears]
    schemes = frozenset(weight.scheme.name if isinstance(weight, QuantWeight) else None for weight in weights)
    return (description, biases, schemes)


@dataclass(frozen=True, slots=True)
class _Result:
    """A stage's graph, serialized, and its logits in each call, float32 ``[rows, vocabulary]``."""

    graph: bytes
    logits: list[np.ndarray]


@dataclass(slots=True)
class _Layer:
    """One layer of a model through all stages."""

    model: Model
    i: int
    seed: int
    sessions: Sessions
    decoder: Decoder = field(init=False)

    def __post_init__(self) -> None:
        self.decoder = _single(self.model.decoder, self.i)

    def verify(self, target: Target) -> dict[str, float]:
        """The differences of ``verify_lowering``."""
        differences: dict[str, float] = {}
        results: list[_Result] = []
        for stage in self._stages(target):
            graph = self.sessions.serialized(stage.graph)
            if results and graph == results[-1].graph:
                continue
            results.append(_Result(graph, self._logits(stage.name, graph)))
            if stage.record is not None:
                differences[stage.name] = self._difference(stage.name, *results[-2:])
        differences["all"] = self._difference("the lowering as a whole", results[0], results[-1])
        return {name: float(f"{difference:.3g}") for name, difference in differences.items()}

    def _stages(self, target: Target) -> Iterator[Stage]:
        """With MatMulNBits in float32: in the engine it rounds activations, in the standard graph nothing does."""
        for stage in stages(self.model, target, capacity=CAPACITY, decoder=self.decoder):
            for node in stage.graph.graph:
                if node.op_type == "MatMulNBits":
                    node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
            yield stage

    def _logits(self, name: str, graph: bytes) -> list[np.ndarray]:
        try:
            session = self.sessions.open(graph)
            return [outputs["logits"] for outputs in run_calls(session, self.decoder, self.seed)]
        except MissingExtraError:
            raise
        except Exception as error:  # ONNX Runtime's have no common base
            if is_out_of_memory(error):
                raise
            where = "the standard graph" if name == "standard" else f"the graph behind {name}"
            raise VerificationError(
                f"layer {self.i}: ONNX Runtime does not run {where}: {error}", hint=_hint(name)
            ) from error

    def _difference(self, name: str, before: _Result, after: _Result) -> float:
        """The largest of the calls' medians.

        Raises:
            VerificationError: It is beyond the limit, or not a number.
        """
        largest = 0.0
        for number, pair in enumerate(zip(before.logits, after.logits, strict=True)):
            errors = relative_errors(*pair)
            median, worst = float(np.median(errors)), float(errors.max())
            if not (median <= LIMIT and worst <= self._row_limit()):
                raise self._error(name, before, after, number, median if not median <= LIMIT else worst)
            largest = max(largest, median)
        return largest

    def _row_limit(self) -> float:
        weights = (self.model.weights[self.model.weight_of(name)] for name in self.decoder.linears)
        schemes = [weight.scheme for weight in weights if isinstance(weight, QuantWeight)]
        return ROUNDED_LIMIT if any(scheme.input_activations is not None for scheme in schemes) else LIMIT

    def _error(self, name: str, before: _Result, after: _Result, call: int, difference: float) -> VerificationError:
        graphs = (before.graph, after.graph)
        node = first_divergence(self.sessions, graphs, self.decoder, call=call, seed=self.seed, limit=LIMIT)
        return VerificationError(
            f"layer {self.i}: {name} changes the result: logits differ by {difference:.2g} of their spread, "
            f"{LIMIT:g} is accepted; first at {node}, for {CALLS[call]} (seed {self.seed})",
            hint=_hint(name),
        )


def _hint(name: str) -> str:
    blamed = "llmopt's exporter" if name == "standard" else "that graph pass"
    return f"this is a bug in {blamed}; verify: none builds all the same"


def _single(decoder: Decoder, i: int) -> Decoder:
    """The model with layer ``i`` alone, its window so short that it slides."""
    layer = decoder.layers[i]
    window = layer.attention.window
    attention = replace(layer.attention, window=None if window is None else min(window, _WINDOW))
    return replace(decoder, layers=(replace(layer, attention=attention),))


def _small_vocabulary(model: Model) -> Model:
    """The model with the first rows of its tables: a lowering treats all rows alike, and they are most of the bytes."""
    size = min(_VOCABULARY, model.config["vocab_size"])
    names = {f"{model.arch.embedding}.weight", model.weight_of(model.arch.head), f"{model.arch.head}.bias"}
    first = {name: _first_rows(model.weights[name], size) for name in names & model.weights.keys()}
    return replace(model.with_weights(first), config={**model.config, "vocab_size": size})


def _first_rows(weight: Weight, count: int) -> Weight:
    if isinstance(weight, DenseWeight):
        return DenseWeight.of(weight.rows(0, count).clone())
    return QuantWeight.of(weight.load().rows(slice(count)), weight.scheme)
