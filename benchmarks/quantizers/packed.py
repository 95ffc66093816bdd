"""Reads the quantized checkpoints of other programs back to floats, so that one judge can run them all."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from llmopt.optimizer.errors import InputError

__all__ = ["Stored", "read_checkpoint", "read_tensors", "unpacked"]

_FLOAT_BITS = 16
"""Of a scale: what all programs store beside a 16-bit model, whatever dtype the model had that was quantized here."""

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of a word of AWQ's holds each of its eight columns."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint's weights as numbers, and what its packed ones take.

    Attributes:
        weights: Parameter name -> float32 values; packed ones are ``[out, in]``.
        bits: Module name of each packed linear -> bits of its values, scales, zero points and order of columns.
    """

    weights: Mapping[str, Tensor]
    bits: Mapping[str, int]


def read_checkpoint(directory: Path) -> Stored:
    """The weights of a Hugging Face checkpoint that is packed as its config says.

    Scales count, and are rounded, as float16.

    Raises:
        InputError: The format is not one of GPTQ, AWQ (gemm) and compressed-tensors' pack-quantized.
    """
    tensors = read_tensors(directory)
    config = json.loads((directory / "config.json").read_text("utf-8"))
    quantization: dict[str, Any] = config.get("quantization_config") or {}
    method = str(quantization.get("quant_method"))
    if method not in _READERS:
        raise InputError(f"{directory} is quantized by {method!r}", hint=f"readers: {', '.join(_READERS)}")
    suffix, read = _READERS[method]
    weights, bits, packed = {}, {}, set()
    for name in tensors:
        module, _, parameter = name.rpartition(".")
        if parameter == suffix:
            weights[f"{module}.weight"], bits[module] = read(module, tensors, quantization)
            packed |= {each for each in tensors if each.rpartition(".")[0] == module}
            weights |= {each: tensors[each].float() for each in packed & {f"{module}.bias"}}
    return Stored(weights | {n: t.float() for n, t in tensors.items() if n not in packed}, bits)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors in the safetensors files of a folder.

    Raises:
        InputError: There is none.
    """
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file is no mapping
    if not tensors:
        raise InputError(f"{directory} holds no safetensors file")
    return tensors


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """The unsigned numbers in a stream of bits, the lowest first, which may cross from one word into the next.

    Args:
        words: int32 ``[rows, words]``.
        bits: Of a number, at most 8.
        count: Numbers of a row.

    Returns:
        int32 ``[rows, count]``.
    """
    rows = len(words)
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8).reshape(rows, -1), axis=1, bitorder="little")
    numbers = stream[:, : count * bits].reshape(rows, count, bits)
    return torch.from_numpy(np.packbits(numbers, axis=2, bitorder="little").reshape(rows, count).astype(np.int32))


def _grouped(values: Tensor, zero: Tensor, scale: Tensor) -> Tensor:
    """``(values - zero) * scale`` for values ``[out, in]`` and the others ``[out, groups]``; scales as float16."""
    rows, columns = values.shape
    groups = (values.reshape(rows, scale.shape[1], -1) - zero[:, :, None]) * scale.half().float()[:, :, None]
    return groups.reshape(rows, columns)


def _gptq(module: str, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]) -> tuple[Tensor, int]:
    """``qweight [in*bits/32, out]`` along columns, ``qzeros [groups, out*bits/32]``, ``scales [groups, out]``."""
    bits = int(quantization["bits"])
    scales, order = tensors[f"{module}.scales"], tensors[f"{module}.g_idx"].long()
    groups, rows = scales.shape
    values = unpacked(tensors[f"{module}.qweight"].T, bits, len(order))
    zeros = unpacked(tensors[f"{module}.qzeros"], bits, rows)
    if quantization.get("checkpoint_format", "gptq") == "gptq":  # version 1 stores one less
        zeros = zeros + 1
    weight = (values - zeros.T[:, order]) * scales.half().float().T[:, order]
    in_order = torch.equal(order, torch.arange(len(order)) // -(-len(order) // groups))
    index_bits = 0 if in_order else 32 * len(order)
    zero_bits = 0 if quantization.get("sym") else bits
    return weight, values.numel() * bits + scales.numel() * (_FLOAT_BITS + zero_bits) + index_bits


def _awq(module: str, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]) -> tuple[Tensor, int]:
    """``qweight [in, out/8]`` and ``qzeros [groups, out/8]`` with interleaved columns, ``scales [groups, out]``."""
    if quantization.get("bits") != 4 or str(quantization.get("version", "gemm")).lower() != "gemm":
        raise InputError(f"{module}: AWQ checkpoints are read with 4 bits and version gemm")
    scales = tensors[f"{module}.scales"]
    values, zeros = (_deinterleaved(tensors[f"{module}.{each}"]) for each in ("qweight", "qzeros"))
    zero_bits = 4 if quantization.get("zero_point", True) else 0
    size = values.numel() * 4 + scales.numel() * (_FLOAT_BITS + zero_bits)
    return _grouped(values.T.contiguous(), zeros.T, scales.T), size


def _deinterleaved(words: Tensor) -> Tensor:
    """int32 ``[rows, 8 * words]`` out of ``[rows, words]``."""
    nibbles = unpacked(words, 4, words.shape[1] * 8).reshape(len(words), -1, 8)
    return nibbles[:, :, list(_AWQ_ORDER)].reshape(len(words), -1)


def _compressed_tensors(
    module: str, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]
) -> tuple[Tensor, int]:
    """``weight_packed [out, in*bits/32]``, ``weight_scale [out, groups]``, zero points packed along rows."""
    groups = quantization["config_groups"].values()
    (bits,) = {int(group["weights"]["num_bits"]) for group in groups}
    rows, columns = (int(size) for size in tensors[f"{module}.weight_shape"])
    scale, half = tensors[f"{module}.weight_scale"], 1 << (bits - 1)
    values = unpacked(tensors[f"{module}.weight_packed"], bits, columns) - half
    size = values.numel() * bits + scale.numel() * _FLOAT_BITS
    zero, packed = torch.zeros(scale.shape, dtype=torch.int32), tensors.get(f"{module}.weight_zero_point")
    if packed is not None:
        zero = unpacked(packed.T, bits, rows).T - half
        size += zero.numel() * bits
    order = tensors.get(f"{module}.weight_g_idx")
    if order is None:
        return _grouped(values, zero, scale), size
    index = order.long()
    return (values - zero[:, index]) * scale.half().float()[:, index], size + 32 * prod(order.shape)


_READERS: Mapping[str, tuple[str, Callable[..., tuple[Tensor, int]]]] = {
    "gptq": ("qweight", _gptq),
    "awq": ("qweight", _awq),
    "compressed-tensors": ("weight_packed", _compressed_tensors),
}
"""``quant_method`` -> the tensor that every packed linear has, and what reads one."""
