"""GPTQ checkpoints (AutoGPTQ, GPTQModel, AutoRound): integers packed along the input columns of each linear.

Layout: ``qweight`` int32 ``[in * bits / 32, out]``, ``qzeros`` int32 ``[groups, out * bits / 32]``, ``scales``
``[groups, out]``, ``g_idx`` int32 ``[in]``. A column's value is ``(q - zero) * scale`` of its group. Version 1 stores
``zero - 1``, version 2 the zero point itself.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmopt.optimizer.bit_stream import signed, unpacked
from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.model import QuantTensors, QuantWeight
from llmopt.optimizer.quantized.stored import FLOATS, Stored
from llmopt.optimizer.scheme import QuantSpec, Scheme
from llmopt.optimizer.tensor_file import FileTensor

__all__ = ["MARKS", "PARAMETERS", "group_index", "read"]

MARKS = ("qweight",)

PARAMETERS = frozenset({"qweight", "qzeros", "scales", "g_idx"})

_VERSIONS = {"gptq": 1, "gptq_v2": 0}
"""``checkpoint_format`` -> what has to be added to a stored zero point."""


@dataclass(frozen=True, slots=True)
class _Settings:
    """Of one module."""

    bits: int
    group_size: int
    symmetric: bool
    added: int


def read(module: str, stored: Stored, quantization: Mapping[str, Any]) -> QuantWeight:
    """One linear, its integers unpacked when they are asked for.

    Raises:
        InputError: A tensor is missing or does not fit the config, which may contradict itself.
        UnsupportedError: The checkpoint uses bits or zero points that nothing here can store.
    """
    settings = _settings(module, stored, quantization)
    bits, words = settings.bits, stored.take(f"{module}.qweight", ("I32",), (None, None))
    columns, rows = words.shape[0] * 32 // bits, words.shape[1]
    size = columns if settings.group_size == -1 else min(settings.group_size, columns)
    if columns % size:
        raise UnsupportedError(
            f"{stored.where}: {module} has {columns} columns, which group_size {size} does not divide",
            hint="take a checkpoint whose group_size divides every linear's columns",
        )
    groups = columns // size
    scales = stored.take(f"{module}.scales", FLOATS, (groups, rows))
    zeros = _zeros(stored.take(f"{module}.qzeros", ("I32",), (groups, -(-rows * bits // 32))), rows, module, settings)
    index = group_index(stored.take(f"{module}.g_idx", ("I32",), (columns,)), groups, stored, module)

    def load() -> QuantTensors:
        values = signed(unpacked(words().T, bits, columns), bits)
        return QuantTensors(values, scales().float().T.contiguous(), zeros, group_index=index)

    sizes: dict[str, Any] = {"strategy": "channel"} if groups == 1 else {"strategy": "group", "group_size": size}
    spec = QuantSpec.model_validate({"num_bits": bits, "symmetric": settings.symmetric, **sizes})
    return QuantWeight((rows, columns), Scheme(weights=spec), load, index is not None)


def _settings(module: str, stored: Stored, quantization: Mapping[str, Any]) -> _Settings:
    """The config's entries, and what its ``dynamic`` says about ``module``: the first expression that matches."""
    version = quantization.get("checkpoint_format") or "gptq"
    if version not in _VERSIONS:
        raise UnsupportedError(
            f"{stored.where}: checkpoint_format {version!r} of GPTQ is not supported",
            hint=f"supported: {', '.join(_VERSIONS)}",
        )
    found = {"bits": quantization.get("bits"), "group_size": quantization.get("group_size", -1)}
    found["sym"] = quantization.get("sym", True)
    for expression, changed in (quantization.get("dynamic") or {}).items():
        if re.match(expression.removeprefix("+:").removeprefix("-:"), module):
            if expression.startswith("-:"):
                raise InputError(
                    f"{stored.where}: quantization_config.dynamic leaves {module} in float ({expression!r}), but it is "
                    "stored packed",
                    hint="config.json belongs to another checkpoint",
                )
            found |= {name: value for name, value in changed.items() if name in found}
            break
    bits, group_size, symmetric = found["bits"], found["group_size"], found["sym"]
    if bits not in (2, 3, 4, 8) or not isinstance(symmetric, bool):
        raise UnsupportedError(
            f"{stored.where}: {module} has bits: {bits} and sym: {symmetric}", hint="supported: 2, 3, 4 and 8 bits"
        )
    if not isinstance(group_size, int) or group_size < -1 or group_size == 0:
        raise InputError(f"{stored.where}: {module} has group_size: {group_size!r}", hint="correct config.json")
    return _Settings(bits, group_size, symmetric, _VERSIONS[version])


def _zeros(stored: FileTensor, rows: int, module: str, settings: _Settings) -> Tensor | None:
    """The zero points, int8 ``[out, groups]``; None when symmetric."""
    bits, middle = settings.bits, 1 << (settings.bits - 1)
    found = unpacked(stored(), bits, rows)
    if settings.symmetric:
        wrong = found[found != middle - settings.added]
        if len(wrong):
            raise InputError(
                f"{stored.path}: {module}.qzeros holds {int(wrong[0])} under sym: true, where all have to be "
                f"{middle - settings.added}",
                hint="sym or checkpoint_format in the config is wrong: version 1 (gptq) stores one less than gptq_v2",
            )
        return None
    if settings.added and bool((found == (1 << bits) - 1).any()):
        raise UnsupportedError(
            f"{stored.path}: {module}.qzeros holds {(1 << bits) - 1}, which in version 1 is a zero point of 0 to some "
            f"programs and of {1 << bits} to others",
            hint="save the checkpoint again as gptq_v2, with the program that wrote it",
        )
    return signed(found + settings.added, bits).T.contiguous()


def group_index(stored: FileTensor, groups: int, where: Stored, module: str) -> Tensor | None:
    """The group of each column, int32 ``[in]``; None where the groups are equal parts from left to right.

    Raises:
        InputError: It names a group that there is not.
        UnsupportedError: The groups have different sizes.
    """
    index = stored()
    columns = len(index)
    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise InputError(
            f"{where.where}: {module}.g_idx names group {int(index.max())}, but there are {groups}",
            hint="group_size in config.json does not belong to these tensors, or the file is damaged",
        )
    if torch.equal(index, torch.arange(columns, dtype=torch.int32) // -(-columns // groups)):
        return None
    counts = index.bincount(minlength=groups)
    if int(counts.min()) != int(counts.max()):
        raise UnsupportedError(
            f"{where.where}: the groups of {module} have {int(counts.min())} to {int(counts.max())} columns",
            hint="take a checkpoint whose group_size divides every linear's columns",
        )
    return index.clone()
