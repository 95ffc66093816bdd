"""Numbers of a few bits as one dense stream in 32-bit words, which most checkpoint formats are made of."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["packed"]

_WORD = 32


def packed(values: Tensor, bits: int) -> Tensor:
    """Each row as a stream of bits, the lowest first; a number may cross from one word into the next.

    Args:
        values: uint8 ``[rows, count]``, each below ``2 ** bits``.
        bits: Of a number, 1 to 8.

    Returns:
        int32 ``[rows, ceil(count * bits / 32)]``; bits behind the last number are 0.
    """
    rows, count = values.shape
    words = -(-count * bits // _WORD)
    if 8 % bits == 0:
        each = 8 // bits
        bytes_ = torch.zeros(rows, words * 4, dtype=torch.uint8)
        for place in range(each):
            column = values[:, place::each]
            bytes_[:, : column.shape[1]] |= column << (place * bits)
        return bytes_.view(torch.int32)
    stream = np.zeros((rows, words * _WORD), np.uint8)
    numbers = np.unpackbits(values.numpy()[:, :, None], axis=2, count=bits, bitorder="little")
    stream[:, : count * bits] = numbers.reshape(rows, -1)
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little")).view(torch.int32)
