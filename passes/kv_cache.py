"""An int8 KV cache: a quarter of the memory of a float one, with scales from what the model writes into it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from llmopt.calibration.layerwise import through_layers
from llmopt.calibration.reference import Reference
from llmopt.optimizer.contracts import Feature, PassContext, WeightPass
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import DenseWeight, Model, Weight

__all__ = ["KvCache"]

_HEAD_MULTIPLE = 8
"""Columns of a head, of which kernels of quantized caches take a multiple."""


class KvCache(WeightPass):
    """Store keys and values as int8, rounded on scales that a text has shown to be wide enough.

    The scales belong to the keys and values of this very model: put passes that change those, as rotate, rescale and
    smoothquant do, before this one.
    """

    needs_calibration: ClassVar[bool] = True

    strategy: Literal["channel", "tensor"] = Field(
        "channel", description="What shares one scale: a channel of a KV head, or all keys, and all values, of a layer."
    )

    @property
    def adds(self) -> frozenset[Feature]:
        """See ``WeightPass.adds``."""
        return frozenset({"an int8 cache" if self.strategy == "tensor" else "an int8 cache with a scale per channel"})

    def fits(self, model: Model) -> None:
        """See ``WeightPass.fits``: kernels take its heads."""
        for layer in model.decoder.layers:
            if layer.attention.head_dim % _HEAD_MULTIPLE:
                raise PassError(
                    f"{layer.name} has heads of {layer.attention.head_dim} columns; kernels of int8 caches take a "
                    f"multiple of {_HEAD_MULTIPLE}",
                    hint="leave kv_cache out",
                )

    def requires(self, model: Model) -> None:
        """See ``WeightPass.requires``."""
        super().requires(model)
        if model.cache_scales(0) is not None:
            raise PassError("the cache is already quantized", hint="one kv_cache pass is enough")

    def run(self, model: Model, context: PassContext) -> Model:
        """See ``WeightPass.run``. Records the largest magnitude of each layer's keys, and of its values."""
        largest = _Largest(model, context)
        scales: dict[str, Weight] = {}
        for index, layer in enumerate(model.decoder.layers):
            for name, maxima in zip(layer.attention.cache_scales, largest.of(index), strict=True):
                scales[name] = DenseWeight.of(self._scale(maxima))
        context.detail(
            "largest", {name: round(float(weight.dense().max()) * 127, 4) for name, weight in scales.items()}
        )
        return model.with_weights(context.keep(scales))

    def _scale(self, largest: Tensor) -> Tensor:
        """Float32 ``[kv_heads * head_dim]`` or ``[1]`` from magnitudes ``[kv_heads, head_dim]``; 1 where all are 0."""
        shared = largest.max()[None] if self.strategy == "tensor" else largest.flatten()
        return torch.where(shared > 0, shared / 127, torch.ones_like(shared))


class _Largest:
    """The largest magnitude of each channel of each layer's keys and values, while the model reads a text."""

    def __init__(self, model: Model, context: PassContext) -> None:
        self._model = model
        self._found: dict[int, tuple[Tensor, Tensor]] = {}
        self._mask = torch.ones(0)
        reference = Reference(model, threads=context.threads, keys_values=self._look)
        through_layers(reference, context, watching=self._watching, progress=context.progress)

    def of(self, index: int) -> tuple[Tensor, Tensor]:
        """Of keys and of values, each float32 ``[kv_heads, head_dim]``."""
        return self._found[index]

    @contextmanager
    def _watching(self, mask: Tensor) -> Iterator[None]:
        """Look at the tokens ``mask``, bool ``[n, t]``, says."""
        self._mask = mask
        yield

    def _look(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Remember the magnitudes of keys and values ``[n, kv_heads, t, head_dim]`` where there is text."""
        maxima = self._maxima(index, keys), self._maxima(index, values)
        before = self._found.get(index, maxima)
        self._found[index] = (torch.maximum(before[0], maxima[0]), torch.maximum(before[1], maxima[1]))
        return keys, values

    def _maxima(self, index: int, x: Tensor) -> Tensor:
        if not x.isfinite().all():
            name = self._model.decoder.layers[index].name
            raise PassError(f"{name}: keys or values are not finite", hint="the checkpoint is damaged")
        seen = x.transpose(1, 2)[self._mask]  # [tokens, kv_heads, head_dim], in Falcon each head several times
        return seen.reshape(len(seen), self._model.decoder.kv_heads, -1, x.shape[3]).abs().amax((0, 2))
