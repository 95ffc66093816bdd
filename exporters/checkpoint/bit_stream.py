"""Numbers of a few bits as one dense stream in 32-bit words, which most checkpoint formats are made of."""

import torch
from torch import Tensor

__all__ = ["packed"]


def packed(values: Tensor, bits: int) -> Tensor:
    """Each row as a stream of bits, the lowest first; a number may cross from one word into the next.

    Args:
        values: uint8 ``[rows, count]``, each below ``2 ** bits``.
        bits: Of a number, 1 to 8.

    Returns:
        int32 ``[rows, ceil(count * bits / 32)]``; bits behind the last number are 0.
    """
    rows, count = values.shape
    stream = torch.zeros(rows, -(-count * bits // 32) * 4, dtype=torch.uint8)
    whole = _whole_bytes(values, bits) if 8 % bits == 0 else _eights(values, bits)
    width = min(whole.shape[1], stream.shape[1])
    stream[:, :width] = whole[:, :width]
    return stream.view(torch.int32)


def _whole_bytes(values: Tensor, bits: int) -> Tensor:
    """``8 / bits`` numbers are a byte: uint8 ``[rows, ceil(count * bits / 8)]``."""
    each = 8 // bits
    found = torch.zeros(len(values), -(-values.shape[1] // each), dtype=torch.uint8)
    for place in range(each):
        column = values[:, place::each]
        found[:, : column.shape[1]] |= column << (place * bits)
    return found


def _eights(values: Tensor, bits: int) -> Tensor:
    """Eight numbers are ``bits`` bytes, the lowest of an int64: uint8 ``[rows, ceil(count / 8) * bits]``."""
    found = torch.zeros(len(values), -(-values.shape[1] // 8), dtype=torch.int64)
    for place in range(8):
        column = values[:, place::8]
        found[:, : column.shape[1]] |= column.to(torch.int64) << (place * bits)
    return found.view(torch.uint8).reshape(*found.shape, 8)[:, :, :bits].reshape(len(values), -1)
