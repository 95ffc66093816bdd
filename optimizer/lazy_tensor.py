"""Initializers of a graph whose numbers are made when the file is written."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

__all__ = ["lazy_tensor"]


def lazy_tensor(name: str, dtype: ir.DataType, shape: Sequence[int], make: Callable[[], np.ndarray]) -> ir.LazyTensor:
    """A tensor that is made each time it is read, and not kept: a graph costs no memory before it is saved.

    Args:
        name: The initializer's name.
        dtype: Of the result; 4-bit types take int8 arrays with one value an element.
        shape: Of the result.
        make: Returns the array, of ``shape``.
    """
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(make()), dtype=dtype, name=name),
        dtype=dtype,
        shape=ir.Shape(shape),
        name=name,
    )
