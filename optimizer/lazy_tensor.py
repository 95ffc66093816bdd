"""Initializers of a graph whose numbers are made when the file is written."""

from collections.abc import Callable, Sequence
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

__all__ = ["StackedTensor", "bits_of", "lazy_tensor"]


_BITS = "llmopt.bits"


def lazy_tensor(
    name: str, dtype: ir.DataType, shape: Sequence[int], make: Callable[[], np.ndarray], *, bits: int | None = None
) -> ir.LazyTensor:
    """A tensor that is made each time it is read, and not kept: a graph costs no memory before it is saved.

    Args:
        name: The initializer's name.
        dtype: Of the result; 4-bit types take int8 arrays with one value an element.
        shape: Of the result.
        make: Returns the array, of ``shape``.
        bits: That its integers need, where the type has more; they are signed.
    """
    about = {} if bits is None else {_BITS: str(bits)}
    return ir.LazyTensor(
        lambda: _tensor(name, dtype, make()), dtype=dtype, shape=ir.Shape(shape), name=name, metadata_props=about
    )


def bits_of(tensor: ir.TensorProtocol) -> int:
    """How many bits the tensor's integers need, as far as is known: no more than its type has."""
    return int(tensor.metadata_props.get(_BITS, tensor.dtype.bitwidth))


class StackedTensor(ir.LazyTensor):
    """A lazy tensor of equal parts along its first axis: written one by one, they are never in memory together.

    Attributes:
        part: Makes the array of one part.
    """

    def __init__(self, name: str, dtype: ir.DataType, shape: Sequence[int], part: Callable[[int], np.ndarray]) -> None:
        def stack() -> ir.TensorProtocol:
            return _tensor(name, dtype, np.stack([part(i) for i in range(shape[0])]))

        super().__init__(stack, dtype=dtype, shape=ir.Shape(shape), name=name)
        self.part = part

    def tofile(self, file: BinaryIO) -> None:
        """See ``ir.TensorProtocol``."""
        count = self.shape.numpy()[0]
        if self.size // count * self.dtype.bitwidth % 8:
            super().tofile(file)  # a byte holds the last number of one part and the first of the next
            return
        for i in range(count):
            file.write(_tensor(str(self.name), self.dtype, self.part(i)).tobytes())


def _tensor(name: str, dtype: ir.DataType, array: np.ndarray) -> ir.TensorProtocol:
    return ir.tensor(np.ascontiguousarray(array), dtype=dtype, name=name)
