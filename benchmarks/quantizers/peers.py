"""The other programs that quantize."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmopt.benchmarks.child import Finished
from llmopt.benchmarks.peer import TORCH, Peer, installed, run_script

__all__ = ["PEERS", "make_environment", "run_peer"]

_HERE = Path(__file__).parent

_GPTQMODEL = (
    TORCH,
    "accelerate==1.15.0",
    "datasets==5.1.0",
    "defuser",
    "device-smi",
    "dill",
    "jinja2",
    "logbar",
    "ninja",
    "numpy==2.4.6",
    "pillow",
    "protobuf",
    "pyarrow",
    "pypcre",
    "requests",
    "safetensors==0.8.0",
    "setuptools==84.2.1",
    "threadpoolctl",
    "tokenicer",
    "torchao==0.18.0",
    "transformers==5.20.2",
)
"""What GPTQModel 7.7 needs, but for the torch 2.14.1 that it asks for."""

PEERS: Mapping[str, Peer] = {
    "gptqmodel": Peer(
        "GPTQModel 7.7.0",
        _HERE / "run_gptqmodel.py",
        _GPTQMODEL,
        alone=("gptqmodel==7.7.0",),
        environment={"GPTQMODEL_CPU_WORKERS": "2"},  # on two cores it starts one and then asks for two
    ),
    "llmcompressor": Peer(
        "llm-compressor 0.14.0.1", _HERE / "run_llmcompressor.py", (TORCH, "llmcompressor==0.14.0.1")
    ),
    "nncf": Peer(
        "NNCF 3.4.0, OpenVINO 2026.4.1",
        _HERE / "run_nncf.py",
        (TORCH, "nncf==3.4.0", "openvino==2026.4.1", "transformers==5.5.4"),
    ),
}


def make_environment(name: str, directory: Path) -> Path:
    """The Python of a program's environment in ``directory/NAME``, made anew when its requirements changed.

    Raises:
        ChildError: The installation failed.
    """
    return installed(PEERS[name], directory / name)


def run_peer(
    python: Path, name: str, options: Mapping[str, Any], *, checkpoint: Path, windows: Path, output: Path, threads: int
) -> Finished:
    """Quantize ``checkpoint`` into ``output``, which is replaced.

    Args:
        python: Of the program's environment.
        name: Of the program.
        options: For its script.
        checkpoint: A plain checkpoint.
        windows: Calibration text, a NumPy file of int64 ``[windows, tokens]``.
        output: A folder.
        threads: Of PyTorch or OpenVINO.

    Raises:
        ChildError: It failed.
    """
    arguments = {
        "checkpoint": str(checkpoint.absolute()),
        "windows": str(windows.absolute()),
        "options": dict(options),
    }
    return run_script(python, PEERS[name], arguments, output=output, threads=threads)
