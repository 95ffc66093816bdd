"""Runs a program as a child process and says what it took."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmopt.optimizer.errors import LlmoptError

__all__ = ["ChildError", "Finished", "last_line", "llmopt_command", "peak_memory", "run"]


class ChildError(LlmoptError):
    """A program that a benchmark needs ended with an error."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A program that ended well.

    Attributes:
        output: Its standard output.
        seconds: From start to end.
        peak_bytes: The largest resident memory it had; its own children are not counted.
    """

    output: str
    seconds: float
    peak_bytes: int


def llmopt_command() -> str:
    """The ``llmopt`` program of this environment."""
    return str(Path(sys.executable).with_name("llmopt"))


def run(
    command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None, directory: Path | None = None
) -> Finished:
    """Run ``command`` to its end; what it says on standard error goes to ``log``.

    Args:
        command: Program and arguments.
        log: Overwritten.
        environment: Variables added to this process's own.
        directory: Where it runs; None for where this process does.

    Raises:
        ChildError: It ended with an error; the message holds the end of the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    output = log.with_suffix(".out")
    with output.open("wb") as stdout, log.open("wb") as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=directory,
            env={**os.environ, **(environment or {})},
        )
        try:
            peak = _wait(process)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - started
    if process.returncode:
        said = (output.read_text("utf-8") + log.read_text("utf-8"))[-2000:]
        raise ChildError(f"{' '.join(command)} ended with {process.returncode}:\n{said}", hint=f"the log is {log}")
    return Finished(output.read_text("utf-8"), seconds, peak)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end of ``process`` and return its peak memory in bytes.

    The kernel's own high-water mark is read while the process lives: what ``wait4`` reports at its end is no less
    than the memory this process had when it started the other one.
    """
    peak = 0
    while process.poll() is None:
        peak = max(peak, peak_memory(process.pid))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
    return peak


def peak_memory(pid: int) -> int:
    """The most memory in bytes that a process had resident; 0 where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("utf-8")
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def last_line(error: LlmoptError) -> str:
    """What a failure comes to in a table: of a program that ended, the last line that it said."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not isinstance(error, ChildError):
        return lines[0]
    return next((line for line in reversed(lines) if not line.startswith("hint:")), "no word")
