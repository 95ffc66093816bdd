"""A checkpoint that other programs load: quantized as the passes left it, to the bit, in a format of your choice."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from llmopt.exporters.checkpoint.awq import Awq
from llmopt.exporters.checkpoint.compressed_tensors import CompressedTensors
from llmopt.exporters.checkpoint.fp8 import Fp8
from llmopt.exporters.checkpoint.gptq import Gptq
from llmopt.exporters.checkpoint.layout import Layout, packed_linears
from llmopt.exporters.checkpoint.shards import Part, write_checkpoint_files
from llmopt.optimizer.contracts import Exporter, Feature, PassContext
from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.manifest import Checkpoint as CheckpointEntry
from llmopt.optimizer.manifest import PassRecord
from llmopt.optimizer.model import DenseWeight, Model, QuantWeight
from llmopt.optimizer.scheme import Scheme
from llmopt.optimizer.target import Target

__all__ = ["Checkpoint"]

_Name = Literal["float32", "bfloat16", "float16"]

_DTYPES: Mapping[_Name, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


Format = Literal["compressed-tensors", "gptq", "gptq_v2", "awq", "fp8", "safetensors"]

_LAYOUTS: Mapping[Format, Layout] = {
    "compressed-tensors": CompressedTensors(),
    "gptq": Gptq("gptq"),
    "gptq_v2": Gptq("gptq_v2"),
    "awq": Awq(),
    "fp8": Fp8(),
}
"""Without ``safetensors``, in which everything is a float."""


class Checkpoint(Exporter):
    """Write ``checkpoint/``: safetensors, ``config.json`` and the tokenizer's files.

    Integers, zero points and FP8 numbers are written as they are; only floats, and scales, are rounded to ``dtype``. A
    quantized table of the embedding is written in float, as no loader looks rows up in integers.
    """

    format: Format = Field(
        "compressed-tensors",
        description="compressed-tensors, which vLLM and transformers load; gptq, gptq_v2, awq and fp8, each for the "
        "schemes that it has; safetensors: plain floats, those that quantized weights stand for.",
    )
    dtype: _Name | None = Field(
        None,
        description="Of weights in float, and of scales where the format does not settle it (GPTQ and AWQ have "
        "float16, fp8 float32). Omitted: the model's own, float32 if its config names none.",
    )

    @property
    def folder(self) -> str:
        """See ``Exporter.folder``."""
        return "checkpoint"

    @property
    def holds(self) -> frozenset[Feature]:
        """See ``Exporter.holds``: compressed-tensors knows caches with one scale for keys and one for values."""
        return frozenset({"an int8 cache"}) if self.format == "compressed-tensors" else frozenset()

    def executors(self) -> list[Target]:
        """See ``Exporter.executors``: none, other programs execute it."""
        return []

    def refusal(self, scheme: Scheme, *, experts: bool = False, shape: tuple[int, ...] | None = None) -> str | None:
        """See ``Exporter.refusal``."""
        if self._layout is None:
            return None
        if experts:
            return "transformers keeps experts in one tensor and cannot load them packed; option experts: none"
        return self._layout.refusal(scheme, shape)

    def check(self, model: Model) -> None:
        """See ``Exporter.check``.

        Raises:
            UnsupportedError: The family's linears are no ``Linear`` in transformers (GPT-2), which cannot load them.
        """
        if self._layout is not None and model.arch.transposed:
            raise UnsupportedError(
                f"{model.arch.name} keeps its linears as Conv1D, which {self.format} does not know",
                hint="export it with format: safetensors",
            )

    def longest(self, model: Model) -> int | None:
        """See ``Exporter.longest``: what a table of learned positions allows."""
        return None if model.decoder.positions is None else model.decoder.max_positions

    def estimate(self, model: Model) -> int:
        """See ``Exporter.estimate``: floats in ``dtype``, quantized weights as they are, or as floats too."""
        width = _DTYPES[self.dtype or _own_dtype(model)].itemsize
        return sum(
            weight.nbytes if isinstance(weight, QuantWeight) and self._layout else width * prod(weight.shape)
            for weight in model.weights.values()
        )

    def export(self, model: Model, directory: Path, context: PassContext) -> tuple[CheckpointEntry, list[PassRecord]]:
        """See ``Exporter.export`` and ``write``."""
        return self.write(model, directory / self.folder, context), []

    def write(self, model: Model, folder: Path, context: PassContext) -> CheckpointEntry:
        """Write the checkpoint into ``folder``, which is made unless it is there and empty.

        Raises:
            UnsupportedError: The format cannot have all of the model's quantized weights in one checkpoint.
        """
        dtype = _DTYPES[self.dtype or _own_dtype(model)]
        packed = {} if self._layout is None else packed_linears(model)
        if self._layout is not None and (reason := self._layout.model_refusal(packed)) is not None:
            raise UnsupportedError(reason)
        folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint_files(self._parts(model, packed, dtype), folder, progress=context.progress)
        quantization = self._layout.config(model, packed) if self._layout is not None and packed else None
        _write_config(model, folder, dtype, quantization)
        if quantization is not None and self._layout is not None and self._layout.side_file is not None:
            _write_json(quantization, folder / self._layout.side_file)
        for path in sorted(model.source.tokenizer_dir.iterdir()):
            if path.name != "config.json":
                shutil.copyfile(path, folder / path.name)
        notes = list(self._notes(model, packed, dtype))
        return CheckpointEntry(path=folder.name, format=self.format, dtype=_name(dtype), notes=notes)

    @property
    def _layout(self) -> Layout | None:
        """How quantized linears are stored; None: as floats."""
        return _LAYOUTS.get(self.format)

    def _scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if self._layout is None else self._layout.scale_dtype or dtype

    def _parts(self, model: Model, packed: Mapping[str, QuantWeight], dtype: torch.dtype) -> Iterator[Part]:
        for name, weight in model.weights.items():
            module = name.removesuffix(".weight")
            if self._layout is not None and module in packed:
                yield self._layout.part(module, packed[module], self._scale_dtype(dtype))
            else:
                yield _float_part(name, weight, dtype, transposed=_is_transposed(model, name))

    def _notes(self, model: Model, packed: Mapping[str, QuantWeight], dtype: torch.dtype) -> Iterator[str]:
        """What is not as the passes left it."""
        quantized = {name for name, weight in model.weights.items() if isinstance(weight, QuantWeight)}
        if not quantized and self._layout is not None:
            yield "nothing is quantized: this is a plain checkpoint"
        in_float = sorted(quantized - {model.weight_of(module) for module in packed})
        if in_float:
            others = f" and {len(in_float) - 1} more" if len(in_float) > 1 else ""
            yield f"written as the floats they stand for: {in_float[0]}{others}"
        rounded = sum(weight.dtype is not dtype for weight in model.weights.values() if isinstance(weight, DenseWeight))
        if rounded and dtype is not torch.float32:
            yield f"{rounded} tensors in float are rounded to {_name(dtype)}; dtype: float32 keeps them"
        if packed and (scales := self._scale_dtype(dtype)) is not torch.float32:
            kept = "" if scales is not dtype else "; dtype: float32 keeps those of 32 bits"
            yield f"scales are stored in {_name(scales)}{kept}"


def _float_part(name: str, weight: DenseWeight | QuantWeight, dtype: torch.dtype, *, transposed: bool) -> Part:
    def blocks() -> Iterator[Tensor]:
        if transposed:
            yield weight.dense().T.to(dtype)
        elif isinstance(weight, QuantWeight):
            yield from (block.to(dtype) for block in weight.dense_blocks())
        elif weight.shape:
            yield from (block.to(dtype) for block in weight.blocks())
        else:
            yield weight.load().to(dtype)

    return Part({name: (dtype, weight.shape[::-1] if transposed else weight.shape)}, blocks)


def _is_transposed(model: Model, name: str) -> bool:
    layer = re.escape(model.arch.layer).replace(re.escape("{i}"), "[0-9]+")
    match = re.fullmatch(f"{layer}[.](.+)[.]weight", name)
    return match is not None and match[1] in model.arch.transposed


def _own_dtype(model: Model) -> _Name:
    """The config's dtype, float32 where it names none that is written here."""
    named = str(model.config.get("dtype") or model.config.get("torch_dtype")).removeprefix("torch.")
    return next((name for name in _DTYPES if name == named), "float32")


def _name(dtype: torch.dtype) -> _Name:
    return next(name for name, each in _DTYPES.items() if each is dtype)


def _write_config(model: Model, folder: Path, dtype: torch.dtype, quantization: dict[str, Any] | None) -> None:
    """The model's own config, with what was changed about it."""
    config = {name: value for name, value in model.config.items() if name not in ("torch_dtype", "quantization_config")}
    config |= {"dtype": _name(dtype), "tie_word_embeddings": model.is_tied}
    if quantization is not None:
        config["quantization_config"] = quantization
    _write_json(config, folder / "config.json")


def _write_json(value: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
