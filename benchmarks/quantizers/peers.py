"""The other programs: what is installed for each, in an environment of its own, and how its script is run."""

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmopt.benchmarks.child import Finished, run
from llmopt.benchmarks.report import say

__all__ = ["PEERS", "Peer", "make_environment", "run_peer"]

_TORCH = "torch==2.13.0"
"""A build for the CPU that constraints.txt pins too; other versions come with gigabytes of CUDA."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Another program.

    Attributes:
        title: As printed, with its version.
        script: What runs it, beside this file. It imports nothing of llmopt, which its environment does not have.
        install: Requirements, installed with what they need.
        alone: Requirements installed afterwards without what they need, because that contradicts ``install``.
        environment: Variables that it needs.
    """

    title: str
    script: str
    install: tuple[str, ...]
    alone: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


_GPTQMODEL_NEEDS = (
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

PEERS: Mapping[str, Peer] = {
    "gptqmodel": Peer(
        "GPTQModel 7.7.0",
        "run_gptqmodel.py",
        (_TORCH, *_GPTQMODEL_NEEDS),
        alone=("gptqmodel==7.7.0",),  # asks for torch 2.14.1
        environment={"GPTQMODEL_CPU_WORKERS": "2"},  # on two cores it starts one and then asks for two
    ),
    "llmcompressor": Peer("llm-compressor 0.14.0.1", "run_llmcompressor.py", (_TORCH, "llmcompressor==0.14.0.1")),
    "nncf": Peer(
        "NNCF 3.4.0, OpenVINO 2026.4.1",
        "run_nncf.py",
        (_TORCH, "nncf==3.4.0", "openvino==2026.4.1", "transformers==5.5.4"),
    ),
}


def make_environment(name: str, directory: Path) -> Path:
    """The Python of a program's environment in ``directory/NAME``, made anew when its requirements changed.

    Raises:
        ChildError: The installation failed.
    """
    peer, home = PEERS[name], directory / name
    python, record = home / "bin" / "python", home / "installed.json"
    wanted = json.dumps([peer.install, peer.alone])
    if record.is_file() and record.read_text("utf-8") == wanted:
        return python.absolute()
    say(f"installing {peer.title} in {home}")
    run([sys.executable, "-m", "venv", "--clear", str(home)], log=directory / f"{name}.venv.log")
    pip = [str(python.absolute()), "-m", "pip", "install", "--quiet"]
    run([*pip, *peer.install], log=directory / f"{name}.pip.log")
    if peer.alone:
        run([*pip, "--no-deps", "--no-build-isolation", *peer.alone], log=directory / f"{name}.alone.log")
    record.write_text(wanted, encoding="utf-8")
    return python.absolute()


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
    shutil.rmtree(output, ignore_errors=True)
    script = Path(__file__).with_name(PEERS[name].script)
    arguments = {
        "checkpoint": str(checkpoint.absolute()),
        "windows": str(windows.absolute()),
        "output": str(output.absolute()),
        "threads": threads,
        "options": dict(options),
    }
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONPATH": "",
        "PYTHONSAFEPATH": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **PEERS[name].environment,
    }
    log = output.with_name(f"{output.name}-{hashlib.sha256(json.dumps(arguments).encode()).hexdigest()[:8]}.log")
    command = [str(python), str(script.absolute()), json.dumps(arguments)]
    # GPTQModel writes a folder with logs to where it runs.
    return run(command, log=log, environment=environment, directory=output.parent)
