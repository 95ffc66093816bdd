"""AWQ checkpoints in the layout ``gemm``, which vLLM, transformers and AutoAWQ's successors load.

Layout: see ``optimizer/quantized/awq.py``, which reads what this writes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from llmopt.exporters.checkpoint.layout import Layout, linears_in_float
from llmopt.exporters.checkpoint.shards import Part
from llmopt.optimizer.bit_stream import unsigned
from llmopt.optimizer.model import Model, QuantWeight
from llmopt.optimizer.quantized.awq import ORDER
from llmopt.optimizer.scheme import Scheme

__all__ = ["Awq"]


class Awq(Layout):
    """Integers of 4 bits in groups of one size, with zero points; those of symmetric weights are all 8."""

    scale_dtype = torch.float16

    def refusal(self, scheme: Scheme, shape: tuple[int, ...] | None = None) -> str | None:
        """See ``Layout.refusal``."""
        spec = scheme.weights
        if scheme.input_activations is not None or (spec.type, spec.num_bits, spec.strategy) != ("int", 4, "group"):
            return "AWQ checkpoints hold 4-bit integers in groups and floats; head: none leaves the head in float"
        if shape is not None and shape[0] % 8:
            return f"AWQ packs rows by 8, and this weight has {shape[0]}"
        return None

    def model_refusal(self, packed: Mapping[str, QuantWeight]) -> str | None:
        """See ``Layout.model_refusal``."""
        sizes = {weight.scheme.weights.group_size for weight in packed.values()}
        if len(sizes) > 1:
            return f"AWQ checkpoints have one group size, not {' and '.join(sorted(map(str, sizes)))}"
        if any(weight.has_group_index for weight in packed.values()):
            return "AWQ checkpoints have no place for GPTQ's order of activations (desc_act); format: gptq has it"
        return None

    def part(self, module: str, weight: QuantWeight, dtype: torch.dtype) -> Part:
        """See ``Layout.part``."""
        (rows, columns), groups = weight.shape, weight.groups

        def blocks() -> Iterator[Tensor]:
            stored = weight.load()
            zero = torch.zeros(rows, groups, dtype=torch.int8) if stored.zero is None else stored.zero
            yield _words(stored.values)
            yield _words(zero)
            yield stored.scale.T.to(dtype)

        return Part(
            {
                f"{module}.qweight": (torch.int32, (columns, rows // 8)),
                f"{module}.qzeros": (torch.int32, (groups, rows // 8)),
                f"{module}.scales": (dtype, (groups, rows)),
            },
            blocks,
        )

    def config(self, model: Model, packed: Mapping[str, QuantWeight]) -> dict[str, Any]:
        """See ``Layout.config``."""
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": next(iter(packed.values())).scheme.weights.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": linears_in_float(model, packed),
        }


def _words(numbers: Tensor) -> Tensor:
    """int8 ``[out, columns]`` as int32 ``[columns, out / 8]``, the rows of a word in AWQ's order."""
    eights = unsigned(numbers, 4).view(-1, 8, numbers.shape[1])
    pairs = [eights[:, low] | eights[:, high] << 4 for low, high in zip(ORDER[::2], ORDER[1::2], strict=True)]
    return torch.stack(pairs, dim=2).view(torch.int32)[:, :, 0].T
