"""The model that passes take and return: names, configuration, and weights that are read only when asked for."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from llmopt.optimizer.arch.base import Arch
from llmopt.optimizer.basis import Basis, followed
from llmopt.optimizer.decoder import Decoder
from llmopt.optimizer.encoder import Encoder, EncoderArch, describe_encoder
from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.grid import from_grid, spread
from llmopt.optimizer.pooling import Pooling
from llmopt.optimizer.resolver import describe
from llmopt.optimizer.scheme import Scheme

__all__ = ["DECODERS_ONLY", "DenseWeight", "Model", "QuantTensors", "QuantWeight", "RowLoader", "Source", "Weight"]


DECODERS_ONLY = "encoders take round_to_nearest and the exporter onnx"
"""The hint where something is not for encoders."""

_BLOCK_BYTES = 32 << 20
"""Of the rows read at a time, were they float32."""


@runtime_checkable
class RowLoader(Protocol):
    """What a weight's ``load`` is where some of its rows can be read without the others."""

    def __call__(self) -> Tensor:
        """The whole tensor."""

    def rows(self, first: int, past_end: int) -> Tensor:
        """Rows ``first .. past_end - 1`` of the first dimension; nothing else is read."""


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A floating-point tensor that stays on disk until ``load()``.

    Attributes:
        shape: Linear weights are ``[out, in]``.
        dtype: As stored.
        load: Reads it: a fresh or memory-mapped tensor of that shape and dtype. The caller must not write to it.
            Where it is a ``RowLoader``, a large table is read a few rows at a time.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size as stored, in bytes."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    def dense(self) -> Tensor:
        """The values in float32."""
        return self.load().to(torch.float32)

    def rows(self, first: int, past_end: int) -> Tensor:
        """The rows ``first .. past_end - 1`` as stored."""
        return self._reader()(first, past_end)

    def blocks(self) -> Iterator[Tensor]:
        """The tensor as stored, a few rows at a time: a large table need never be in memory whole."""
        read = self._reader()
        yield from (read(*rows) for rows in _row_blocks(self.shape))

    def dense_blocks(self, *, multiple: int = 1) -> Iterator[Tensor]:
        """The values in float32, a few rows at a time: a multiple of ``multiple``, but for the last ones."""
        read = self._reader()
        yield from (read(*rows).to(torch.float32) for rows in _row_blocks(self.shape, multiple))

    def _reader(self) -> Callable[[int, int], Tensor]:
        if isinstance(self.load, RowLoader):
            return self.load.rows
        whole = self.load()
        return lambda first, past_end: whole[first:past_end]

    @staticmethod
    def of(tensor: Tensor) -> "DenseWeight":
        """A weight around a tensor already in memory."""
        return DenseWeight(tuple(tensor.shape), tensor.dtype, lambda: tensor)


