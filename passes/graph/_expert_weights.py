"""Lays out the weights of a layer's experts for ONNX Runtime's kernels: ``[experts, out, in]``, expert by expert."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmopt.optimizer.lazy_tensor import StackedTensor
from llmopt.passes.graph._nbits import block_size, pack_bits
from llmopt.passes.graph._rules import attribute, producer

__all__ = ["BlockRows", "ExpertWeights", "block_rows", "common_block", "expert_weights", "float_rows"]

_BITS = {ir.DataType.INT8: 8, ir.DataType.INT4: 4}
_MIN_BLOCK = 16


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The same linear, or gate and up, of all experts, as the standard graph has them.

    Attributes:
        values: ``[experts, in, out]``: floats, or signed integers.
        scales: ``[experts, groups, out]``; None when values are floats.
        zeros: As scales, signed; None when symmetric.
        group: Inputs that share a scale.
    """

    values: ir.TensorProtocol
    scales: ir.TensorProtocol | None
    zeros: ir.TensorProtocol | None
    group: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(experts, in, out)``."""
        experts, columns, rows = self.values.shape.numpy()
        return experts, columns, rows

    @property
    def bits(self) -> int:
        """Of an integer."""
        return _BITS[self.values.dtype]


@dataclass(frozen=True, slots=True)
class BlockRows:
    """Tensors of QMoE.

    Attributes:
        values: uint8 ``[experts, out, in * bits / 8]``, the lower bits first.
        scales: float32 ``[experts, out, blocks]``.
        zero_points: uint8 ``[experts, out, ceil(blocks * bits / 8)]``; None for the middle of the range.
    """

    values: ir.TensorProtocol
    scales: ir.TensorProtocol
    zero_points: ir.TensorProtocol | None


def expert_weights(value: ir.Value) -> ExpertWeights | str:
    """What ``value``, an input of ``Experts``, is made of; or why it cannot be laid out."""
    if (tensor := value.const_value) is not None:
        if tensor.dtype != ir.DataType.FLOAT:
            return "the weights are neither float32 nor integers"
        return ExpertWeights(tensor, None, None, 0)
    node = producer(value, "DequantizeLinear")
    tensors = [] if node is None else [None if each is None else each.const_value for each in node.inputs]
    if node is None or None in tensors:
        return "the weights are not constant"
    values, scales, zeros = (*tensors, None)[:3]
    assert values is not None
    group = attribute(node, "block_size", 0)
    if values.dtype not in _BITS or attribute(node, "axis", 1) != 1 or group == 0:
        return "the weights are not 4- or 8-bit integers with scales along their inputs"
    return ExpertWeights(values, scales, zeros, group)


def common_block(*weights: ExpertWeights) -> int | None:
    """The largest block that divides every group and keeps results independent of the batch; None without one.

    The kernel takes weights of one width: narrower ones count as the widest.

    A row has two blocks at least: the kernel reads the zero points of rows with a single one in another layout.
    """
    bits = max(each.bits for each in weights)
    block = min(block_size(each.group, bits) or 0 for each in weights)
    while block and any(each.shape[1] // block < 2 for each in weights):
        block //= 2
    return block if block >= _MIN_BLOCK else None


def float_rows(name: str, weights: ExpertWeights, *, alternating: bool) -> ir.TensorProtocol:
    """Float32 ``[experts, out, in]``; ``alternating`` puts each row of up behind its row of gate."""
    experts, columns, rows = weights.shape
    turned = _turned(weights.values, alternating=alternating)
    return StackedTensor(name, ir.DataType.FLOAT, (experts, rows, columns), turned)


def block_rows(
    name: str, weights: ExpertWeights, *, bits: int, block: int, alternating: bool, with_zeros: bool
) -> BlockRows:
    """The integers packed, with a scale for each block: one that covers several is repeated, nothing is rounded again.

    Args:
        name: Of the tensors.
        weights: Of integers.
        bits: To store an integer in, as many as it has or more.
        block: Divides their group.
        alternating: Whether each row of up comes behind its row of gate.
        with_zeros: Whether there are zero points, for symmetric integers the middle of the range.
    """
    assert weights.scales is not None
    experts, columns, rows = weights.shape
    blocks, repeat = columns // block, weights.group // block
    middle = 1 << (bits - 1)
    values, scales = (_turned(each, alternating=alternating) for each in (weights.values, weights.scales))
    zeros = None if weights.zeros is None else _turned(weights.zeros, alternating=alternating)

    def unsigned(signed: np.ndarray) -> np.ndarray:
        return (signed.astype(np.int16) + middle).astype(np.uint8)

    def zero_points(e: int) -> np.ndarray:
        if zeros is None:
            return pack_bits(np.full((rows, blocks), middle, np.uint8), bits)
        return pack_bits(np.repeat(unsigned(zeros(e)), repeat, axis=1), bits)

    def stacked(part: str, dtype: ir.DataType, width: int, make: Callable[[int], np.ndarray]) -> ir.TensorProtocol:
        return StackedTensor(f"{name}.{part}", dtype, (experts, rows, width), make)

    uint8 = ir.DataType.UINT8
    return BlockRows(
        values=stacked("blocks", uint8, columns * bits // 8, lambda e: pack_bits(unsigned(values(e)), bits)),
        scales=stacked("scales", ir.DataType.FLOAT, blocks, lambda e: np.repeat(scales(e), repeat, axis=1)),
        zero_points=stacked("zero_points", uint8, -(-blocks * bits // 8), zero_points) if with_zeros else None,
    )


def _turned(tensor: ir.TensorProtocol, *, alternating: bool) -> Callable[[int], np.ndarray]:
    """Each expert's matrix ``[height, out]`` as ``[out, height]``, read by itself where the tensor allows it."""
    read = tensor.part if isinstance(tensor, StackedTensor) else lambda e: tensor.numpy()[e]

    def turned(e: int) -> np.ndarray:
        rows: np.ndarray = read(e).T
        return np.stack(np.split(rows, 2), axis=1).reshape(rows.shape) if alternating else rows

    return turned
