"""Our kernels for the CPU: a library that ONNX Runtime loads as custom operators of the domain ``llmopt.kernels``.

It is compiled when llmopt is installed. ``kernels.cpp`` says what is in it.
"""

import ctypes
from pathlib import Path
from typing import Any

from llmopt.optimizer.errors import UnsupportedError

__all__ = ["DOMAIN", "FEATURE", "instructions", "library", "register"]

DOMAIN = "llmopt.kernels"
FEATURE = "kernels"
"""The feature of an engine that needs the library."""


def library() -> Path | None:
    """The compiled library; None where llmopt was installed without a C++ compiler."""
    return next(iter(sorted(Path(__file__).parent.glob("_kernels*.so"))), None)


def register(options: Any) -> None:
    """Let sessions made with ``options``, an ``onnxruntime.SessionOptions``, have graphs with these operators.

    Raises:
        UnsupportedError: llmopt was installed without the library.
    """
    path = library()
    if path is None:
        raise UnsupportedError(
            "the engine uses llmopt's kernels, and this llmopt was installed without them",
            hint="install a C++ compiler and llmopt again, or build the engine with kernels: onnxruntime",
        )
    options.register_custom_ops_library(str(path))


def instructions() -> str:
    """Which instructions the kernels use on this CPU: ``avx512``, ``avx2`` or ``plain``; ``none`` without library."""
    path = library()
    if path is None:
        return "none"
    name = ctypes.CDLL(str(path)).llmopt_instructions
    name.restype = ctypes.c_char_p
    found: bytes = name()
    return found.decode()
