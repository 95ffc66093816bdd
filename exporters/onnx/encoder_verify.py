"""Runs an encoder's graph before and after every graph pass, one layer at a time, as ``verify.py`` does for decoders.

What is compared is the vectors of all tokens, and the pooled ones, of batches with and without padding.
"""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir

from llmopt.exporters.onnx.divergence import relative_errors
from llmopt.exporters.onnx.encoder_graph import encoder_graph
from llmopt.exporters.onnx.encoder_skeleton import encoder_skeleton
from llmopt.exporters.onnx.lowering import Stage, passed
from llmopt.exporters.onnx.sessions import Sessions
from llmopt.exporters.onnx.verify import LIMIT, ROUNDED_LIMIT
from llmopt.optimizer.errors import MissingExtraError, VerificationError, is_out_of_memory
from llmopt.optimizer.model import DenseWeight, Model, QuantWeight
from llmopt.optimizer.target import Target

__all__ = ["Level", "verify_encoder"]

Level = Literal["none", "quick", "full"]

_VOCABULARY = 1024
_BATCHES = ((1, 17), (3, 12), (2, 1))
"""Texts and tokens. The second text of a batch has half of its tokens, the third has one."""


def verify_encoder(model: Model, target: Target, *, level: Level, seed: int) -> dict[str, dict[str, float]]:
    """Compare the graphs before and after each graph pass, and the first with the last, on single layers.

    Args:
        model: The model as it will be exported.
        target: Whose graph passes are verified.
        level: quick: the first, a middle and the last layer, and one of every other kind; full: every layer; none:
            nothing.
        seed: Of the token ids that are fed.

    Returns:
        As ``verify_lowering``.

    Raises:
        VerificationError: Naming the graph pass, the layer and the difference.
        MissingExtraError: onnxruntime is not installed.
    """
    if level == "none":
        return {}
    kinds = [_kind(model, i) for i in range(model.num_layers)]
    chosen = {0, len(kinds) // 2, len(kinds) - 1} if level == "quick" else set(range(len(kinds)))
    chosen |= {kinds.index(kind) for kind in set(kinds) - {kinds[i] for i in chosen}}
    model, skeletons = _small_vocabulary(model), _Skeletons(model)
    found = {}
    for i in sorted(chosen):
        with tempfile.TemporaryDirectory() as folder:
            layer = _Layer(model, i, Sessions(Path(folder)), _batches(model, seed))
            found[f"layers.{i}"] = layer.verify(skeletons.of(i), target)
    return found


def _kind(model: Model, i: int) -> tuple[object, ...]:
    """What decides how a layer is lowered: how it is traced, and the schemes of its linears."""
    linears = model.encoder.layers[i].linears
    weights = [model.weights[f"{name}.weight"] for name in linears]
    schemes = (weight.scheme.name if isinstance(weight, QuantWeight) else None for weight in weights)
    return (_trace(model, i), *schemes)


def _trace(model: Model, i: int) -> tuple[object, ...]:
    """Equal for layers of which torch writes the same graph but for names."""
    prefix = f"{model.encoder.layers[i].name}."
    parts = sorted(name.removeprefix(prefix) for name in model.weights if name.startswith(prefix))
    kinds = model.config.get("layer_types")
    return (*parts, kinds[i] if kinds else None)


class _Skeletons:
    """Traces one layer of each kind, and gives the graphs of the others by other names."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._traced: dict[tuple[object, ...], tuple[str, bytes]] = {}

    def of(self, i: int) -> ir.Model:
        trace, name = _trace(self._model, i), self._model.encoder.layers[i].name
        if trace not in self._traced:
            self._traced[trace] = name, ir.to_proto(encoder_skeleton(self._model, i)).SerializeToString()
        traced, data = self._traced[trace]
        graph: ir.Model = ir.from_proto(onnx.ModelProto.FromString(data))
        for node in graph.graph:
            if "module" in node.attributes:
                module = node.attributes["module"].as_string()
                if module.startswith(f"{traced}."):
                    module = f"{name}{module.removeprefix(traced)}"
                node.attributes["module"] = ir.AttrString("module", module)
        return graph


def _batches(model: Model, seed: int) -> list[Mapping[str, np.ndarray]]:
    """Inputs of the engine contract; the types of tokens change within a text."""
    generator, encoder = np.random.default_rng(seed), model.encoder
    rows = model.weights[f"{encoder.embedding}.weight"].shape[0]
    padding = model.config["pad_token_id"] or 0
    batches: list[Mapping[str, np.ndarray]] = []
    for texts, tokens in _BATCHES:
        tokens = min(tokens, encoder.max_positions)
        lengths = np.array([tokens, max(1, tokens // 2), 1][:texts])
        mask = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
        ids = np.where(mask > 0, generator.integers(0, rows, (texts, tokens)), padding if padding < rows else 0)
        feed = {"input_ids": ids, "attention_mask": mask}
        if encoder.has_token_types:
            feed["token_type_ids"] = np.broadcast_to(np.arange(tokens) > tokens // 3, ids.shape).astype(np.int64)
        batches.append(feed)
    return batches


@dataclass(frozen=True, slots=True)
class _Result:
    """A stage's graph, serialized, and of each batch the vectors of tokens, and the pooled ones, ``[rows, d]``."""

    graph: bytes
    vectors: list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer of a model through all stages."""

    model: Model
    i: int
    sessions: Sessions
    batches: list[Mapping[str, np.ndarray]]

    def verify(self, skeleton: ir.Model, target: Target) -> dict[str, float]:
        """The differences of ``verify_encoder``."""
        differences: dict[str, float] = {}
        results: list[_Result] = []
        for stage in self._stages(skeleton, target):
            graph = self.sessions.serialized(stage.graph)
            if results and graph == results[-1].graph:
                continue
            results.append(_Result(graph, self._run(stage.name, graph)))
            if stage.record is not None:
                differences[stage.name] = self._difference(stage.name, *results[-2:])
        differences["all"] = self._difference("the lowering as a whole", results[0], results[-1])
        return {name: float(f"{difference:.3g}") for name, difference in differences.items()}

    def _stages(self, skeleton: ir.Model, target: Target) -> Iterator[Stage]:
        """With MatMulNBits in float32: in the engine it rounds activations, in the standard graph nothing does."""
        for stage in passed(encoder_graph(self.model, skeleton), target.encoder_passes):
            for node in stage.graph.graph:
                if node.op_type == "MatMulNBits":
                    node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
            yield stage

    def _run(self, name: str, graph: bytes) -> list[tuple[np.ndarray, np.ndarray]]:
        try:
            session = self.sessions.open(graph)
            outputs = [session.run(["last_hidden_state", "sentence_embedding"], feed) for feed in self.batches]
        except MissingExtraError:
            raise
        except Exception as error:  # ONNX Runtime's have no common base
            if is_out_of_memory(error):
                raise
            where = "the standard graph" if name == "standard" else f"the graph behind {name}"
            raise VerificationError(
                f"layer {self.i}: ONNX Runtime does not run {where}: {error}", hint=_hint(name)
            ) from error
        pairs = zip(outputs, self.batches, strict=True)
        return [(hidden[feed["attention_mask"] > 0], pooled) for (hidden, pooled), feed in pairs]

    def _difference(self, name: str, before: _Result, after: _Result) -> float:
        """The largest of the batches' medians.

        Raises:
            VerificationError: It is beyond the limit, or not a number.
        """
        largest = 0.0
        for expected, found in zip(before.vectors, after.vectors, strict=True):
            errors = np.concatenate([relative_errors(*pair) for pair in zip(expected, found, strict=True)])
            median, worst = float(np.median(errors)), float(errors.max())
            if not (median <= LIMIT and worst <= self._row_limit()):
                difference = median if not median <= LIMIT else worst
                raise VerificationError(
                    f"layer {self.i}: {name} changes the result: vectors differ by {difference:.2g} of their spread, "
                    f"{LIMIT:g} is accepted",
                    hint=_hint(name),
                )
            largest = max(largest, median)
        return largest

    def _row_limit(self) -> float:
        weights = (self.model.weights[f"{name}.weight"] for name in self.model.encoder.linears)
        schemes = [weight.scheme for weight in weights if isinstance(weight, QuantWeight)]
        return ROUNDED_LIMIT if any(scheme.input_activations is not None for scheme in schemes) else LIMIT


def _hint(name: str) -> str:
    blamed = "llmopt's exporter" if name == "standard" else "that graph pass"
    return f"this is a bug in {blamed}; verify: none builds all the same"


def _small_vocabulary(model: Model) -> Model:
    """The model with the first rows of its words' table: a lowering treats all rows alike."""
    name = f"{model.encoder.embedding}.weight"
    weight = model.weights[name]
    if isinstance(weight, DenseWeight):
        return model.with_weights({name: DenseWeight.of(weight.rows(0, min(_VOCABULARY, weight.shape[0])).clone())})
    rows = slice(min(_VOCABULARY, weight.shape[0]))
    return model.with_weights({name: QuantWeight.of(weight.load().rows(rows), weight.scheme)})
