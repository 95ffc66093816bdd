"""Numbers of a few bits as one dense stream in 32-bit words, which most checkpoint formats are made of."""

import torch
from torch import Tensor

__all__ = ["packed", "signed", "unpacked", "unsigned"]


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


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """The numbers of each row's stream, as ``packed`` made it.

    Args:
        words: int32 ``[rows, words]``, with ``count * bits`` bits at least.
        bits: Of a number, 1 to 8.
        count: Numbers of a row.

    Returns:
        uint8 ``[rows, count]``.
    """
    stream = words.contiguous().view(torch.uint8)
    if 8 % bits == 0:
        pieces = [stream >> place & (1 << bits) - 1 for place in range(0, 8, bits)]
    else:
        eights = torch.zeros(len(stream), -(-stream.shape[1] // bits), 8, dtype=torch.uint8)
        padded = torch.zeros(len(stream), eights.shape[1] * bits, dtype=torch.uint8)
        padded[:, : stream.shape[1]] = stream
        eights[:, :, :bits] = padded.view(len(stream), -1, bits)
        numbers = eights.view(torch.int64)[:, :, 0]
        pieces = [(numbers >> place & (1 << bits) - 1).to(torch.uint8) for place in range(0, 8 * bits, bits)]
    return torch.stack(pieces, dim=2).view(len(stream), -1)[:, :count]


def unsigned(numbers: Tensor, bits: int) -> Tensor:
    """int8 from ``-2 ** (bits - 1)`` as uint8 from 0: what formats call the number plus an offset."""
    return numbers.view(torch.uint8) + (1 << (bits - 1))


def signed(numbers: Tensor, bits: int) -> Tensor:
    """uint8 from 0 as int8 from ``-2 ** (bits - 1)``."""
    return (numbers - (1 << (bits - 1))).view(torch.int8)


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
