"""The head of a GGUF file: metadata and where each tensor lies, read in milliseconds.

``gguf.GGUFReader`` makes an array object of every token of the vocabulary, which takes seconds; this reader steps
over them. Source of the layout: the GGUF specification in the ggml project.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from llmopt.optimizer.errors import InputError

__all__ = ["Header", "TensorEntry", "read_header"]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: shape with rows first, storage format, and place in the file in bytes."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says before its data; arrays of strings are left out of the metadata."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]


def read_header(path: Path) -> Header:
    """Read the metadata and the table of tensors, and check that all tensors lie within the file.

    Raises:
        InputError: Not a GGUF file, a version that cannot be read, or a damaged or truncated file.
    """
    with path.open("rb") as file:
        magic = file.read(8)
        if len(magic) < 8 or magic[:4] != b"GGUF":
            raise InputError(
                f"{path} is not a GGUF file",
                hint="a model is a .gguf file, or the directory that holds config.json and the safetensors files",
            )
        version = struct.unpack("<I", magic[4:])[0]
        if version not in (2, 3):
            raise InputError(f"{path} is GGUF version {version}; versions 2 and 3 can be read")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _Reader(data).header()
            except (struct.error, ValueError, KeyError, TypeError, ArithmeticError) as error:
                raise InputError(
                    f"{path} ({len(data):,} bytes) is truncated or damaged: {error}", hint="copy or download it again"
                ) from error
            end = max((entry.offset + entry.nbytes for entry in header.tensors.values()), default=0)
            if end > len(data):
                raise InputError(
                    f"{path} is truncated: its tensors end at byte {end:,}, the file at {len(data):,}",
                    hint="copy or download it again",
                )
            return header


class _Reader:
    """A position in the mapped file that moves on with each value."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 8

    def header(self) -> Header:
        tensor_count, value_count = self._numbers("Q", 2)
        metadata = {}
        for _ in range(value_count):
            name = self._string()
            value = self._value(self._numbers("I")[0])
            if value is not None:
                metadata[name] = value
        table = [self._tensor() for _ in range(tensor_count)]
        alignment = int(metadata.get("general.alignment", 32))
        start = (self._at + alignment - 1) // alignment * alignment
        tensors = {name: _entry(dims, kind, start + offset) for name, dims, kind, offset in table}
        return Header(metadata, tensors)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dims = self._numbers("Q", self._numbers("I")[0])
        return name, dims, self._numbers("I")[0], self._numbers("Q")[0]

    def _numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{count}{code}")
        values = layout.unpack_from(self._data, self._at)
        self._at += layout.size
        return values

    def _string(self) -> str:
        start = self._at + 8
        self._at = start + self._numbers("Q")[0]
        if self._at > len(self._data):
            raise ValueError(f"a text at byte {start:,} reaches beyond the end")
        return self._data[start : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._numbers(_SCALARS[kind])[0]
        item, count = (*self._numbers("I"), *self._numbers("Q"))
        if item in _SCALARS:
            if count > len(self._data):
                raise ValueError(f"an array of {count:,} values at byte {self._at:,}")
            return list(self._numbers(_SCALARS[item], count))
        if item != _STRING:
            raise ValueError(f"an array of unknown type {item} at byte {self._at:,}")
        for _ in range(count):
            self._at += 8 + struct.unpack_from("<Q", self._data, self._at)[0]
        return None


def _entry(dims: tuple[int, ...], kind: int, offset: int) -> TensorEntry:
    """Dimensions come fastest first; a quantized row is a whole number of blocks."""
    storage = GGMLQuantizationType(kind)
    block, size = GGML_QUANT_SIZES[storage]
    count = 1
    for dim in dims:
        count *= dim
    if dims and dims[0] % block:
        raise ValueError(f"a row of {dims[0]} values is not a multiple of {storage.name}'s block of {block}")
    return TensorEntry(tuple(reversed(dims)), storage, offset, count // block * size)
