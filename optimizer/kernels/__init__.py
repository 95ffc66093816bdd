"""Our kernels for the CPU: operators of ONNX Runtime in the domain ``llmopt.kernels``, and the sampler's wide work.

It is compiled when llmopt is installed. ``kernels.cpp`` says what is in it.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["DOMAIN", "FEATURE", "GROUP", "instructions", "library", "register", "weigh_logits"]

DOMAIN = "llmopt.kernels"
FEATURE = "kernels"
"""The feature of an engine that needs the library."""

GROUP = 64
"""Neighboring weights that ``weigh_logits`` sums: kGroup in ``kernels.cpp``."""


def library() -> Path | None:
    """The compiled library; None where llmopt was installed without a C++ compiler."""
    return next(iter(sorted(Path(__file__).parent.glob("_kernels*.so"))), None)


def register(options: Any) -> None:
    """Let sessions made with ``options``, an ``onnxruntime.SessionOptions``, have graphs with these operators.

    Where llmopt was installed without the library there is nothing to let them have.
    """
    path = library()
    if path is not None:
        options.register_custom_ops_library(str(path))


def instructions() -> str:
    """Which instructions the kernels use on this CPU: ``avx512``, ``avx2`` or ``plain``; ``none`` without library."""
    opened = _opened()
    if opened is None:
        return "none"
    found: bytes = opened.llmopt_instructions()
    return found.decode()


def weigh_logits(
    logits: npt.NDArray[np.float32], temperatures: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64], npt.NDArray[np.float32]] | None:
    """``exp((logits - the row's largest) / temperature)``, in one pass over each row; 0 where that is below exp(-87).

    Args:
        logits: float32 ``[rows, vocab]``, contiguous; not modified.
        temperatures: float32 ``[rows]``, above 0.

    Returns:
        The weights, float32 ``[rows, vocab]``, and of every ``GROUP`` of a row's their sum, float64, and the largest,
        float32, ``[rows, ceil(vocab / GROUP)]``; None where llmopt was installed without the library.
    """
    opened = _opened()
    if opened is None:
        return None
    rows, columns = logits.shape
    groups = -(-columns // GROUP)
    weights = np.empty_like(logits)
    sums, largest = np.empty((rows, groups)), np.empty((rows, groups), np.float32)
    opened.llmopt_weigh_logits(
        logits.ctypes.data, rows, columns, temperatures.ctypes.data, weights.ctypes.data, sums.ctypes.data,
        largest.ctypes.data,
    )  # fmt: skip
    return weights, sums, largest


@cache
def _opened() -> ctypes.CDLL | None:
    path = library()
    if path is None:
        return None
    opened = ctypes.CDLL(str(path))
    opened.llmopt_instructions.restype = ctypes.c_char_p
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    opened.llmopt_weigh_logits.argtypes = (pointer, whole, whole, pointer, pointer, pointer, pointer)
    opened.llmopt_weigh_logits.restype = None
    return opened
