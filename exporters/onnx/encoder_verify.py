"""Runs an encoder's graph before and after every graph pass, one layer at a time, as ``verify.py`` does for decoders.

What is compared is the vectors of all tokens, and the pooled ones, of batches with and without padding.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from llmopt.exporters.onnx.divergence import relative_errors
from llmopt.exporters.onnx.encoder_graph import encoder_graph
from llmopt.exporters.onnx.encoder_skeleton import encoder_skeleton
from llmopt.exporters.onnx.layer_check import (
    Level,
    Result,
    chosen_layers,
    compare_stages,
    first_rows,
    hint_for,
    limits,
)
from llmopt.exporters.onnx.lowering import passed
from llmopt.exporters.onnx.sessions import Sessions
from llmopt.optimizer.errors import VerificationError
from llmopt.optimizer.model import Model, QuantWeight
from llmopt.optimizer.target import Target

__all__ = ["verify_encoder"]

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
    chosen = chosen_layers([_kind(model, i) for i in range(model.num_layers)], level)
    model, skeletons = _small_vocabulary(model), _Skeletons(model)
    found = {}
    for i in chosen:
        with tempfile.TemporaryDirectory() as folder:
            layer = _Layer(model, i, Sessions(Path(folder)), target, _batches(model, seed))
            found[f"layers.{i}"] = layer.verify(skeletons.of(i))
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


_Vectors = Result[list[tuple[np.ndarray, np.ndarray]]]
"""Of each batch the vectors of tokens, and the pooled ones, ``[rows, d]``."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer of a model through all stages."""

    model: Model
    i: int
    sessions: Sessions
    target: Target
    batches: list[Mapping[str, np.ndarray]]

    def verify(self, skeleton: ir.Model) -> dict[str, float]:
        """The differences of ``verify_encoder``."""
        return compare_stages(
            passed(encoder_graph(self.model, skeleton), self.target.encoder_passes, options=self.target.options),
            self.sessions,
            layer=self.i,
            run=self._vectors,
            difference=self._difference,
        )

    def _vectors(self, session: Any) -> list[tuple[np.ndarray, np.ndarray]]:
        outputs = [session.run(["last_hidden_state", "sentence_embedding"], feed) for feed in self.batches]
        pairs = zip(outputs, self.batches, strict=True)
        return [(hidden[feed["attention_mask"] > 0], pooled) for (hidden, pooled), feed in pairs]

    def _difference(self, name: str, before: _Vectors, after: _Vectors) -> float:
        """The largest of the batches' medians.

        Raises:
            VerificationError: It is beyond the limit, or not a number.
        """
        weights = [self.model.weights[f"{module}.weight"] for module in self.model.encoder.linears]
        accepted, limit = limits(name, self.target.encoder_passes, weights)
        largest = 0.0
        for expected, found in zip(before.outputs, after.outputs, strict=True):
            errors = np.concatenate([relative_errors(*pair) for pair in zip(expected, found, strict=True)])
            median, worst = float(np.median(errors)), float(errors.max())
            if not (median <= accepted and worst <= limit):
                difference, most = (median, accepted) if not median <= accepted else (worst, limit)
                raise VerificationError(
                    f"layer {self.i}: {name} changes the result: vectors differ by {difference:.2g} of their spread, "
                    f"{most:g} is accepted",
                    hint=hint_for(name),
                )
            largest = max(largest, median)
        return largest


def _small_vocabulary(model: Model) -> Model:
    """The model with the first rows of its words' table: a lowering treats all rows alike."""
    name = f"{model.encoder.embedding}.weight"
    weight = model.weights[name]
    return model.with_weights({name: first_rows(weight, min(_VOCABULARY, weight.shape[0]))})
