"""Packs a DequantizeLinear weight for ONNX Runtime's block-quantized kernels."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmopt.passes.graph._rules import attribute

__all__ = ["BlockWeight", "block_size", "block_weight", "pack_bits"]

_BITS = {ir.DataType.INT8: 8, ir.DataType.INT4: 4}
_MAX_BLOCK = {8: 64, 4: 32}
"""Larger blocks compute rows in pairs and an odd last row differently: results would depend on the batch."""


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


def block_size(group: int, bits: int) -> int | None:
    """The largest block that divides ``group``, keeps results independent of the batch, and has a kernel."""
    return next((block for block in (64, 32, 16) if block <= _MAX_BLOCK[bits] and group % block == 0), None)


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 values below ``2**bits``, ``[..., n]`` -> bytes ``[..., ceil(n * bits / 8)]``, the lower bits first."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    packed: np.ndarray = values[..., 0::2] | (values[..., 1::2] << 4)
    return packed


def block_weight(node: ir.Node, name: str, *, transposed: bool) -> BlockWeight | str:
    """Repack the inputs of a DequantizeLinear; or why it has no such form.

    One scale that covers several blocks is repeated, so nothing is rounded again.

    Args:
        node: Over integers ``[k, n]``, or ``[n, k]`` when ``transposed``.
        name: Of the new tensors.
        transposed: Whether rows are outputs already.
    """
    values, scales = (value.const_value if value is not None else None for value in node.inputs[:2])
    if values is None or scales is None or values.dtype not in _BITS:
        return "the weight is not constant, or has no 4- or 8-bit kernel"
    bits = _BITS[values.dtype]
    n, k = values.shape.numpy() if transposed else reversed(values.shape.numpy())
    group = attribute(node, "block_size", 0) or k
    # A channel's scale may cover a last block that is padded; a group's may not.
    block = block_size(group, bits) or (None if group != k else 16)
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

    def lazy(suffix: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> ir.LazyTensor:
        full = f"{name}.{suffix}"
        return ir.LazyTensor(
            lambda: ir.tensor(np.ascontiguousarray(make()), dtype=dtype, name=full),
            dtype=dtype, shape=ir.Shape(shape), name=full,
        )  # fmt: skip

    zero_points = None
    if zeros is not None:
        zero_shape = (n, -(-blocks * bits // 8))
        zero_points = lazy(
            "zero_points", ir.DataType.UINT8, zero_shape,
            lambda: pack_bits((repeated(zeros).astype(np.int16) + middle).astype(np.uint8), bits),
        )  # fmt: skip
    return BlockWeight(
        n, k, bits, block,
        lazy("blocks", ir.DataType.UINT8, (n, blocks, block * bits // 8), packed_values),
        lazy("scales", ir.DataType.FLOAT, (n, blocks), lambda: repeated(scales)),
        zero_points,
    )  # fmt: skip
