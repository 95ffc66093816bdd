"""An ONNX engine: the model as a graph with in-place KV, lowered for the target that will execute it.

Its flavor decides about inputs and outputs: our runtime's, or those of onnxruntime-genai.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import onnx_ir as ir
from pydantic import Field

from llmopt.exporters.onnx.genai import with_genai_interface, write_genai_files
from llmopt.exporters.onnx.lowering import lowered_graph
from llmopt.exporters.onnx.rope import check_rope, longest_with, rope_note
from llmopt.exporters.onnx.verify import verify_lowering
from llmopt.optimizer.contracts import Exporter, PassContext
from llmopt.optimizer.decoder import Decoder, Rope
from llmopt.optimizer.errors import MissingExtraError, UnsupportedError
from llmopt.optimizer.instructions import VNNI, host_instructions
from llmopt.optimizer.manifest import Checkpoint, Engine, PassRecord, TensorInfo
from llmopt.optimizer.model import DenseWeight, Model, QuantWeight
from llmopt.optimizer.scheme import Scheme
from llmopt.optimizer.target import TARGETS, Target

__all__ = ["Onnx"]

_DTYPES = {ir.DataType.FLOAT: "float32", ir.DataType.INT64: "int64", ir.DataType.INT8: "int8"}
_MAX_CHUNK = 512
_FILE = "model.onnx"


class Onnx(Exporter):
    """Write ``engine/model.onnx`` and its external data, or those of onnxruntime-genai into ``genai/``."""

    target: Literal["cpu"] = Field("cpu", description="What executes the engine: cpu, by ONNX Runtime.")
    flavor: Literal["llmopt", "genai"] = Field(
        "llmopt",
        description="llmopt: the engine that llmopt serves and measures. genai: a folder that onnxruntime-genai loads.",
    )
    capacity: int | None = Field(
        None,
        ge=4,
        description="The longest sequence in tokens; omitted: the model's max_position_embeddings.",
    )

    @property
    def folder(self) -> str:
        """See ``Exporter.folder``."""
        return "engine" if self.flavor == "llmopt" else "genai"

    def targets(self) -> list[Target]:
        """See ``Exporter.targets``."""
        return [TARGETS[self.target]]

    def check(self, model: Model) -> None:
        """See ``Exporter.check``.

        Raises:
            UnsupportedError: An activation, rope type, width of heads or capacity that this exporter has no graph for.
            MissingExtraError: onnxruntime, which verifies and measures the engine, is not installed.
        """
        if importlib.util.find_spec("onnxruntime") is None:
            raise MissingExtraError("onnxruntime", "cpu")
        decoder = model.decoder
        for rope in _ropes(decoder):
            check_rope(rope)
        longest = self._longest(decoder)
        if self.capacity is not None and self.capacity > longest:
            raise UnsupportedError(
                f"capacity {self.capacity} is beyond the model's {longest} positions", hint="lower it or leave it out"
            )

    def longest(self, model: Model) -> int:
        """See ``Exporter.longest``."""
        return self.capacity or model.decoder.max_positions

    def estimate(self, model: Model) -> int:
        """See ``Exporter.estimate``: weights as stored, floats as float32."""
        weights = model.weights.values()
        return sum(4 * w.nbytes // w.dtype.itemsize if isinstance(w, DenseWeight) else w.nbytes for w in weights)

    def export(
        self, model: Model, directory: Path, context: PassContext
    ) -> tuple[Engine | Checkpoint, list[PassRecord]]:
        """See ``Exporter.export``.

        Raises:
            VerificationError: The lowered graph does not compute what the standard graph does.
        """
        target = TARGETS[self.target]
        capacity = self.longest(model)
        for rope in _ropes(model.decoder):
            if note := rope_note(rope, capacity):
                context.note(note)
        differences = verify_lowering(model, target, level=context.verify, seed=context.seed)
        graph, records = lowered_graph(model, target, capacity=capacity, strict=context.strict)
        options = {"level": context.verify}
        records.append(PassRecord(name="verify_lowering", options=options, changed=False, details=differences))
        folder = directory / self.folder
        folder.mkdir(parents=True)
        if self.flavor == "genai":
            graph = with_genai_interface(graph)
            write_genai_files(model, folder, capacity=capacity)
        ir.save(graph, folder / _FILE, external_data=f"{_FILE}.data", callback=_progress(context))
        if self.flavor == "genai":
            return Checkpoint(path=self.folder, format="genai", dtype="float32", notes=_genai_notes(model)), records
        return self._describe(model, graph, capacity), records

    def _longest(self, decoder: Decoder) -> int:
        """The longest sequence in tokens that the model's positions allow."""
        return min((longest_with(rope) for rope in _ropes(decoder)), default=decoder.max_positions)

    def _describe(self, model: Model, graph: ir.Model, capacity: int) -> Engine:
        decoder = model.decoder
        return Engine(
            exporter="onnx",
            target=self.target,
            path=f"{self.folder}/{_FILE}",
            inputs=[_info(value) for value in graph.graph.inputs],
            outputs=[_info(value) for value in graph.graph.outputs],
            num_layers=len(decoder.layers),
            kv_heads=decoder.kv_heads,
            head_dim=decoder.head_dim,
            kv_dtype="float32" if model.cache_scales(0) is None else "int8",
            vocab_size=decoder.vocab_size,
            capacity=capacity,
            max_chunk=min(_MAX_CHUNK, capacity),
            min_chunk=2,
            features=_features(model),
        )


def _features(model: Model) -> list[str]:
    """What whoever executes the engine must know."""
    features = [] if model.cache_scales(0) is None else ["int8_kv"]
    quantized = [weight for weight in model.weights.values() if isinstance(weight, QuantWeight)]
    if host_instructions() == VNNI and any(_is_lowered_for_vnni(weight.scheme) for weight in quantized):
        features.append(VNNI)
    return features


def _genai_notes(model: Model) -> list[str]:
    """What whoever opens the folder must know; genai's config has no place for it."""
    notes = ["its logits are those of each sequence's last token"]
    if VNNI in _features(model):
        notes.append("its kernels are right on CPUs with VNNI only: build it where it will run")
    return notes


def _is_lowered_for_vnni(scheme: Scheme) -> bool:
    """Whether a linear's kernel is another one without: products of two integers, and blocks of few bits."""
    return scheme.weights.type == "int" and (scheme.input_activations is not None or scheme.weights.num_bits < 8)


def _ropes(decoder: Decoder) -> list[Rope]:
    """The different ropes of a model's layers."""
    ropes: list[Rope] = []
    for layer in decoder.layers:
        if layer.attention.rope is not None and layer.attention.rope not in ropes:
            ropes.append(layer.attention.rope)
    return ropes


def _progress(context: PassContext) -> Callable[[ir.TensorProtocol, ir.external_data.CallbackInfo], None]:
    def report(_: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        context.progress(info.index + 1, info.total)

    return report


def _info(value: ir.Value) -> TensorInfo:
    assert value.shape is not None
    assert value.dtype is not None
    dims = [size if isinstance(size, int) else str(size) for size in value.shape]
    return TensorInfo(name=str(value.name), dtype=_DTYPES[value.dtype], dims=dims)
