"""Hugging Face's own FP8 checkpoints with a scale for each block, as DeepSeek's are.

Layout: see ``optimizer/quantized/fp8.py``, which reads what this writes.
"""

from collections.abc import Iterator, Mapping
from operator import mod
from typing import Any

import torch
from torch import Tensor

from llmopt.exporters.checkpoint.layout import Layout, linears_in_float
from llmopt.exporters.checkpoint.shards import Part
from llmopt.optimizer.model import Model, QuantWeight
from llmopt.optimizer.scheme import PRESETS, Scheme

__all__ = ["Fp8"]

_BLOCK = PRESETS["FP8_BLOCK"]


class Fp8(Layout):
    """FP8_BLOCK alone: ``weight`` E4M3 ``[out, in]``, ``weight_scale_inv`` float32, a scale for each block."""

    scale_dtype = torch.float32

    def refusal(self, scheme: Scheme, shape: tuple[int, ...] | None = None) -> str | None:
        """See ``Layout.refusal``."""
        if scheme != _BLOCK:
            return "Hugging Face's FP8 checkpoints hold FP8_BLOCK and floats; format: compressed-tensors holds others"
        blocks = _BLOCK.weights.block_structure
        assert blocks is not None
        if shape is not None and any(map(mod, shape, blocks)):
            return f"its loaders take whole blocks of 128x128 only, and this weight is {shape[0]}x{shape[1]}"
        return None

    def part(self, module: str, weight: QuantWeight, dtype: torch.dtype) -> Part:
        """See ``Layout.part``."""

        def blocks() -> Iterator[Tensor]:
            stored = weight.load()
            yield stored.values
            yield stored.scale.to(dtype)

        scales = weight.scheme.weights.scale_shape(*weight.shape)
        return Part(
            {
                f"{module}.weight": (torch.float8_e4m3fn, weight.shape),
                f"{module}.weight_scale_inv": (dtype, scales),
            },
            blocks,
        )

    def config(self, model: Model, packed: Mapping[str, QuantWeight]) -> dict[str, Any]:
        """See ``Layout.config``."""
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": list(_BLOCK.weights.block_structure or ()),
            "modules_to_not_convert": linears_in_float(model, packed),
        }
