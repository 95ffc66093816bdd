"""Checkpoints written number by number, as their formats say, to read back."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MODULE = "model.layers.1.mlp.down_proj"
"""``[64, 128]`` in the tiny Llama."""

ROWS, COLUMNS = 64, 128

Replaced = Mapping[str, Tensor]


def stream(numbers: list[int], bits: int) -> list[int]:
    """Signed 32-bit words of one long number, the first number lowest."""
    long = sum(number << (bits * place) for place, number in enumerate(numbers))
    words = [long >> (32 * place) & 0xFFFFFFFF for place in range(-(-len(numbers) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


class Packer:
    """Random numbers, and how formats lay them out."""

    module, rows, columns = MODULE, ROWS, COLUMNS

    @staticmethod
    def numbers(bits: int, *shape: int, seed: int = 0) -> Tensor:
        """Unsigned, int64."""
        return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed))

    @staticmethod
    def scales(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=torch.Generator().manual_seed(1)).half() + 0.01

    @staticmethod
    def by_rows(numbers: Tensor, bits: int) -> Tensor:
        return torch.tensor([stream(row, bits) for row in numbers.tolist()], dtype=torch.int32)

    @classmethod
    def by_columns(cls, numbers: Tensor, bits: int) -> Tensor:
        return cls.by_rows(numbers.T, bits).T.contiguous()


@pytest.fixture
def packer() -> Packer:
    return Packer()


@pytest.fixture
def checkpoint(tiny_llama_untied: Path, tmp_path: Path) -> Callable[..., Path]:
    """The tiny Llama with one linear's weight replaced by the given tensors, and a config that says so."""

    def make(parts: Replaced, quantization: Mapping[str, Any] | None, files: Mapping[str, Any] | None = None) -> Path:
        directory = Path(shutil.copytree(tiny_llama_untied, tmp_path / "quantized", dirs_exist_ok=True))
        tensors = load_file(directory / "model.safetensors")
        del tensors[f"{MODULE}.weight"]
        tensors |= {f"{MODULE}.{name}": tensor.contiguous() for name, tensor in parts.items()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((directory / "config.json").read_text())
        if quantization is not None:
            config["quantization_config"] = quantization
        (directory / "config.json").write_text(json.dumps(config))
        for name, content in (files or {}).items():
            (directory / name).write_text(json.dumps(content))
        return directory

    return make
