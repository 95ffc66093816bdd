"""A TensorRT engine for each GPU that a recipe names, compiled from one ONNX graph, with or without a GPU here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import onnx_ir as ir
from pydantic import Field, field_validator

from llmopt.exporters.onnx.decoder_engine import describe_decoder, longest_of, lowered_decoder
from llmopt.exporters.onnx.encoder_engine import describe_encoder, lowered_encoder
from llmopt.exporters.onnx.engine_files import check_capacity, save_graph, tensor_info
from llmopt.exporters.tensorrt.compiler import Compiler, Profile
from llmopt.exporters.tensorrt.graph import fix_capacity, name_nodes
from llmopt.exporters.tensorrt.network import check_network, describe_network
from llmopt.exporters.tensorrt.package import find_package
from llmopt.optimizer.contracts import Exporter, Feature, PassContext
from llmopt.optimizer.manifest import Checkpoint, EncoderEngine, Engine, PassRecord
from llmopt.optimizer.model import DenseWeight, Model
from llmopt.optimizer.target import TARGETS, Target

__all__ = ["TensorRT"]

_CAPACITY = 2048
"""Tokens of a slot where the recipe does not say: the pool is allocated for all of them."""
_LARGER = 1.1
"""Times the bytes of its weights that an engine may have before the manifest notes it."""

Gpu = Literal["sm75", "sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm103", "sm110", "sm120", "sm121"]


class TensorRT(Exporter):
    """Write ``tensorrt/``: the graph, an engine for each GPU, the network's layers and the build log."""

    targets: tuple[Gpu, ...] = Field(
        min_length=1,
        description="GPUs by their compute capability, as sm89. tensorrt_rtx compiles for any of its own without one; "
        "tensorrt for the one that is here.",
    )
    precision: Literal["fp16", "bf16"] = Field("fp16", description="What is not quantized is stored and computed in.")
    slots: int = Field(8, ge=1, description="Most sequences in one decode call; of an encoder, texts in one call.")
    capacity: int | None = Field(
        None,
        ge=4,
        description="The length of a slot, or of an encoder's texts, in tokens; omitted: 2048, or what the model has.",
    )
    max_chunk: int = Field(512, ge=1, description="Most tokens in one prefill call.")
    workspace: float | None = Field(
        None, gt=0, description="GB of memory that a kernel may take while it runs; omitted: what the GPU has."
    )

    folder: ClassVar[str] = "tensorrt"
    for_encoders: ClassVar[bool] = True

    @field_validator("targets")
    @classmethod
    def _targets_differ(cls, value: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
        if twice := next((gpu for gpu in value if value.count(gpu) > 1), None):
            raise ValueError(f"{twice} is given twice")
        return value

    @property
    def holds(self) -> frozenset[Feature]:
        """See ``Exporter.holds``: an int8 cache has no kernel."""
        return frozenset({"an online rotation"})

    def executors(self) -> list[Target]:
        """See ``Exporter.executors``."""
        return [TARGETS["tensorrt"].in_precision(self._dtype)]

    @property
    def _dtype(self) -> Literal["float16", "bfloat16"]:
        return "float16" if self.precision == "fp16" else "bfloat16"

    def check(self, model: Model) -> None:
        """See ``Exporter.check``.

        Raises:
            MissingExtraError: Neither tensorrt_rtx nor tensorrt is installed.
            UnsupportedError: The package does not compile for a target, or the model has no such graph.
        """
        find_package().check_targets(self.targets)
        if model.is_encoder:
            check_capacity(self.capacity, model.encoder.max_positions)
        else:
            check_capacity(self.capacity, longest_of(model.decoder))

    def longest(self, model: Model) -> int:
        """See ``Exporter.longest``."""
        if model.is_encoder:
            return self.capacity or min(_CAPACITY, model.pooling.max_tokens or _CAPACITY, model.encoder.max_positions)
        return self.capacity or min(_CAPACITY, model.decoder.max_positions)

    def estimate(self, model: Model) -> int:
        """See ``Exporter.estimate``: weights as stored, floats in 16 bits, in the graph and in each engine."""
        weights = model.weights.values()
        once = sum(2 * w.nbytes // w.dtype.itemsize if isinstance(w, DenseWeight) else w.nbytes for w in weights)
        return once * (1 + len(self.targets))

    def export(
        self, model: Model, directory: Path, context: PassContext
    ) -> tuple[Engine | EncoderEngine | Checkpoint, list[PassRecord]]:
        """See ``Exporter.export``.

        Raises:
            VerificationError: The lowered graph does not compute what the standard graph does, or TensorRT parsed it
                as something else.
            UnsupportedError: TensorRT does not take a node of it.
        """
        (target,) = self.executors()
        if model.is_encoder:
            return self._export_encoder(model, target, directory, context)
        return self._export_decoder(model, target, directory, context)

    def _export_decoder(
        self, model: Model, target: Target, directory: Path, context: PassContext
    ) -> tuple[Engine, list[PassRecord]]:
        capacity = self.longest(model)
        graph, records = lowered_decoder(model, target, self._verified(target), context, capacity=capacity)
        fix_capacity(graph, capacity)
        compiled, record = self._compile(graph, directory, self._profiles(capacity), context)
        engine = describe_decoder(
            model, target, graph, capacity,
            exporter="tensorrt", path=f"{self.folder}/model.onnx", slots=self.slots,
            max_chunk=min(self.max_chunk, capacity), min_chunk=1, batch_invariant=False,
            features=[find_package().name], compiled=compiled,
        )  # fmt: skip
        return engine, [*records, record]

    def _export_encoder(
        self, model: Model, target: Target, directory: Path, context: PassContext
    ) -> tuple[EncoderEngine, list[PassRecord]]:
        capacity = self.longest(model)
        graph, records = lowered_encoder(model, target, self._verified(target), context)
        texts, tokens = (1, self.slots, self.slots), (1, capacity, capacity)
        profile = Profile("texts", {"batch": texts, "tokens": tokens})
        compiled, record = self._compile(graph, directory, [profile], context)
        engine = describe_encoder(
            model, target, graph, capacity,
            exporter="tensorrt", path=f"{self.folder}/model.onnx", compiled=compiled, dtype=self._dtype,
            slots=self.slots, features=[find_package().name],
        )  # fmt: skip
        return engine, [*records, record]

    def _verified(self, target: Target) -> Target:
        """What ONNX Runtime can execute here: its CPU provider has no kernels for bfloat16."""
        return target if self.precision == "fp16" else target.in_precision("float32")

    def _compile(
        self, graph: ir.Model, directory: Path, profiles: Sequence[Profile], context: PassContext
    ) -> tuple[dict[str, str], PassRecord]:
        """Save the graph and compile it: files by GPU, relative to the build directory, and what was found."""
        name_nodes(graph)
        package, folder = find_package(), directory / self.folder
        save_graph(graph, folder, context)
        inputs, outputs = _dims(graph.graph.inputs), _dims(graph.graph.outputs)
        compiler = Compiler(package, folder / "model.onnx")
        details: dict[str, object] = {"package": package.title, "network": check_network(compiler.network, graph)}
        describe_network(compiler.network, package, profiles, {**inputs, **outputs}, folder / "network.json")
        weights, notes = (folder / "model.onnx.data").stat().st_size, []
        files: dict[str, str] = {}
        for done, target in enumerate(self.targets, start=1):
            workspace = None if self.workspace is None else int(self.workspace * 1e9)
            engine = compiler.compile(
                target, profiles, inputs, workspace=workspace, timing_cache=folder / "timing.cache"
            )
            (folder / f"{target}.engine").write_bytes(engine)
            files[target] = f"{self.folder}/{target}.engine"
            details[target] = len(engine)
            if len(engine) > _LARGER * weights:
                notes.append(
                    f"{target}.engine has {len(engine) / 1e6:.0f} MB, its weights {weights / 1e6:.0f} MB: the rest is "
                    "code, about the same for larger models, and what TensorRT stores in another form"
                )
            context.progress(done, len(self.targets))
        (folder / "build.log").write_text("\n".join(compiler.log) + "\n", encoding="utf-8")
        return files, PassRecord(name="compile", changed=True, notes=notes, details=details)

    def _profiles(self, capacity: int) -> list[Profile]:
        """Of prefill and of decoding, in the order in which the runtime takes them."""
        chunk = min(self.max_chunk, capacity)
        one, slots = (1, 1, 1), (1, self.slots, self.slots)
        return [
            Profile("prefill", {"batch": one, "tokens": (1, chunk, chunk), "rows": (1, 1, chunk)}),
            Profile("decode", {"batch": slots, "tokens": one, "rows": slots}),
        ]


def _dims(values: Sequence[ir.Value]) -> Mapping[str, Sequence[int | str]]:
    return {info.name: info.dims for info in map(tensor_info, values)}
