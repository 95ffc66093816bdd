"""Packs a DequantizeLinear weight for ONNX Runtime's block-quantized kernels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from llmopt.optimizer.instructions import LARGEST_BLOCK, host_instructions
from llmopt.optimizer.lazy_tensor import bits_of, lazy_tensor
from llmopt.passes.graph._rules import attribute

__all__ = [
    "BlockKernels",
    "BlockWeight",
    "Executor",
    "block_kernels",
    "block_size",
    "block_weight",
    "matmul_nbits",
    "pack_bits",
    "packed_as",
]

Executor: TypeAlias = Literal["cpu", "cuda"]
"""Whose kernels weights are packed for."""

_BITS = {ir.DataType.INT8: 8, ir.DataType.INT4: 4}
_MIN_BLOCK = {8: 16, 4: 16, 2: 32}
"""Blocks of 16 with 2 bits have a kernel that is slow and computes one row otherwise than several."""


@dataclass(frozen=True, slots=True)
class BlockKernels:
    """What kernels of packed weights take.

    Attributes:
        largest: Columns of a block, by bits.
        accuracy_level: What MatMulNBits may do to activations: 4 rounds them to int8 per block, 0 leaves them.
    """

    largest: Mapping[int, int]
    accuracy_level: int


def block_kernels(executor: Executor) -> BlockKernels:
    """Those of ONNX Runtime's provider: on the CPU blocks are so small that results do not depend on the batch."""
    if executor == "cpu":
        return BlockKernels(LARGEST_BLOCK[host_instructions()], 4)
    return BlockKernels({8: 128, 4: 128}, 0)


@dataclass(frozen=True, slots=True)
class BlockWeight:
    """Tensors of MatMulNBits and GatherBlockQuantized for a weight of ``n`` outputs and ``k`` inputs.

    Attributes:
        values: uint8 ``[n, blocks, block * bits / 8]``, the lower bits first.
        scales: float32 ``[n, blocks]``.
        zero_points: uint8 ``[n, ceil(blocks * bits / 8)]``; None for the middle of the range.
    """

    n: int
    k: int
    bits: int
    block: int
    values: ir.TensorProtocol
    scales: ir.TensorProtocol
    zero_points: ir.TensorProtocol | None


def block_size(group: int, bits: int, executor: Executor = "cpu") -> int | None:
    """The largest block that divides ``group`` and has a kernel; None where none does."""
    largest = block_kernels(executor).largest.get(bits, 0)
    fitting = (block for block in (128, 64, 32, 16) if _MIN_BLOCK[bits] <= block <= largest)
    return next((block for block in fitting if group % block == 0), None)


def packed_as(bits: int, group: int, executor: Executor = "cpu") -> tuple[int, int | None]:
    """Bits and block of the kernel for integers of ``bits`` bits with a scale for each ``group`` columns.

    Three bits take 4, which is the next width that has a kernel, and so do 2 bits in groups that no block of it
    divides. The block is None where none divides the group.
    """
    if bits == 2 and (block := block_size(group, 2, executor)) is not None:
        return 2, block
    width = 8 if bits == 8 else 4
    return width, block_size(group, width, executor)


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 values below ``2**bits``, ``[..., n]`` -> bytes ``[..., ceil(n * bits / 8)]``, the lower bits first."""
    if bits == 8:
        return values
    per_byte = 8 // bits
    if missing := -values.shape[-1] % per_byte:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], missing), np.uint8)], axis=-1)
    packed = np.zeros((*values.shape[:-1], values.shape[-1] // per_byte), np.uint8)
    for i in range(per_byte):
        packed |= values[..., i::per_byte] << (bits * i)
    return packed


def block_weight(
    node: ir.Node, name: str, *, transposed: bool, fewest_bits: int = 2, executor: Executor = "cpu"
) -> BlockWeight | str:
    """Repack the inputs of a DequantizeLinear; or why it has no such form.

    Integers are packed as ``packed_as`` says.

    One scale that covers several blocks is repeated, so nothing is rounded again.

    Args:
        node: Over integers ``[k, n]``, or ``[n, k]`` when ``transposed``.
        name: Of the new tensors.
        transposed: Whether rows are outputs already.
        fewest_bits: That the kernel takes.
        executor: Whose kernel it is.
    """
    values, scales = (value.const_value if value is not None else None for value in node.inputs[:2])
    if values is None or scales is None or values.dtype not in _BITS:
        return "the weight is not constant, or has no 4- or 8-bit kernel"
    n, k = values.shape.numpy() if transposed else reversed(values.shape.numpy())
    if not _is_per_output(node, len(scales.shape), transposed=transposed):
        return "the scales are not one per output, nor one per group of an output's inputs"
    group = attribute(node, "block_size", 0) or k
    bits, block = packed_as(2 if bits_of(values) == 2 >= fewest_bits else _BITS[values.dtype], group, executor)
    # A channel's scale may cover a last block that is padded; a group's may not.
    block = block or (None if group != k else 16)
    if block is None:
        return f"no kernel's block divides a group of {group} columns"
    zeros = node.inputs[2].const_value if len(node.inputs) > 2 and node.inputs[2] is not None else None
    blocks = -(-k // block)
    repeat = -(-group // block)
    middle = 1 << (bits - 1)

    def rows(tensor: ir.TensorProtocol) -> np.ndarray:
        """As ``[n, ...]``."""
        array = tensor.numpy()
        if array.ndim == 1:
            return array[:, None]
        return array if transposed else array.T

    def packed_values() -> np.ndarray:
        unsigned = (rows(values).astype(np.int16) + middle).astype(np.uint8)
        padded = np.full((n, blocks * block), middle, np.uint8)
        padded[:, :k] = unsigned
        return pack_bits(padded.reshape(n, blocks, block), bits)

    def repeated(tensor: ir.TensorProtocol) -> np.ndarray:
        return np.repeat(rows(tensor), repeat, axis=1)[:, :blocks]

    def packed_zeros(tensor: ir.TensorProtocol) -> np.ndarray:
        return pack_bits((repeated(tensor).astype(np.int16) + middle).astype(np.uint8), bits)

    uint8 = ir.DataType.UINT8
    return BlockWeight(
        n=n,
        k=k,
        bits=bits,
        block=block,
        values=lazy_tensor(f"{name}.blocks", uint8, (n, blocks, block * bits // 8), packed_values),
        scales=lazy_tensor(f"{name}.scales", ir.DataType.FLOAT, (n, blocks), lambda: repeated(scales)),
        zero_points=None
        if zeros is None
        else lazy_tensor(f"{name}.zero_points", uint8, (n, -(-blocks * bits // 8)), lambda: packed_zeros(zeros)),
    )


def _is_per_output(node: ir.Node, rank: int, *, transposed: bool) -> bool:
    """Whether scales of this rank belong to an output, or to a group along the axis that is not the outputs'."""
    outputs = 0 if transposed else 1
    expected = (2, 1 - outputs) if attribute(node, "block_size", 0) else (1, outputs)
    return (rank, attribute(node, "axis", 1)) == expected


def matmul_nbits(op: Any, x: ir.Value, weight: BlockWeight, executor: Executor) -> Any:
    """``x`` times a packed weight."""
    tensors = (weight.values, weight.scales, weight.zero_points)
    inputs = [op.initializer(tensor, name=tensor.name) for tensor in tensors if tensor is not None]
    return op.MatMulNBits(
        x, *inputs, K=weight.k, N=weight.n, bits=weight.bits, block_size=weight.block,
        accuracy_level=block_kernels(executor).accuracy_level, _domain="com.microsoft",
    )  # fmt: skip
