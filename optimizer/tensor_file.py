"""Safetensors files: names and shapes from the header, tensors mapped into memory only while they are in use."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from llmopt.optimizer.errors import InputError

__all__ = ["DTYPES", "FileTensor", "read_header"]

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""Safetensors' names of what llmopt reads and writes."""


@dataclass(frozen=True, slots=True)
class FileTensor:
    """Where one tensor lies in a file; a ``RowLoader``.

    Mapped pages count as memory of the process from the first touch until they are unmapped. So each read maps the
    rows it returns and nothing else, and they are unmapped with the tensor; safetensors' own handles map whole files.

    Attributes:
        path: The file.
        stamp: The file's size, time of change and inode when its header was read.
        offset: Of the first byte, from the start of the file.
        dtype: Safetensors' name of it, which may be none of ``DTYPES``.
        shape: As stored.
    """

    path: Path
    stamp: tuple[int, int, int]
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def __call__(self) -> Tensor:
        """The tensor; its pages are read when they are touched.

        Raises:
            InputError: The file is not the one whose header was read.
        """
        return self._map(0, self.shape)

    def rows(self, first: int, past_end: int) -> Tensor:
        """Rows ``first .. past_end - 1`` of the first dimension, in the same way."""
        return self._map(first, (past_end - first, *self.shape[1:]))

    def _map(self, first: int, shape: tuple[int, ...]) -> Tensor:
        dtype = DTYPES[self.dtype]
        row = prod(shape[1:]) * dtype.itemsize
        with self.path.open("rb") as file:
            if _stamp(file.fileno()) != self.stamp:
                raise InputError(f"{self.path} changed while it was in use", hint="run the command again")
            # Copy-on-write, because torch warns of arrays it could not write to.
            data = np.memmap(file, np.uint8, "c", self.offset + first * row, (prod(shape) * dtype.itemsize,))
        return torch.from_numpy(data).view(dtype).reshape(shape)


def read_header(path: Path) -> dict[str, FileTensor]:
    """Every tensor of a safetensors file, in the header's order.

    Raises:
        SafetensorError: The file is damaged.
        OSError: It cannot be read.
    """
    safe_open(path, framework="np")  # checks that the header is sound and fits the file, and is closed again
    with path.open("rb") as file:
        stamp = _stamp(file.fileno())
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: FileTensor(path, stamp, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
    }


def _stamp(descriptor: int) -> tuple[int, int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns, status.st_ino
