"""What a build cost on this machine: ``build-record.json``, kept apart because it differs from run to run."""

import json
import os
import platform
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["RECORD_NAME", "BuildRecord", "peak_memory", "read_record"]

RECORD_NAME = "build-record.json"

_PROCESS = Path("/proc/self")


class BuildRecord:
    """Collects seconds and peak memory per step."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._date = datetime.now(UTC).isoformat(timespec="seconds")
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, int] = {}
        self._between = 0
        """Peak of what runs outside of steps."""
        _reset_peak()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time one step and take its peak memory."""
        started = time.monotonic()
        self._between = max(self._between, peak_memory())
        _reset_peak()
        yield
        self._seconds[name] = round(time.monotonic() - started, 3)
        self._peaks[name] = peak_memory()

    def save(self, directory: Path) -> None:
        """Write ``build-record.json``."""
        peak = max(self._between, peak_memory(), *self._peaks.values())
        data: dict[str, Any] = {
            "date": self._date,
            "seconds": {**self._seconds, "total": round(time.monotonic() - self._started, 3)},
            "peak_memory_bytes": peak,
            "peak_memory_bytes_by_step": self._peaks,
            "host": {
                "system": platform.platform(),
                "machine": platform.machine(),
                "python": platform.python_version(),
                "cores": len(os.sched_getaffinity(0)),
            },
        }
        (directory / RECORD_NAME).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_record(directory: Path) -> dict[str, Any] | None:
    """What the build in ``directory`` cost where it was made; None where that was not kept or cannot be read."""
    try:
        data = json.loads((directory / RECORD_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def peak_memory() -> int:
    """The largest resident memory of this process in bytes, since it began or since the kernel's mark was reset.

    Resident is what lies in RAM: the process's own memory, and the pages of mapped files that it has touched.
    """
    status = _PROCESS / "status"
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text("utf-8"), re.MULTILINE) if status.is_file() else None
    return (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


def _reset_peak() -> None:
    """Have the kernel measure from here on. Where it cannot, a step's figure contains the steps before it."""
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5", "ascii")
