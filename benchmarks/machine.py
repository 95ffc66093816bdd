"""What a figure was measured on: without it, a figure says nothing."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import psutil
from pydantic import BaseModel

__all__ = ["Machine", "describe"]

_RELEVANT = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
"""Instruction sets, by their names in /proc/cpuinfo, that decide how fast integer matrix multiplication is."""


class Machine(BaseModel):
    """The processor and the libraries."""

    cpu: str
    cores: int
    features: list[str]
    missing: list[str]
    memory_gb: float
    python: str
    onnxruntime: str

    def line(self) -> str:
        """One line to print beside figures."""
        lacking = f" (without {', '.join(self.missing)})" if self.missing else ""
        return (
            f"{self.cpu}, {self.cores} cores, {self.memory_gb:.0f} GB; {', '.join(self.features)}{lacking}; "
            f"Python {self.python}, ONNX Runtime {self.onnxruntime}"
        )


def describe() -> Machine:
    """This machine."""
    text = Path("/proc/cpuinfo").read_text("utf-8") if Path("/proc/cpuinfo").is_file() else ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    by_name = {name.strip(): value.strip() for name, value in fields.items()}
    flags = set(by_name.get("flags", "").split())
    return Machine(
        cpu=by_name.get("model name", platform.machine()),
        cores=len(os.sched_getaffinity(0)),
        features=[name for name in _RELEVANT if name in flags],
        missing=[name for name in _RELEVANT if name not in flags],
        memory_gb=psutil.virtual_memory().total / 2**30,
        python=platform.python_version(),
        onnxruntime=version("onnxruntime"),
    )
