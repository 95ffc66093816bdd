"""AWQ checkpoints (AutoAWQ, llm-awq's ``gemm``): 4-bit numbers packed along output columns, in an order of their own.

Layout: ``qweight`` int32 ``[in, out / 8]``, ``qzeros`` int32 ``[groups, out / 8]``, ``scales`` ``[groups, out]``. The
eight numbers of a word are, from the lowest bits, those of columns 0, 2, 4, 6, 1, 3, 5, 7 of its eight.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmopt.optimizer.bit_stream import signed
from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.model import QuantTensors, QuantWeight
from llmopt.optimizer.quantized.stored import FLOATS, Stored
from llmopt.optimizer.scheme import QuantSpec, Scheme

__all__ = ["MARKS", "ORDER", "PARAMETERS", "read"]

MARKS = ("qweight",)

PARAMETERS = frozenset({"qweight", "qzeros", "scales"})

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Whose numbers a word holds, from the lowest bits, of its eight outputs."""


def read(module: str, stored: Stored, quantization: Mapping[str, Any]) -> QuantWeight:
    """One linear, its integers unpacked when they are asked for.

    Raises:
        InputError: A tensor is missing or does not fit the config.
        UnsupportedError: The layout is another than ``gemm``'s, or has other than 4 bits.
    """
    bits = quantization.get("bits", quantization.get("w_bit"))
    version = str(quantization.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise UnsupportedError(
            f"{stored.where}: AWQ with bits: {bits} and version: {version} is not supported",
            hint="supported: 4 bits in the layout gemm",
        )
    words = stored.take(f"{module}.qweight", ("I32",), (None, None))
    columns, rows = words.shape[0], words.shape[1] * 8
    size = quantization.get("group_size", quantization.get("q_group_size", -1))
    if not isinstance(size, int) or (size != -1 and (size < 1 or columns % size)):
        raise InputError(
            f"{stored.where}: {module} has {columns} columns, which group_size {size!r} does not divide",
            hint="config.json belongs to another checkpoint",
        )
    groups = 1 if size == -1 else columns // size
    scales = stored.take(f"{module}.scales", FLOATS, (groups, rows))
    zeros = stored.take(f"{module}.qzeros", ("I32",), (groups, rows // 8))
    symmetric = not quantization.get("zero_point", True)
    if symmetric and bool((_numbers(zeros()) != 0).any()):
        raise InputError(
            f"{stored.where}: {module}.qzeros holds zero points other than 8 under zero_point: false",
            hint="zero_point in config.json is wrong",
        )

    def load() -> QuantTensors:
        zero = None if symmetric else _numbers(zeros())
        return QuantTensors(_numbers(words()), scales().float().T.contiguous(), zero)

    sizes: dict[str, Any] = {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
    spec = QuantSpec.model_validate({"num_bits": 4, "symmetric": symmetric, **sizes})
    return QuantWeight((rows, columns), Scheme(weights=spec), load)


def _numbers(words: Tensor) -> Tensor:
    """int8 ``[out, columns]`` in -8..7 out of int32 ``[columns, out / 8]``."""
    columns, eighths = words.shape
    pairs = words.T.contiguous().view(torch.uint8).view(eighths, columns, 4)
    found = torch.empty(eighths, 8, columns, dtype=torch.uint8)
    for place, row in enumerate(ORDER):
        found[:, row] = pairs[:, :, place // 2] >> 4 * (place % 2) & 15
    return signed(found.view(eighths * 8, columns), 4)
