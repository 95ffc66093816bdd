"""Which of its integer kernels ONNX Runtime can use on this machine's CPU without computing something else."""

import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal

__all__ = ["LARGEST_BLOCK", "VNNI", "Instructions", "host_instructions"]

Instructions = Literal["vnni", "avx2"]
"""vnni: products of uint8 and int8 are summed in 32 bits (AVX512-VNNI, AMX; all ARM kernels). avx2: they are summed in
pairs of 16 bits, which overflow; and blocks of 32 columns in 4 bits sum one row otherwise than several. CPUs with
AVX-VNNI alone count as avx2, which is right on every CPU: nobody has measured the blocks there."""

VNNI = "vnni"
"""The feature of an engine whose kernels were chosen for the first."""

LARGEST_BLOCK: Mapping[Instructions, Mapping[int, int]] = {
    "vnni": {8: 64, 4: 32, 2: 64},
    "avx2": {8: 64, 4: 16, 2: 32},
}
"""Columns of a block of weights, by bits: kernels compute larger ones in pairs of rows and an odd last row differently,
so that results would depend on the batch."""

_FLAGS = {"avx512_vnni", "amx_int8"}
_X86 = {"x86_64", "amd64", "i386", "i686"}


@cache
def host_instructions() -> Instructions:
    """Those of this machine; of an x86 CPU that does not tell, the ones that are right on every CPU."""
    if platform.machine().lower() not in _X86:
        return "vnni"
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "avx2"
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return "avx2" if _FLAGS.isdisjoint(flags.split()) else "vnni"
