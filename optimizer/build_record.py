"""What a build cost on this machine: ``build-record.json``, kept apart because it differs from run to run."""

import json
import os
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["RECORD_NAME", "BuildRecord", "read_record"]

RECORD_NAME = "build-record.json"


class BuildRecord:
    """Collects seconds per step."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._date = datetime.now(UTC).isoformat(timespec="seconds")
        self._seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time one step."""
        started = time.monotonic()
        yield
        self._seconds[name] = round(time.monotonic() - started, 3)

    def save(self, directory: Path) -> None:
        """Write ``build-record.json``."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        data: dict[str, Any] = {
            "date": self._date,
            "seconds": {**self._seconds, "total": round(time.monotonic() - self._started, 3)},
            "peak_memory_bytes": usage.ru_maxrss * 1024,
            "host": {
                "system": platform.platform(),
                "machine": platform.machine(),
                "python": platform.python_version(),
                "cores": len(os.sched_getaffinity(0)),
            },
        }
        (directory / RECORD_NAME).write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_record(directory: Path) -> dict[str, Any] | None:
    """What the build in ``directory`` cost where it was made; None where that was not kept or cannot be read."""
    try:
        data = json.loads((directory / RECORD_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return data if isinstance(data, dict) else None