class QuantTensors(NamedTuple):
    """The tensors of a quantized linear weight.

    Attributes:
        values: int8, signed, within the scheme's range, or float8_e4m3fn: ``[out, in]``.
        scale: float32, one for each equal part of a row, ``[out, groups]``; ``[1, 1]`` when all share one.
        zero: int8, signed, of the shape of ``scale``; None when symmetric.
        input_scale: float32 ``[1]``, of inputs that are rounded on a scale known in advance; None for others.
        block: Rows and columns that share a scale, ``[ceil(out/rows), ceil(in/columns)]`` of them; None: as above.
        group_index: int32 ``[in]``, the group of each column, where the columns of a group lie apart, as in GPTQ
            checkpoints quantized in the order of activations; None: a group is the next equal part of a row.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None
    input_scale: Tensor | None = None
    block: tuple[int, int] | None = None
    group_index: Tensor | None = None

    def dense(self) -> Tensor:
        """The values the numbers stand for: float32 ``[out, in]``, ``(values - zero) * scale``."""
        rows, columns = self.values.shape
        if self.group_index is not None:
            zero = None if self.zero is None else self.zero[:, self.group_index]
            return from_grid(self.values, self.scale[:, self.group_index], zero)
        if self.block is not None:
            scale = spread(self.scale, self.block, (rows, columns))
            zero = None if self.zero is None else spread(self.zero, self.block, (rows, columns))
            return from_grid(self.values, scale, zero)
        values = self.values.reshape(rows, self.scale.shape[1], -1)
        zero = None if self.zero is None else self.zero[:, :, None]
        return from_grid(values, self.scale[:, :, None], zero).reshape(rows, columns)

    def by_row(self) -> "QuantTensors":
        """The same with scales of each row, ``[out, groups]``; the last group of a row may be narrower."""
        rows = len(self.values)
        height, block = (rows, None) if self.block is None else (self.block[0], (1, self.block[1]))

        def each(part: Tensor) -> Tensor:
            return part.repeat_interleave(height, 0)[:rows] if len(part) < rows else part

        zero = None if self.zero is None else each(self.zero)
        return self._replace(scale=each(self.scale), zero=zero, block=block)

    def by_group(self) -> "tuple[QuantTensors, Tensor | None]":
        """The same with the columns of a group beside each other, and their order: int64 ``[in]``, or None as it was.

        Column i of the result is column ``order[i]`` of this.
        """
        if self.group_index is None:
            return self, None
        order = self.group_index.argsort(stable=True)
        return self._replace(values=self.values[:, order], group_index=None), order

    def rows(self, index: slice | Tensor) -> "QuantTensors":
        """The tensors of some rows, with scales of each row."""
        each = self.by_row()
        zero = None if each.zero is None else each.zero[index]
        return each._replace(values=each.values[index], scale=each.scale[index], zero=zero)


@dataclass(frozen=True, slots=True)
class QuantWeight:
    """A quantized linear weight: exactly the numbers that will be stored. Exporters pack them, never requantize.

    Attributes:
        shape: ``(out, in)``.
        scheme: How it was made, including what its input activations become.
        load: Reads its tensors, fresh or memory-mapped. The caller must not write to them.
        has_group_index: Whether the columns of a group lie apart, see ``QuantTensors``.
    """

    shape: tuple[int, int]
    scheme: Scheme
    load: Callable[[], QuantTensors]
    has_group_index: bool = False

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.scheme.weights.scale_shape(*self.shape)[1]

    @property
    def nbytes(self) -> int:
        """Size when packed, in bytes: values at ``num_bits`` each, scales, zero points, the groups of columns."""
        spec, floats = self.scheme.weights, math.prod(self.scheme.weights.scale_shape(*self.shape))
        zeros = 0 if spec.symmetric else floats
        floats += self.scheme.needs_input_scale
        index = self.shape[1] * torch.int32.itemsize if self.has_group_index else 0
        return (self.shape[0] * self.shape[1] + zeros) * spec.num_bits // 8 + floats * torch.float32.itemsize + index

    def dense(self) -> Tensor:
        """The values the numbers stand for: float32 ``[out, in]``."""
        return self.load().dense()

    def dense_blocks(self, *, multiple: int = 1) -> Iterator[Tensor]:
        """See ``DenseWeight.dense_blocks``."""
        yield from (self.load().rows(slice(*rows)).dense() for rows in _row_blocks(self.shape, multiple))

    @staticmethod
    def of(tensors: QuantTensors, scheme: Scheme) -> "QuantWeight":
        """A weight around tensors already in memory."""
        rows, columns = tensors.values.shape
        return QuantWeight((rows, columns), scheme, lambda: tensors, tensors.group_index is not None)


Weight = DenseWeight | QuantWeight


def _row_blocks(shape: tuple[int, ...], multiple: int = 1) -> Iterator[tuple[int, int]]:
    """The first row and the row past the end of each block of at most ``_BLOCK_BYTES``, or of ``multiple`` rows."""
    rows, row_bytes = shape[0], torch.Size(shape[1:]).numel() * torch.float32.itemsize
    step = max(1, _BLOCK_BYTES // row_bytes // multiple) * multiple
    yield from ((first, min(first + step, rows)) for first in range(0, rows, step))


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model came from.

    Attributes:
        spec: The recipe's ``model:`` text.
        digest: sha256 over the digests of all files read, hexadecimal.
        files: Name of each file -> its sha256.
        tokenizer_dir: Holds tokenizer.json, tokenizer_config.json and, where the model has them,
            chat_template.jinja and generation_config.json.
        notes: What of the files is not in the model.
    """

    spec: str
    digest: str
    files: Mapping[str, str]
    tokenizer_dir: Path
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """A checkpoint under its own Hugging Face parameter names: of a decoder, or of an encoder.

    Attributes:
        family: The family's description.
        config: The Hugging Face ``config.json``.
        weights: Parameter name, as ``model.layers.0.mlp.up_proj.weight``, -> weight. With tied embeddings there
            is no ``lm_head.weight``: the head uses the embedding's entry.
        source: Where it came from.
        pooling: How an encoder's vectors become one; of no meaning for a decoder.
        bases: What passes did to the inputs and outputs of linears and tables, by module; those that are not here stand
            as in the checkpoint. Adapters trained on that follow it.
    """

    family: Arch | EncoderArch
    config: Mapping[str, Any]
    weights: Mapping[str, Weight]
    source: Source
    pooling: Pooling = field(default_factory=Pooling)
    bases: Mapping[str, Basis] = field(default_factory=dict)

    def with_weights(self, changed: Mapping[str, Weight]) -> "Model":
        """This model with some weights replaced or added; the rest is shared."""
        return replace(self, weights=MappingProxyType({**self.weights, **changed}))

    def with_bases(self, later: Mapping[str, Basis]) -> "Model":
        """This model with what was done to some modules behind what had been done to them; weights are as they were."""
        return replace(self, bases=MappingProxyType(followed(self.bases, later)))

    @property
    def is_encoder(self) -> bool:
        """Whether it makes vectors of texts; else it continues them."""
        return isinstance(self.family, EncoderArch)

    @property
    def arch(self) -> Arch:
        """The family's description, of a decoder.

        Raises:
            UnsupportedError: It is an encoder.
        """
        if isinstance(self.family, EncoderArch):
            raise UnsupportedError(f"{self.family.name} is an encoder, and this needs a decoder", hint=DECODERS_ONLY)
        return self.family

    @cached_property
    def decoder(self) -> Decoder:
        """What a decoder computes: names and numbers.

        Raises:
            UnsupportedError: It is an encoder.
        """
        return describe(self.arch, self.config, self.weights.keys())

    @cached_property
    def encoder(self) -> Encoder:
        """The parts of an encoder: names and numbers."""
        assert isinstance(self.family, EncoderArch)
        return describe_encoder(self.family, self.config, self.weights.keys())

    @property
    def network(self) -> Decoder | Encoder:
        """What decoders and encoders have in common: layers of linears, and an embedding."""
        return self.encoder if self.is_encoder else self.decoder

    @property
    def num_layers(self) -> int:
        """Layers."""
        return len(self.network.layers)

    @property
    def is_tied(self) -> bool:
        """Whether the head uses the embedding's table; an encoder has no head."""
        return not self.is_encoder and f"{self.arch.head}.weight" not in self.weights

    def cache_scales(self, index: int) -> tuple[Weight, Weight] | None:
        """The scales of layer ``index``'s cached keys and values, float32 ``[kv_heads * head_dim]`` or ``[1]``.

        A cached number is ``round(x / scale)`` within -128..127. None where the cache is in float; then it is in all
        layers.
        """
        keys, values = self.decoder.layers[index].attention.cache_scales
        return (self.weights[keys], self.weights[values]) if keys in self.weights else None

    def weight_of(self, module: str) -> str:
        """The parameter name of a linear module's weight; the head of a tied model has the embedding's."""
        if self.is_tied and module == self.network.head:
            return f"{self.network.embedding}.weight"
        return f"{module}.weight"

    def input_rotation(self, module: str) -> Weight | None:
        """The orthogonal float32 ``[b, b]`` that what enters ``module`` is multiplied with first, block by block.

        Then the module's weight is that of the rotated input: ``y = (x R) (W R)^T``. None where nothing is rotated.
        """
        return self.weights.get(f"{module}.input_rotation")

    def linears(self) -> list[str]:
        """Module names of every linear layer in data order, the head last."""
        return list(self.network.linears)
