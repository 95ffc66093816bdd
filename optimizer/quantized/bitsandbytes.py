"""bitsandbytes' checkpoints, as bases of QLoRA: 4-bit numbers out of a table (NF4, FP4), read as the floats they are.

Source: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, sections 3 (NF4, double quantization). The values of NF4 do not
lie on a grid, so nothing here can store them as integers. LLM.int8's weights do: they are W8A16 with a scale per
channel; its splitting of activations is not repeated.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.model import DenseWeight, QuantTensors, QuantWeight, Weight
from llmopt.optimizer.quantized.stored import FLOATS, Stored
from llmopt.optimizer.scheme import PRESETS
from llmopt.optimizer.tensor_file import FileTensor

__all__ = ["MARKS", "PARAMETERS", "read"]

_STATE = "weight.quant_state.bitsandbytes__"

MARKS = ("weight.absmax", "SCB")

PARAMETERS = frozenset(
    {"weight", "SCB", "weight_format"}
    | {f"weight.{name}" for name in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}
    | {f"{_STATE}{kind}" for kind in ("nf4", "fp4")}
)


def read(module: str, stored: Stored, _: Mapping[str, Any]) -> Weight:
    """One linear; its values are made when they are asked for. The tensors themselves say how they were made.

    Raises:
        InputError: A tensor is missing or does not fit what the checkpoint says of it.
    """
    if f"{module}.SCB" in stored.tensors:
        return _int8(module, stored)
    state, kind = _state(module, stored)
    shape = tuple(int(size) for size in state["shape"])
    block, count = int(state["blocksize"]), prod(shape)
    tensors = _FourBit(
        stored.take(f"{module}.weight", ("U8",), (-(-count // 2), 1)),
        stored.take(f"{module}.weight.quant_map", ("F32",), (16,)),
        stored.take(f"{module}.weight.absmax", ("U8", "F32"), (-(-count // block),)),
        _nested(module, stored, state),
        shape,
        block,
    )
    if len(shape) != 2:
        raise UnsupportedError(f"{stored.where}: {module}.weight is {list(shape)} in {kind}; linears have two sizes")
    return DenseWeight(shape, torch.float32, tensors)


@dataclass(frozen=True, slots=True)
class _Nested:
    """Double quantization: 256 levels with a scale for each block of the scales, around an offset."""

    levels: FileTensor
    absmax: FileTensor
    block: int
    offset: float

    def __call__(self, numbers: Tensor) -> Tensor:
        each = self.absmax().repeat_interleave(self.block)[: len(numbers)]
        return self.levels()[numbers.long()] * each + self.offset


@dataclass(frozen=True, slots=True)
class _FourBit:
    """Numbers of 4 bits, the upper half of a byte first; a scale for each block of the flattened weight."""

    numbers: FileTensor
    levels: FileTensor
    absmax: FileTensor
    nested: _Nested | None
    shape: tuple[int, ...]
    block: int

    def __call__(self) -> Tensor:
        """float32 ``[out, in]``."""
        pairs = self.numbers().view(-1)
        levels, count = self.levels(), prod(self.shape)
        values = torch.stack([levels[(pairs >> 4).long()], levels[(pairs & 15).long()]], dim=1).view(-1)[:count]
        scale = self.absmax() if self.nested is None else self.nested(self.absmax())
        return (values * scale.repeat_interleave(self.block)[:count]).reshape(self.shape)


def _state(module: str, stored: Stored) -> tuple[dict[str, Any], str]:
    """What bitsandbytes says of a weight: JSON in the bytes of a tensor."""
    for kind in ("nf4", "fp4"):
        if f"{module}.{_STATE}{kind}" in stored.tensors:
            tensor = stored.take(f"{module}.{_STATE}{kind}", ("U8",))
            try:
                state: dict[str, Any] = json.loads(bytes(tensor().tolist()))
                return {"blocksize": state["blocksize"], "shape": state["shape"], **state}, kind
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{stored.where}: {module}.{_STATE}{kind} cannot be read: {error!r}") from error
    raise InputError(
        f"{stored.where} lacks {module}.{_STATE}nf4",
        hint="the checkpoint is incomplete: save it again with transformers",
    )


def _nested(module: str, stored: Stored, state: Mapping[str, Any]) -> _Nested | None:
    if "nested_blocksize" not in state:
        stored.take(f"{module}.weight.absmax", ("F32",))
        return None
    block, scales = int(state["nested_blocksize"]), stored.take(f"{module}.weight.absmax", ("U8",))
    return _Nested(
        stored.take(f"{module}.weight.nested_quant_map", ("F32",), (256,)),
        stored.take(f"{module}.weight.nested_absmax", ("F32",), (-(-scales.shape[0] // block),)),
        block,
        float(state["nested_offset"]),
    )


def _int8(module: str, stored: Stored) -> QuantWeight:
    """LLM.int8: ``weight`` int8 ``[out, in]``, ``SCB`` the largest magnitude of each row."""
    numbers = stored.take(f"{module}.weight", ("I8",), (None, None))
    rows, columns = numbers.shape
    largest = stored.take(f"{module}.SCB", FLOATS, (rows,))

    def load() -> QuantTensors:
        return QuantTensors(numbers(), (largest().float() / 127)[:, None], None)

    return QuantWeight((rows, columns), PRESETS["W8A16"], load)
