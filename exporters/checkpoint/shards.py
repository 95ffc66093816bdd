"""Writes safetensors files tensor by tensor: what is in memory is the part that is being written, not the file."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from llmopt.optimizer.tensor_file import DTYPES

__all__ = ["Part", "write_checkpoint_files"]

_SHARD_BYTES = 5_000_000_000
"""Of a file at most, unless one tensor is larger; what transformers splits at too."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors that are made together, such as those of one linear.

    Attributes:
        tensors: Name -> dtype and shape, in the order in which they are written.
        blocks: Makes their contents in that order; a tensor may come in several blocks of rows.
    """

    tensors: Mapping[str, tuple[torch.dtype, Shape]]
    blocks: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(_size(dtype, shape) for dtype, shape in self.tensors.values())


def write_checkpoint_files(
    parts: Iterable[Part],
    directory: Path,
    *,
    shard_bytes: int = _SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write ``model.safetensors``, or shards and their index as transformers names them.

    Args:
        parts: Made one after the other.
        directory: Exists.
        shard_bytes: Of a shard at most.
        progress: Called with (finished, total) parts.
    """
    shards = list(_shards(parts, shard_bytes))
    total = sum(map(len, shards))
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    places: dict[str, str] = {}
    done = 0
    for name, shard in zip(names, shards, strict=True):
        with (directory / name).open("wb") as file:
            _write_header(file, shard)
            for part in shard:
                _write_part(file, part)
                done += 1
                progress(done, total)
        places |= {tensor: name for part in shard for tensor in part.tensors}
    if len(shards) > 1:
        size = sum(part.nbytes for shard in shards for part in shard)
        index = {"metadata": {"total_size": size}, "weight_map": places}
        text = json.dumps(index, indent=2, sort_keys=True)
        (directory / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


def _shards(parts: Iterable[Part], limit: int) -> Iterator[Sequence[Part]]:
    shard: list[Part] = []
    for part in parts:
        if shard and sum(each.nbytes for each in shard) + part.nbytes > limit:
            yield shard
            shard = []
        shard.append(part)
    yield shard


def _write_header(file: BinaryIO, shard: Sequence[Part]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for part in shard:
        for name, (dtype, shape) in part.tensors.items():
            past = at + _size(dtype, shape)
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, past]}
            at = past
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    file.write(len(text).to_bytes(8, "little") + text)


def _write_part(file: BinaryIO, part: Part) -> None:
    written = 0
    for block in part.blocks():
        written += file.write(block.contiguous().view(-1).view(torch.uint8).numpy().data)
    assert written == part.nbytes, f"{min(part.tensors)} and its part have {written} bytes, not {part.nbytes}"


def _size(dtype: torch.dtype, shape: Shape) -> int:
    return prod(shape) * dtype.itemsize
