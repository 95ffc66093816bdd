"""Quantized weights as GGML's blocks of 32 numbers, to the bit where a block type has the same grid.

Source of the layouts: ggml's ``block_q4_0``, ``block_q4_1`` and ``block_q8_0``. A block of Q4_0 is a float16 scale d
and 16 bytes, of which byte j holds numbers j and j + 16, each plus 8; Q4_1 has d and a float16 offset m,
``x = d q + m``; Q8_0 has d and 32 int8.
"""

import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from llmopt.optimizer.bit_stream import unsigned
from llmopt.optimizer.model import QuantTensors
from llmopt.optimizer.scheme import Scheme

__all__ = ["BLOCK", "block_type", "refusal", "to_blocks"]

BLOCK = 32


def block_type(scheme: Scheme) -> Kind | None:
    """The type with the scheme's grid; None where there is none."""
    spec = scheme.weights
    if spec.type != "int" or spec.block_structure is not None or (spec.group_size or BLOCK) % BLOCK:
        return None
    if spec.num_bits == 8:
        return Kind.Q8_0 if spec.symmetric else None
    return Kind.Q4_0 if spec.symmetric else Kind.Q4_1


def refusal(scheme: Scheme, shape: tuple[int, ...] | None = None) -> str | None:
    """Why no block type has the scheme's grid, in a weight of ``shape`` where that is known; None where one has."""
    if block_type(scheme) is None:
        return (
            "GGUF's blocks hold integers of 4 bits and symmetric ones of 8 bits, with one scale for each 32 columns: "
            f"{scheme.name} has another grid"
        )
    if shape is not None and shape[-1] % BLOCK:
        return f"GGUF's blocks have {BLOCK} columns, and this weight has {shape[-1]}"
    return None


def to_blocks(tensors: QuantTensors, kind: Kind, bits: int) -> Tensor:
    """The bytes of a weight ``[out, in]``, uint8 ``[out, in / 32 * size of a block]``.

    Integers are as they were. Scales become float16, and so does Q4_1's offset, ``-zero * scale``.

    Args:
        tensors: Of a scheme whose ``block_type`` is ``kind``.
        kind: Q4_0, Q4_1 or Q8_0.
        bits: Of the scheme's integers.
    """
    each = tensors.by_row()
    rows, columns = each.values.shape
    blocks = columns // BLOCK
    repeat = blocks // each.scale.shape[1]
    scale = each.scale.repeat_interleave(repeat, 1)
    values = each.values.view(rows, blocks, BLOCK)
    if kind is Kind.Q8_0:
        return torch.cat([_halves(scale), values.view(torch.uint8)], dim=2).view(rows, -1)
    if each.zero is None:
        nibbles, head = unsigned(values, 4), [_halves(scale)]
    else:
        nibbles = unsigned(values, bits)
        lowest = unsigned(each.zero, bits).repeat_interleave(repeat, 1).to(torch.float32)
        head = [_halves(scale), _halves(-lowest * scale)]
    packed = nibbles[:, :, : BLOCK // 2] | nibbles[:, :, BLOCK // 2 :] << 4
    return torch.cat([*head, packed], dim=2).view(rows, -1)


def _halves(numbers: Tensor) -> Tensor:
    """float32 ``[rows, blocks]`` as the two bytes of float16: uint8 ``[rows, blocks, 2]``."""
    return numbers.to(torch.float16)[:, :, None].view(torch.uint8)
