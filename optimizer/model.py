"""The model that passes take and return: names, configuration, and weights that are read only when asked for."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from llmopt.optimizer.arch.base import Arch
from llmopt.optimizer.decoder import Decoder
from llmopt.optimizer.resolver import describe
from llmopt.optimizer.scheme import Scheme

__all__ = ["DenseWeight", "Model", "QuantTensors", "QuantWeight", "RowLoader", "Source", "Weight"]


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

    def dense_blocks(self) -> Iterator[Tensor]:
        """The values in float32, a few rows at a time."""
        yield from (block.to(torch.float32) for block in self.blocks())

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
        values: int8 ``[out, in]``, signed, within the scheme's range.
        scale: float32 ``[out, groups]``; one group when the scale is per channel.
        zero: int8 ``[out, groups]``, signed; None when symmetric.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None

    def dense(self) -> Tensor:
        """The values the integers stand for: float32 ``[out, in]``, ``(values - zero) * scale``."""
        rows, groups = self.scale.shape
        integers = self.values.to(torch.float32).reshape(rows, groups, -1)
        if self.zero is not None:
            integers = integers - self.zero.to(torch.float32)[:, :, None]
        return (integers * self.scale[:, :, None]).reshape(self.values.shape)

    def rows(self, index: slice | Tensor) -> "QuantTensors":
        """The tensors of some rows."""
        return QuantTensors(self.values[index], self.scale[index], None if self.zero is None else self.zero[index])


@dataclass(frozen=True, slots=True)
class QuantWeight:
    """A quantized linear weight: exactly the numbers that will be stored. Exporters pack them, never requantize.

    Attributes:
        shape: ``(out, in)``.
        scheme: How it was made, including what its input activations become.
        load: Reads its tensors, fresh or memory-mapped. The caller must not write to them.
    """

    shape: tuple[int, ...]
    scheme: Scheme
    load: Callable[[], QuantTensors]

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.shape[1] // (self.scheme.weights.group_size or self.shape[1])

    @property
    def nbytes(self) -> int:
        """Size when packed, in bytes: values at ``num_bits`` each, scales, zero points."""
        spec, scales = self.scheme.weights, self.shape[0] * self.groups
        zeros = 0 if spec.symmetric else scales
        return (self.shape[0] * self.shape[1] + zeros) * spec.num_bits // 8 + scales * torch.float32.itemsize

    def dense(self) -> Tensor:
        """The values the integers stand for: float32 ``[out, in]``."""
        return self.load().dense()

    def dense_blocks(self) -> Iterator[Tensor]:
        """See ``DenseWeight.dense_blocks``."""
        yield from (self.load().rows(slice(*rows)).dense() for rows in _row_blocks(self.shape))

    @staticmethod
    def of(values: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> "QuantWeight":
        """A weight around tensors already in memory."""
        tensors = QuantTensors(values, scale, zero)
        return QuantWeight(tuple(values.shape), scheme, lambda: tensors)


Weight = DenseWeight | QuantWeight


def _row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The first row and the row past the end of each block of at most ``_BLOCK_BYTES``, or of one row."""
    rows, row_bytes = shape[0], torch.Size(shape[1:]).numel() * torch.float32.itemsize
    step = max(1, _BLOCK_BYTES // row_bytes)
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
    """

    spec: str
    digest: str
    files: Mapping[str, str]
    tokenizer_dir: Path


@dataclass(frozen=True)
class Model:
    """A checkpoint under its own Hugging Face parameter names.

    Attributes:
        arch: The family's description.
        config: The Hugging Face ``config.json``.
        weights: Parameter name, as ``model.layers.0.mlp.up_proj.weight``, -> weight. With tied embeddings there
            is no ``lm_head.weight``: the head uses the embedding's entry.
        source: Where it came from.
    """

    arch: Arch
    config: Mapping[str, Any]
    weights: Mapping[str, Weight]
    source: Source

    def with_weights(self, changed: Mapping[str, Weight]) -> "Model":
        """This model with some weights replaced or added; the rest is shared."""
        return replace(self, weights=MappingProxyType({**self.weights, **changed}))

    @cached_property
    def decoder(self) -> Decoder:
        """What it computes: names and numbers."""
        return describe(self.arch, self.config, self.weights.keys())

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.decoder.layers)

    @property
    def is_tied(self) -> bool:
        """Whether the head uses the embedding's table."""
        return f"{self.arch.head}.weight" not in self.weights

    def weight_of(self, module: str) -> str:
        """The parameter name of a linear module's weight; the head of a tied model has the embedding's."""
        if module == self.arch.head and self.is_tied:
            return f"{self.arch.embedding}.weight"
        return f"{module}.weight"

    def linears(self) -> list[str]:
        """Module names of every linear layer in data order, the head last."""
        return list(self.decoder.linears)
