"""GPTQ checkpoints, which GPTQModel, vLLM and transformers load: integers packed along the input columns.

Layout: see ``optimizer/quantized/gptq.py``, which reads what this writes.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llmopt.exporters.checkpoint.layout import Layout, linears_in_float
from llmopt.exporters.checkpoint.shards import Part
from llmopt.optimizer.bit_stream import packed as stream
from llmopt.optimizer.bit_stream import unsigned
from llmopt.optimizer.model import Model, QuantWeight
from llmopt.optimizer.scheme import QuantSpec, Scheme

__all__ = ["Gptq"]


@dataclass(frozen=True)
class Gptq(Layout):
    """Integers of 2, 3, 4 or 8 bits with a scale per channel or group, in float16.

    Attributes:
        version: ``gptq`` stores zero points less one, ``gptq_v2`` as they are.
    """

    version: Literal["gptq", "gptq_v2"]

    scale_dtype = torch.float16

    @property
    def side_file(self) -> str:
        """See ``Layout.side_file``."""
        return "quantize_config.json"

    def refusal(self, scheme: Scheme, shape: tuple[int, ...] | None = None) -> str | None:
        """See ``Layout.refusal``."""
        spec = scheme.weights
        if scheme.input_activations is not None or spec.type != "int" or spec.strategy not in ("channel", "group"):
            return "GPTQ checkpoints hold integers with a scale per channel or group, and leave inputs in float"
        if self.version == "gptq" and not spec.symmetric:
            return (
                "version 1 of GPTQ's format has no zero point of 0, and vLLM takes symmetric integers only; "
                "format: gptq_v2 has it, for GPTQModel"
            )
        if shape is not None and any(size * spec.num_bits % 32 for size in shape):
            return f"GPTQ packs rows and columns in words of 32 bits, and this weight is {shape[0]}x{shape[1]}"
        return None

    def part(self, module: str, weight: QuantWeight, dtype: torch.dtype) -> Part:
        """See ``Layout.part``."""
        spec, (rows, columns) = weight.scheme.weights, weight.shape
        bits, groups = spec.num_bits, weight.groups

        def blocks() -> Iterator[Tensor]:
            stored = weight.load()
            yield stream(unsigned(stored.values, bits), bits).T
            zero = torch.zeros(rows, groups, dtype=torch.int8) if stored.zero is None else stored.zero
            points = unsigned(zero, bits).T.contiguous() - (1 if self.version == "gptq" else 0)
            yield stream(points, bits)
            yield stored.scale.T.to(dtype)
            size = columns // groups
            index = torch.arange(columns, dtype=torch.int32) // size
            yield index if stored.group_index is None else stored.group_index

        return Part(
            {
                f"{module}.qweight": (torch.int32, (columns * bits // 32, rows)),
                f"{module}.qzeros": (torch.int32, (groups, rows * bits // 32)),
                f"{module}.scales": (dtype, (groups, rows)),
                f"{module}.g_idx": (torch.int32, (columns,)),
            },
            blocks,
        )

    def config(self, model: Model, packed: Mapping[str, QuantWeight]) -> dict[str, Any]:
        """See ``Layout.config``: the first scheme, and in ``dynamic`` the modules that differ from it."""
        schemes = [weight.scheme.weights for weight in packed.values()]
        first, head = schemes[0], model.arch.head
        dynamic: dict[str, dict[str, Any]] = {
            f"-:^{re.escape(module)}$": {} for module in linears_in_float(model, packed) if module != head
        }
        for module, weight in packed.items():
            if weight.scheme.weights != first:
                dynamic[f"+:^{re.escape(module)}$"] = _settings(weight.scheme.weights)
        return {
            "quant_method": "gptq",
            **_settings(first),
            "desc_act": any(weight.has_group_index for weight in packed.values()),
            "static_groups": True,
            "lm_head": head in packed,
            "checkpoint_format": self.version,
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
        }


def _settings(spec: QuantSpec) -> dict[str, Any]:
    return {"bits": spec.num_bits, "group_size": spec.group_size or -1, "sym": spec.symmetric}
