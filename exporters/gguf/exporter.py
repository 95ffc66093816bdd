"""A GGUF file for llama.cpp and Ollama: integers as they are where its blocks have their grid, floats in a type."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from pydantic import Field
from torch import Tensor

from llmopt.exporters.gguf import blocks
from llmopt.exporters.gguf.families import Family, family_of, ignored_window, write_numbers
from llmopt.exporters.gguf.modelfile import modelfile
from llmopt.exporters.gguf.tokenizer import read_vocabulary, write_vocabulary
from llmopt.optimizer.contracts import Exporter, Feature, PassContext
from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.gguf_file import llama3_factors
from llmopt.optimizer.hf_config import read_json
from llmopt.optimizer.manifest import Checkpoint, PassRecord
from llmopt.optimizer.model import Model, QuantWeight, Weight
from llmopt.optimizer.scheme import Scheme
from llmopt.optimizer.target import Target

__all__ = ["Gguf"]

_Type = Literal["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]

_FEW_BITS = ("Q5_1", "Q5_0", "Q4_1", "Q4_0")

_ROPE_FACTORS = "rope_freqs.weight"


class Gguf(Exporter):
    """Write ``gguf/model-TYPE.gguf`` with tokenizer and chat template, and a ``Modelfile`` for Ollama.

    Quantized weights keep their integers: 4 bits in groups of a multiple of 32 columns become Q4_0, with zero points
    Q4_1, and symmetric 8 bits Q8_0. Weights in float are rounded to ``type`` as llama.cpp rounds; norms and biases stay
    in float32.
    """

    type: _Type = Field(
        "Q8_0", description="Of linears in float. Those that passes have quantized keep their integers."
    )
    embedding: _Type | None = Field(
        None, description="Of embedding and head in float. Omitted: the type, but Q8_0 under types of 4 and 5 bits."
    )
    pre_tokenizer: str | None = Field(
        None, description="llama.cpp's name of how the tokenizer splits text. Omitted: told by tokenizer.json."
    )

    @property
    def folder(self) -> str:
        """See ``Exporter.folder``."""
        return "gguf"

    @property
    def holds(self) -> frozenset[Feature]:
        """See ``Exporter.holds``: nothing beside weights."""
        return frozenset()

    def executors(self) -> list[Target]:
        """See ``Exporter.executors``: none, other programs execute it."""
        return []

    def refusal(self, scheme: Scheme, *, experts: bool = False, shape: tuple[int, ...] | None = None) -> str | None:
        """See ``Exporter.refusal``."""
        return "experts are not written as GGUF" if experts else blocks.refusal(scheme, shape)

    def check(self, model: Model) -> None:
        """See ``Exporter.check``.

        Raises:
            UnsupportedError: The family or the tokenizer has no form in GGUF that is known here.
        """
        family_of(model)
        read_vocabulary(model.source.tokenizer_dir, model.decoder.vocab_size, pre=self.pre_tokenizer)

    def estimate(self, model: Model) -> int:
        """See ``Exporter.estimate``."""
        return sum(tensor.nbytes for tensor in self._tensors(model, family_of(model)))

    def export(self, model: Model, directory: Path, context: PassContext) -> tuple[Checkpoint, list[PassRecord]]:
        """See ``Exporter.export`` and ``write``."""
        return self.write(model, directory / self.folder, context), []

    def write(self, model: Model, folder: Path, context: PassContext) -> Checkpoint:
        """Write the file and the ``Modelfile`` into ``folder``, tensor by tensor.

        Raises:
            UnsupportedError: A quantized weight has an order of columns that no block has.
        """
        family = family_of(model)
        if any(each.has_group_index for each in model.weights.values() if isinstance(each, QuantWeight)):
            raise UnsupportedError(
                "GGUF has no place for GPTQ's order of activations (desc_act)", hint="put the pass dequantize first"
            )
        folder.mkdir(parents=True, exist_ok=True)
        path, tensors = folder / f"model-{self.type}.gguf", list(self._tensors(model, family))
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[family.arch])
        self._write_metadata(writer, model, family, folder, path.name)
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.byte_shape, np.dtype(np.uint8), tensor.nbytes, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, tensor in enumerate(tensors):
            _write(writer, tensor)
            context.progress(done + 1, len(tensors))
        writer.close()
        return Checkpoint(path=folder.name, format="gguf", dtype="float16", notes=self._notes(model, tensors))

    def _write_metadata(self, writer: gguf.GGUFWriter, model: Model, family: Family, folder: Path, name: str) -> None:
        source = model.source.tokenizer_dir
        vocabulary = read_vocabulary(source, model.decoder.vocab_size, pre=self.pre_tokenizer)
        template_file = source / "chat_template.jinja"
        template = template_file.read_text("utf-8") if template_file.is_file() else None
        writer.add_type("model")
        writer.add_name(Path(model.source.spec).stem)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES.get(self.type, f"MOSTLY_{self.type}")])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_numbers(writer, model, family)
        write_vocabulary(writer, vocabulary, template)
        generation = read_json(source / "generation_config.json")
        text = modelfile(name, vocabulary, template, generation, context=model.decoder.max_positions)
        (folder / "Modelfile").write_text(text, encoding="utf-8")

    def _tensors(self, model: Model, family: Family) -> Iterator["_Stored"]:
        names = gguf.get_tensor_name_map(family.arch, model.num_layers)
        factors = _rope_factors(model)
        if factors is not None:
            yield _Stored(_ROPE_FACTORS, tuple(factors.shape), Kind.F32, partial(iter, [factors]))
        orders = _row_orders(model) if family.interleaves else {}
        for name, weight in model.weights.items():
            theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if theirs is None:
                raise UnsupportedError(f"llama.cpp has no name for {name} in {family.arch.name} models")
            added = model.arch.norm_offset if name.endswith("norm.weight") else 0.0
            order = orders.get(name.rpartition(".")[0])
            kind = self._kind(model, name, weight)
            yield _Stored(theirs, weight.shape, kind, partial(_blocks, weight, kind, order, added))

    def _kind(self, model: Model, name: str, weight: Weight) -> Kind:
        if isinstance(weight, QuantWeight):
            found = blocks.block_type(weight.scheme)
            assert found is not None, f"{name} was checked"
            return found
        if len(weight.shape) != 2:
            return Kind.F32
        tables = (f"{model.arch.embedding}.weight", f"{model.arch.head}.weight")
        chosen = self._table_type() if name in tables else self.type
        whole = chosen in ("F32", "F16", "BF16") or weight.shape[1] % blocks.BLOCK == 0
        return Kind[chosen] if whole else Kind.F16

    def _table_type(self) -> str:
        return self.embedding or ("Q8_0" if self.type in _FEW_BITS else self.type)

    def _notes(self, model: Model, tensors: list["_Stored"]) -> list[str]:
        notes = []
        quantized = [each for each in model.weights.values() if isinstance(each, QuantWeight)]
        if quantized:
            notes.append("scales, and offsets of zero points, are stored in float16")
        if any(each.scheme.input_activations is not None for each in quantized):
            notes.append("llama.cpp rounds inputs in its own way, to 8 bits for each 32 columns")
        if self.type not in ("F32", "F16", "BF16") and any(each.kind is Kind.F16 for each in tensors):
            notes.append(f"weights whose columns are no multiple of {blocks.BLOCK} are stored in F16")
        if (window := ignored_window(model)) is not None:
            notes.append(f"llama.cpp ignores this family's window: beyond {window} tokens it computes something else")
        return notes


_FILE_TYPES = {"F32": "ALL_F32"}


@dataclass(frozen=True, slots=True)
class _Stored:
    """One tensor of the file.

    Attributes:
        name: llama.cpp's.
        shape: Rows first.
        kind: Its type.
        blocks: Makes its numbers, a few rows at a time: floats, or bytes of blocks.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    blocks: "partial[Iterator[Tensor]]"

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Of its bytes."""
        size, width = gguf.GGML_QUANT_SIZES[self.kind]
        return (*self.shape[:-1], self.shape[-1] // size * width)

    @property
    def nbytes(self) -> int:
        """Of the tensor."""
        return int(np.prod(self.byte_shape))


def _write(writer: gguf.GGUFWriter, tensor: _Stored) -> None:
    """As ``GGUFWriter.write_tensor_data`` does, without the whole tensor in memory."""
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    written = sum(file.write(_bytes(block, tensor.kind)) for block in tensor.blocks())
    assert written == tensor.nbytes, f"{tensor.name} has {written} bytes, not {tensor.nbytes}"
    writer.write_padding(file, tensor.nbytes)


def _bytes(block: Tensor, kind: Kind) -> memoryview:
    if block.dtype == torch.uint8:
        return block.contiguous().numpy().data.cast("B")
    array = gguf.quantize(block.contiguous().numpy(), kind)
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data


def _blocks(weight: Weight, kind: Kind, order: Tensor | None, added: float) -> Iterator[Tensor]:
    """Bytes of a quantized weight, or float32 of another, with its rows in ``order``."""
    if isinstance(weight, QuantWeight):
        tensors = weight.load()
        yield blocks.to_blocks(tensors if order is None else tensors.rows(order), kind, weight.scheme.weights.num_bits)
    elif order is not None or not weight.shape:
        values = weight.dense()
        yield values if order is None else values[order]
    else:
        yield from (block + added if added else block for block in weight.dense_blocks())


def _row_orders(model: Model) -> dict[str, Tensor]:
    """Query and key linears -> where each row of the file comes from: the halves of each head alternate there."""
    orders = {}
    for layer in model.decoder.layers:
        attention = layer.attention
        for module, heads in ((attention.query, attention.heads), (attention.key, attention.kv_heads)):
            if module is not None:
                rows = torch.arange(heads * attention.head_dim).view(heads, 2, -1)
                orders[module] = rows.transpose(1, 2).reshape(-1)
    return orders


def _rope_factors(model: Model) -> Tensor | None:
    """What Llama 3's rope divides frequencies by, which GGUF stores as a tensor; None for other ropes."""
    rope = next((layer.attention.rope for layer in model.decoder.layers if layer.attention.rope is not None), None)
    if rope is None or rope.kind != "llama3":
        return None
    return llama3_factors(rope.dim, rope.theta, rope.parameters)
