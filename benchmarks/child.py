"""Runs a program as a child process and says what it took."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmopt.optimizer.errors import LlmoptError

__all__ = ["ChildError", "Finished", "llmopt_command", "run"]


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


def run(command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None) -> Finished:
    """Run ``command`` to its end; what it says on standard error goes to ``log``.

    Args:
        command: Program and arguments.
        log: Overwritten.
        environment: Variables added to this process's own.

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
            env={**os.environ, **(environment or {})},
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        said = (output.read_text("utf-8") + log.read_text("utf-8"))[-2000:]
        raise ChildError(f"{' '.join(command)} ended with {process.returncode}:\n{said}", hint=f"the log is {log}")
    return Finished(output.read_text("utf-8"), seconds, usage.ru_maxrss * 1024)
