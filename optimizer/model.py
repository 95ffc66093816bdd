"""The model that passes take and return: names, configuration, and weights that are read only when asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from llmopt.optimizer.arch.base import Arch
from llmopt.optimizer.decoder import Decoder, describe
from llmopt.optimizer.scheme import Scheme

__all__ = ["DenseWeight", "Model", "QuantWeight", "Source", "Weight"]


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A floating-point tensor that stays on disk until ``load()``.

    Attributes:
        shape: Linear weights are ``[out, in]``.
        dtype: As stored.
        load: Reads it: a fresh or memory-mapped tensor of that shape and dtype. The caller must not write to it.
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

    @staticmethod
    def of(tensor: Tensor) -> "DenseWeight":
        """A weight around a tensor already in memory."""
        return DenseWeight(tuple(tensor.shape), tensor.dtype, lambda: tensor)


@dataclass(frozen=True, slots=True)
class QuantWeight:
    """A quantized linear weight: exactly the numbers that will be stored. Exporters pack them, never requantize.

    Attributes:
        values: int8 ``[out, in]``, signed, within the scheme's range.
        scale: float32 ``[out, groups]``; one group when the scale is per channel.
        zero: int8 ``[out, groups]``, signed; None when symmetric.
        scheme: How it was made, including what its input activations become.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: Scheme

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)``."""
        return tuple(self.values.shape)

    @property
    def nbytes(self) -> int:
        """Size when packed, in bytes: values at ``num_bits`` each, scales, zero points."""
        bits = self.scheme.weights.num_bits
        zeros = 0 if self.zero is None else self.zero.numel() * bits
        return (self.values.numel() * bits + zeros) // 8 + self.scale.numel() * self.scale.itemsize

    def dense(self) -> Tensor:
        """The values the integers stand for: float32 ``[out, in]``, ``(values - zero) * scale``."""
        rows, groups = self.scale.shape
        integers = self.values.to(torch.float32).reshape(rows, groups, -1)
        if self.zero is not None:
            integers = integers - self.zero.to(torch.float32)[:, :, None]
        return (integers * self.scale[:, :, None]).reshape(self.values.shape)


Weight = DenseWeight | QuantWeight


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
