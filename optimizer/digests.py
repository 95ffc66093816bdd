"""sha256 of the files a model was read from, remembered so that gigabytes are not hashed twice."""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmopt.optimizer.cache import locked

__all__ = ["file_digests"]

# A file changed just now can change again within the resolution of its time stamp.
_SETTLED_NS = 2_000_000_000


def file_digests(files: Mapping[str, Path], cache: Path) -> dict[str, str]:
    """Hash every file, or take the digest from ``cache/digests.json`` when size, time and inode are the same.

    Args:
        files: Any name -> file.
        cache: Directory of the memory; a damaged one is started anew.

    Returns:
        The same names -> sha256, hexadecimal.
    """
    memory = cache / "digests.json"
    known = _read(memory)
    digests: dict[str, str] = {}
    learned: dict[str, dict[str, Any]] = {}
    for name, path in files.items():
        real = path.resolve()
        stamp = _stamp(real)
        entry = known.get(str(real))
        if isinstance(entry, dict) and entry.get("stamp") == stamp and isinstance(entry.get("sha256"), str):
            digests[name] = entry["sha256"]
            continue
        digests[name] = _sha256(real)
        if time.time_ns() - stamp[1] > _SETTLED_NS and _stamp(real) == stamp:
            learned[str(real)] = {"stamp": stamp, "sha256": digests[name]}
    if learned:
        _remember(memory, learned)
    return digests


def _stamp(path: Path) -> list[int]:
    """Size in bytes, time of change in ns, inode."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(memory: Path) -> dict[str, Any]:
    try:
        value = json.loads(memory.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _remember(memory: Path, learned: Mapping[str, Any]) -> None:
    with locked(memory):
        partial = memory.with_name(f".{memory.name}.partial")
        partial.write_text(json.dumps({**_read(memory), **learned}, indent=1, sort_keys=True))
        partial.replace(memory)
