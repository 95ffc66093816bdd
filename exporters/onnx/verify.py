"""Runs the graph before and after every graph pass, one decoder layer at a time.

Whole quantized models cannot be compared closely: one activation that rounds the other way in the first layer
changes every later one, and after 30 layers two exact executions of one W8A8 model differ by a tenth of the logits'
spread. A single layer with embedding and head shows every mistake of a graph pass, and needs the memory of one layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from llmopt.exporters.onnx.calls import CALLS, CAPACITY, open_session, run_calls
from llmopt.exporters.onnx.divergence import first_divergence
from llmopt.exporters.onnx.lowering import Stage, stages
from llmopt.optimizer.decoder import Decoder, Experts, Layer
from llmopt.optimizer.errors import VerificationError
from llmopt.optimizer.model import DenseWeight, Model, QuantWeight, Weight
from llmopt.optimizer.target import Target

__all__ = ["Level", "verify_lowering"]

Level = Literal["none", "quick", "full"]

_VOCABULARY = 1024
_WINDOW = 6
"""Tokens of a sliding window while it is verified: the calls have more, so that it is seen to slide."""

_LIMIT = 1e-4
"""Accepted median over a call's rows of ``rms(difference) / std(logits)``. Float kernels only order their sums
differently. W8A8 is exact but for activations that lie on the border of two integers: they reach few rows, and the
median none."""

Logits = list[np.ndarray]


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
    layers = model.decoder.layers
    chosen = range(len(layers)) if level == "full" else _quick(model)
    return {f"layers.{i}": _verify_layer(model, target, i, seed) for i in chosen}


def _quick(model: Model) -> list[int]:
    """The first, a middle and the last layer, and the first of each kind that is computed in another way."""
    layers = model.decoder.layers
    chosen = {0, len(layers) // 2, len(layers) - 1}
    kinds = [_kind(model, layer) for layer in layers]
    covered = {kinds[i] for i in chosen}
    return sorted(chosen | {kinds.index(kind) for kind in set(kinds) - covered})


def _kind(model: Model, layer: Layer) -> tuple[object, ...]:
    """What decides how a layer is lowered."""
    weights = [model.weights[f"{name}.weight"] for name in layer.linears]
    schemes = frozenset(weight.scheme.name for weight in weights if isinstance(weight, QuantWeight))
    attention = layer.attention
    return (attention.window, str(attention.rope), isinstance(layer.mlp, Experts), schemes)


def _verify_layer(model: Model, target: Target, i: int, seed: int) -> dict[str, float]:
    """The differences of layer ``i`` alone."""
    decoder = _single(model.decoder, i)
    differences: dict[str, float] = {}
    standard: Logits = []
    before: Logits = []
    last = None
    for stage in _comparable_stages(model, target, decoder):
        if stage.record is not None and not stage.record.changed:
            continue
        after = _logits(stage.graph, decoder, seed)
        if stage.record is not None:
            differences[stage.name] = _checked(model, target, i, stage.name, (before, after), seed)
        standard, before, last = standard or after, after, stage.name
    if last is not None and standard:
        differences["all"] = _checked(model, target, i, "the lowering as a whole", (standard, before), seed)
    return {name: float(f"{difference:.3g}") for name, difference in differences.items()}


def _single(decoder: Decoder, i: int) -> Decoder:
    """The model with layer ``i`` alone, its window so short that it slides."""
    layer = decoder.layers[i]
    window = layer.attention.window
    attention = replace(layer.attention, window=None if window is None else min(window, _WINDOW))
    return replace(decoder, layers=(replace(layer, attention=attention),))


def _comparable_stages(model: Model, target: Target, decoder: Decoder) -> Iterator[Stage]:
    """The stages, with MatMulNBits in float32: in the engine it rounds activations, the standard graph does not."""
    for stage in stages(model, target, capacity=CAPACITY, decoder=decoder):
        for node in stage.graph.graph:
            if node.op_type == "MatMulNBits":
                node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
        yield stage


def _logits(graph: ir.Model, decoder: Decoder, seed: int) -> Logits:
    return [outputs["logits"] for outputs in run_calls(open_session(graph), decoder, seed)]


def _checked(
    model: Model,
    target: Target,
    i: int,
    name: str,
    logits: tuple[Sequence[np.ndarray], Sequence[np.ndarray]],
    seed: int,
) -> float:
    """The largest difference of the calls.

    Raises:
        VerificationError: It is beyond the limit, or not a number.
    """
    found = [_median(expected, after) for expected, after in zip(*logits, strict=True)]
    wrong = next((number for number, difference in enumerate(found) if not difference <= _LIMIT), None)
    if wrong is None:
        return max(found)
    call = CALLS[wrong]
    node = _blamed(model, target, _single(model.decoder, i), name, wrong, seed)
    raise VerificationError(
        f"layer {i}: {name} changes the result: logits differ by {found[wrong]:.2g} of their spread, {_LIMIT:g} is "
        f"accepted; first at {node}, for {call} (seed {seed})",
        hint="this is a bug in that graph pass; verify: none builds all the same",
    )


def _blamed(model: Model, target: Target, decoder: Decoder, name: str, call: int, seed: int) -> str:
    """The first node whose value differs behind graph pass ``name``."""
    before: bytes | None = None
    for stage in _comparable_stages(model, target, decoder):
        after = ir.to_proto(stage.graph).SerializeToString()
        if stage.name == name and before is not None:
            return first_divergence(before, after, decoder, call=call, seed=seed, limit=_LIMIT)
        if before is None or stage.record is None or stage.record.changed:
            before = after
    return "the logits"


def _median(expected: np.ndarray, found: np.ndarray) -> float:
    rms = np.sqrt(np.mean((expected - found) ** 2, axis=-1, dtype=np.float64))
    return float(np.median(rms / expected.std(axis=-1)))


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
