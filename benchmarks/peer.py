"""Another program: what is installed for it, in an environment of its own, and how its script is run."""

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

__all__ = ["TORCH", "Peer", "installed", "run_script"]

TORCH = "torch==2.13.0"
"""A build for the CPU that constraints.txt pins too; other versions come with gigabytes of CUDA."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Another program.

    Attributes:
        title: As printed, with its version.
        script: What runs it. It imports nothing of llmopt, which its environment does not have.
        install: Requirements, installed with what they need.
        alone: Requirements installed afterwards without what they need, because that contradicts ``install``.
        environment: Variables that it needs, also while it is installed.
    """

    title: str
    script: Path
    install: tuple[str, ...]
    alone: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def installed(peer: Peer, home: Path) -> Path:
    """The Python of a program's environment in ``home``, made anew when its requirements changed.

    Raises:
        ChildError: The installation failed.
    """
    python, record = home / "bin" / "python", home / "installed.json"
    wanted = json.dumps([peer.install, peer.alone])
    if record.is_file() and record.read_text("utf-8") == wanted:
        return python.absolute()
    say(f"installing {peer.title} in {home}")
    run([sys.executable, "-m", "venv", "--clear", str(home)], log=home.with_suffix(".venv.log"))
    pip = [str(python.absolute()), "-m", "pip", "install", "--quiet"]
    run([*pip, *peer.install], log=home.with_suffix(".pip.log"), environment=peer.environment)
    if peer.alone:
        run([*pip, "--no-deps", "--no-build-isolation", *peer.alone], log=home.with_suffix(".alone.log"))
    record.write_text(wanted, encoding="utf-8")
    return python.absolute()


def run_script(python: Path, peer: Peer, arguments: Mapping[str, Any], *, output: Path, threads: int) -> Finished:
    """Run a program's script, which is handed ``arguments``, ``output`` and ``threads`` as JSON.

    Args:
        python: Of the program's environment.
        peer: The program.
        arguments: Paths as text, absolute.
        output: What it writes, a file or a folder; replaced.
        threads: Of its libraries.

    Raises:
        ChildError: It failed.
    """
    if output.is_dir():
        shutil.rmtree(output)
    given = {**arguments, "output": str(output.absolute()), "threads": threads}
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONPATH": "",
        "PYTHONSAFEPATH": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **peer.environment,
    }
    log = output.with_name(f"{output.name}-{hashlib.sha256(json.dumps(given).encode()).hexdigest()[:8]}.log")
    # Some programs write a folder with logs to where they run.
    command = [str(python), str(peer.script.absolute()), json.dumps(given)]
    return run(command, log=log, environment=environment, directory=output.parent)
