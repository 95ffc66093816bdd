"""An ONNX engine: the model as a graph with in-place KV, lowered for the target that will execute it.

Its flavor decides about inputs and outputs: our runtime's, or those of onnxruntime-genai.
"""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import onnx_ir as ir
from pydantic import Field, field_validator

from llmopt.exporters.onnx.adapter_inputs import GivenAdapters
from llmopt.exporters.onnx.batch_invariance import batch_dependent
from llmopt.exporters.onnx.decoder_engine import describe_decoder, longest_of, lowered_decoder
from llmopt.exporters.onnx.encoder_engine import export_encoder
from llmopt.exporters.onnx.engine_files import check_capacity, save_graph, vnni_feature
from llmopt.exporters.onnx.genai import with_genai_interface, write_genai_files
from llmopt.exporters.onnx.genai_adapters import (
    GenaiAdapter,
    adapted_modules,
    check_adapters,
    read_adapters,
    write_adapters,
)
from llmopt.exporters.onnx.lora import LoraOptions, lora_slots
from llmopt.optimizer import kernels
from llmopt.optimizer.contracts import Exporter, Feature, PassContext
from llmopt.optimizer.decoder import Decoder
from llmopt.optimizer.errors import InputError, MissingExtraError, UnsupportedError
from llmopt.optimizer.lora.base_file import save_base
from llmopt.optimizer.manifest import LORA_FEATURE, Checkpoint, EncoderEngine, Engine, PassRecord
from llmopt.optimizer.model import DenseWeight, Model
from llmopt.optimizer.pooling import Pooling, PoolingMode
from llmopt.optimizer.target import TARGETS, Target

__all__ = ["Onnx"]

_MAX_CHUNK = 512


