"""Runs the graph before and after every graph pass, one decoder layer at a time.

Whole quantized models cannot be compared closely: one activation that rounds the other way in the first layer
changes every later one, and after 30 layers two exact executions of one W8A8 model differ by a tenth of the logits'
spread. A single layer with embedding and head shows every mistake of a graph pass, and needs the memory of one layer.
"""

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmopt.exporters.onnx.adapter_inputs import GivenAdapters
from llmopt.exporters.onnx.calls import CALLS, CAPACITY, run_calls
from llmopt.exporters.onnx.divergence import first_divergence, relative_errors
from llmopt.exporters.onnx.layer_check import (
    Level,
    Result,
    chosen_layers,
    compare_stages,
    first_rows,
    hint_for,
    limits,
)
from llmopt.exporters.onnx.lora import LoraOptions
from llmopt.exporters.onnx.lowering import stages
from llmopt.exporters.onnx.sessions import Sessions
from llmopt.optimizer.decoder import Decoder, Layer
from llmopt.optimizer.errors import VerificationError
from llmopt.optimizer.model import Model, QuantWeight
from llmopt.optimizer.target import Target

__all__ = ["verify_lowering"]

_VOCABULARY = 1024
_WINDOW = 6
"""Tokens of a sliding window while it is verified: the calls have more, so that it is seen to slide."""


def verify_lowering(
    model: Model, target: Target, *, level: Level, seed: int, lora: LoraOptions | GivenAdapters | None = None
) -> dict[str, dict[str, float]]:
    """Compare the graphs before and after each graph pass, and the first with the last, on single layers.

    Args:
        model: The model as it will be exported.
        target: Whose graph passes are verified.
        level: quick: the first, a middle and the last layer, and one of every other kind; full: every layer; none:
            nothing.
        seed: Of the token ids that are fed.
        lora: Which linears take adapters; those that are fed are random.

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
    # numpy has no bfloat16 to feed; but for what it reads the kernel is the same.
    if isinstance(lora, LoraOptions):
        lora = lora.model_copy(update={"dtype": "float32"})
    chosen = range(model.num_layers) if level == "full" else _quick(model)
    found = {}
    for i in chosen:
        with tempfile.TemporaryDirectory() as folder:
            found[f"layers.{i}"] = _Layer(model, i, seed, Sessions(Path(folder)), target, lora).verify()
    return found


def _quick(model: Model) -> list[int]:
    """The first, a middle and the last layer, and the first of each kind that is computed in another way."""
    return chosen_layers([_kind(model, layer) for layer in model.decoder.layers], "quick")


def _kind(model: Model, layer: Layer) -> tuple[object, ...]:
    """What decides how a layer is lowered: its description without its number, its biases, its schemes."""
    description = repr(replace(layer, name="")).replace(f"{layer.name}.", "")
    biases = tuple(f"{name}.bias" in model.weights for name in layer.linears)
    weights = [model.weights[f"{name}.weight"] for name in layer.linears]
    schemes = frozenset(weight.scheme.name if isinstance(weight, QuantWeight) else None for weight in weights)
    return (description, biases, schemes)


_Logits = Result[list[np.ndarray]]
"""Of each call, float32 ``[rows, vocabulary]``."""


@dataclass(slots=True)
class _Layer:
    """One layer of a model through all stages."""

    model: Model
    i: int
    seed: int
    sessions: Sessions
    target: Target
    lora: LoraOptions | GivenAdapters | None
    decoder: Decoder = field(init=False)

    def __post_init__(self) -> None:
        self.decoder = _single(self.model.decoder, self.i)

    def verify(self) -> dict[str, float]:
        """The differences of ``verify_lowering``."""
        return compare_stages(
            stages(self.model, self.target, capacity=CAPACITY, decoder=self.decoder, lora=self.lora),
            self.sessions,
            layer=self.i,
            run=self._logits,
            difference=self._difference,
        )

    def _logits(self, session: Any) -> list[np.ndarray]:
        return [outputs["logits"] for outputs in run_calls(session, self.decoder, self.seed)]

    def _difference(self, name: str, before: _Logits, after: _Logits) -> float:
        """The largest of the calls' medians.

        Raises:
            VerificationError: It is beyond the limit, or not a number.
        """
        weights = [self.model.weights[self.model.weight_of(module)] for module in self.decoder.linears]
        accepted, limit = limits(name, self.target.graph_passes, weights)
        largest = 0.0
        for number, pair in enumerate(zip(before.outputs, after.outputs, strict=True)):
            errors = relative_errors(*pair)
            median, worst = float(np.median(errors)), float(errors.max())
            if not (median <= accepted and worst <= limit):
                found = (median, accepted) if not median <= accepted else (worst, limit)
                raise self._error(name, before, after, number, *found)
            largest = max(largest, median)
        return largest

    def _error(
        self, name: str, before: _Logits, after: _Logits, call: int, difference: float, limit: float
    ) -> VerificationError:
        graphs = (before.graph, after.graph)
        node = first_divergence(self.sessions, graphs, self.decoder, call=call, seed=self.seed, limit=limit)
        return VerificationError(
            f"layer {self.i}: {name} changes the result: logits differ by {difference:.2g} of their spread, "
            f"{limit:g} is accepted; first at {node}, for {CALLS[call]} (seed {self.seed})",
            hint=hint_for(name),
        )


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
    first = {name: first_rows(model.weights[name], size) for name in names & model.weights.keys()}
    return replace(model.with_weights(first), config={**model.config, "vocab_size": size})