class Onnx(Exporter):
    """Write ``engine/model.onnx`` and its external data, those for CUDA into ``cuda/``, of genai into ``genai/``."""

    for_encoders: ClassVar[bool] = True

    target: Literal["cpu", "cuda"] = Field(
        "cpu",
        description="Which provider of ONNX Runtime executes the engine. cuda: decoders without experts, in float16; "
        "never executed on a GPU.",
    )
    flavor: Literal["llmopt", "genai"] = Field(
        "llmopt",
        description="llmopt: the engine that llmopt serves and measures. genai: a folder that onnxruntime-genai loads.",
    )
    kernels: Literal["llmopt", "onnxruntime"] | None = Field(
        None,
        description="Whose kernels a decoder's attention and rounding of activations run in. llmopt: our own, which "
        "are faster; only llmopt loads the engine. onnxruntime: every ONNX Runtime loads it. Omitted: llmopt, unless "
        "llmopt was installed without a C++ compiler.",
    )
    capacity: int | None = Field(
        None,
        ge=4,
        description="The longest sequence in tokens; omitted: the model's max_position_embeddings.",
    )

    adapters: tuple[GenaiAdapter, ...] = Field(
        (),
        description="LoRA adapters that onnxruntime-genai loads beside the graph, in flavor genai.",
    )
    lora: LoraOptions | None = Field(
        None,
        description="Adapters that are added later and chosen per sequence (docs/lora.md); omitted: none can be.",
    )

    pooling: PoolingMode | None = Field(
        None,
        description="How an encoder's vectors of tokens become one; omitted: as the files of sentence-transformers "
        "beside the model say, mean where there are none.",
    )
    normalize: bool | None = Field(
        None,
        description="Whether an encoder's vectors are divided by their length; omitted: as these files say, no where "
        "there are none.",
    )

    @field_validator("adapters")
    @classmethod
    def _names_differ(cls, value: tuple[GenaiAdapter, ...]) -> tuple[GenaiAdapter, ...]:
        names = [each.name for each in value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two adapters have the name {twice[0]}")
        return value

    @property
    def folder(self) -> str:
        """See ``Exporter.folder``."""
        if self.flavor == "genai":
            return "genai"
        return "engine" if self.target == "cpu" else self.target

    @property
    def holds(self) -> frozenset[Feature]:
        """See ``Exporter.holds``: attention over an int8 cache was not tried on CUDA."""
        return super().holds if self.target == "cpu" else frozenset({"an online rotation"})

    def executors(self) -> list[Target]:
        """See ``Exporter.executors``."""
        target = TARGETS[self.target]
        if not self._own_kernels:
            return [target]
        return [target.with_kernels() if self.lora is None else target.with_adapters()]

    @property
    def _own_kernels(self) -> bool:
        if self.kernels is None:
            return self.target == "cpu" and self.flavor == "llmopt" and kernels.library() is not None
        return self.kernels == "llmopt"

    def check(self, model: Model) -> None:
        """See ``Exporter.check``.

        Raises:
            UnsupportedError: An activation, rope type, width of heads or capacity that this exporter has no graph for.
            InputError: An adapter is for another model.
            MissingExtraError: onnxruntime, which verifies and measures the engine, is not installed.
        """
        if importlib.util.find_spec("onnxruntime") is None:
            raise MissingExtraError("onnxruntime", "cpu")
        if self.target == "cuda":
            self._check_cuda(model)
        if self.lora is not None:
            self._check_lora(model, self.lora)
        if model.is_encoder:
            self._check_encoder(model)
            longest = self._pooled(model).encoder.max_positions
        else:
            self._check_decoder(model.decoder)
            longest = longest_of(model.decoder)
            check_adapters(self.adapters, model)
        if self.adapters and self.flavor != "genai":
            raise UnsupportedError(
                f"adapters are files for onnxruntime-genai, and the flavor is {self.flavor}",
                hint="set flavor: genai, or merge one with the pass merge_lora",
            )
        check_capacity(self.capacity, longest)

    def longest(self, model: Model) -> int:
        """See ``Exporter.longest``."""
        if model.is_encoder:
            return self.capacity or min(model.pooling.max_tokens or sys.maxsize, model.encoder.max_positions)
        return self.capacity or model.decoder.max_positions

    def estimate(self, model: Model) -> int:
        """See ``Exporter.estimate``: weights as stored, floats as float32, or float16 for CUDA."""
        weights, item = model.weights.values(), 4 if self.target == "cpu" else 2
        return sum(item * w.nbytes // w.dtype.itemsize if isinstance(w, DenseWeight) else w.nbytes for w in weights)

    def export(
        self, model: Model, directory: Path, context: PassContext
    ) -> tuple[Engine | EncoderEngine | Checkpoint, list[PassRecord]]:
        """See ``Exporter.export``.

        Raises:
            VerificationError: The lowered graph does not compute what the standard graph does.
        """
        [target] = self.executors()
        if model.is_encoder:
            return export_encoder(self._pooled(model), target, directory, context, capacity=self.longest(model))
        return self._export_decoder(model, target, directory, context)

    def _pooled(self, model: Model) -> Model:
        """The encoder with this exporter's pooling.

        Raises:
            InputError: Its own files say otherwise.
        """
        found = model.pooling
        mode = found.mode if self.pooling is None else self.pooling
        normalize = found.normalize if self.normalize is None else self.normalize
        wanted = replace(found, mode=mode, normalize=normalize)
        if found.is_given and wanted != found:
            raise InputError(
                f"the recipe asks for {_words(wanted)}, the model's own files for {_words(found)}",
                hint="leave the options out; they are for encoders without files of sentence-transformers",
            )
        return replace(model, pooling=wanted)

    def _check_cuda(self, model: Model) -> None:
        if model.is_encoder:
            raise UnsupportedError(
                f"target: cuda is for decoders, and {model.family.name} is an encoder", hint="set target: cpu"
            )
        if model.decoder.expert_linears:
            raise UnsupportedError("target: cuda has no kernels for a mixture of experts", hint="set target: cpu")
        if self.flavor != "llmopt" or self.kernels == "llmopt":
            wrong = f"flavor: {self.flavor}" if self.flavor != "llmopt" else "kernels: llmopt"
            raise UnsupportedError(f"{wrong} is for target: cpu", hint="leave it out, or set target: cpu")

    def _check_encoder(self, model: Model) -> None:
        if self.kernels is not None:
            raise UnsupportedError(
                f"kernels: {self.kernels} is for decoders, and {model.family.name} is an encoder", hint="leave it out"
            )
        if self.flavor != "llmopt":
            raise UnsupportedError(
                f"flavor: {self.flavor} is for decoders, and {model.family.name} is an encoder",
                hint="leave it out: sentence-transformers loads the engine's own folder",
            )

    def _check_lora(self, model: Model, options: LoraOptions) -> None:
        if model.is_encoder:
            raise UnsupportedError(f"lora is for decoders, and {model.family.name} is an encoder", hint="leave it out")
        if self.target != "cpu" or self.flavor != "llmopt":
            chosen = f"target: {self.target}" if self.target != "cpu" else f"flavor: {self.flavor}"
            raise UnsupportedError(
                f"lora is for target: cpu and flavor: llmopt, not for {chosen}",
                hint="merge the adapter into the model with merge_lora",
            )
        lora_slots(model, model.decoder, options)

    def _check_decoder(self, decoder: Decoder) -> None:
        if self.pooling is not None or self.normalize is not None:
            raise UnsupportedError(
                f"pooling and normalize are options for encoders, and {decoder.name} is none", hint="remove them"
            )
        if self.kernels == "llmopt" and self.flavor != "llmopt":
            raise UnsupportedError(
                f"kernels: llmopt cannot be loaded by {self.flavor}", hint="leave it out, or set kernels: onnxruntime"
            )
        if self.kernels == "llmopt" and kernels.library() is None:
            raise UnsupportedError(
                "kernels: llmopt is not possible: this llmopt was installed without a C++ compiler",
                hint="install a compiler and llmopt again, or set kernels: onnxruntime",
            )

    def _export_decoder(
        self, model: Model, target: Target, directory: Path, context: PassContext
    ) -> tuple[Engine | Checkpoint, list[PassRecord]]:
        capacity = self.longest(model)
        if self.target == "cpu" and self.kernels is None and self.flavor == "llmopt" and not self._own_kernels:
            context.note("kernels: onnxruntime, because llmopt was installed without a C++ compiler")
        if self.lora is not None and not self._own_kernels:
            context.note("lora: without llmopt's kernels each sequence is multiplied with the factors of all adapters")
        adapters = read_adapters(self.adapters, model)
        lora = GivenAdapters(adapted_modules(adapters)) if adapters else self.lora
        graph, records = lowered_decoder(model, target, target, context, capacity=capacity, lora=lora)
        folder = directory / self.folder
        if self.flavor == "genai":
            save_graph(with_genai_interface(graph), folder, context)
            write_genai_files(model, folder, capacity=capacity)
            if self.adapters:
                records.append(write_adapters(adapters, self.adapters, model, folder))
            return Checkpoint(path=self.folder, format="genai", dtype="float32", notes=_genai_notes(model)), records
        save_graph(graph, folder, context)
        if self.lora is not None:
            save_base(model, directory)
        return self._describe(model, target, graph, capacity), records

    def _describe(self, model: Model, target: Target, graph: ir.Model, capacity: int) -> Engine:
        on_cpu = self.target == "cpu"
        return describe_decoder(
            model,
            target,
            graph,
            capacity,
            exporter="onnx",
            path=f"{self.folder}/model.onnx",
            max_chunk=min(_MAX_CHUNK, capacity),
            min_chunk=2,
            batch_invariant=on_cpu and not batch_dependent(graph),
            features=[
                *([] if model.cache_scales(0) is None else ["int8_kv"]),
                *([kernels.FEATURE] if self._own_kernels else []),
                *(vnni_feature(model) if on_cpu else []),
                *([] if self.lora is None else [LORA_FEATURE]),
            ],
            lora=None if self.lora is None else lora_slots(model, model.decoder, self.lora),
        )


def _genai_notes(model: Model) -> list[str]:
    """What whoever opens the folder must know; genai's config has no place for it."""
    notes = ["its logits are those of each sequence's last token"]
    if vnni_feature(model):
        notes.append("its kernels are right on CPUs with VNNI only: build it where it will run")
    return notes


def _words(pooling: Pooling) -> str:
    return f"pooling: {pooling.mode} {'with' if pooling.normalize else 'without'} normalize"
