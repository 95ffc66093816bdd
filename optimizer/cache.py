"""Where finished work is kept: content-addressed directories, each written whole or not at all."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["cache_root", "digest_of", "locked", "publish", "sources_digest"]


def cache_root() -> Path:
    """``$LLMOPT_CACHE``, else ``$XDG_CACHE_HOME/llmopt``, else ``~/.cache/llmopt``."""
    if explicit := os.environ.get("LLMOPT_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmopt"


def digest_of(value: Any) -> str:
    """sha256 of plain data in canonical JSON, hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sources_digest() -> str:
    """sha256 over llmopt's own Python files, so that a changed compiler never finds an older one's results."""
    root = Path(__file__).parent.parent
    total = hashlib.sha256()
    for package in ("calibration", "exporters", "optimizer", "passes"):
        for path in sorted((root / package).rglob("*.py")):
            total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock named after ``path``. It ends with the process, however that ends.

    Args:
        path: What the lock is for; the lock itself is a file beside it.
        wait: Whether a second process waits, or fails at once.

    Raises:
        BlockingIOError: Another process holds the lock and ``wait`` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


@contextmanager
def publish(directory: Path) -> Iterator[Path]:
    """Yield a sibling temporary directory that becomes ``directory`` on success and vanishes on failure.

    What a killed process left behind is removed first, so hold ``locked(directory)`` around this. An existing
    ``directory`` is replaced, and stays as it is on failure; folders made on the way to it vanish again too.
    """
    partial, replaced = (directory.with_name(f".{directory.name}.{state}") for state in ("partial", "replaced"))
    missing = [folder for folder in directory.absolute().parents if not folder.exists()]
    _put_back(replaced, directory)
    if partial.exists():
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
        yield partial
        _sync(partial)
        if directory.exists():
            directory.rename(replaced)
        partial.rename(directory)
    except BaseException:
        _put_back(replaced, directory)
        shutil.rmtree(partial, ignore_errors=True)
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _put_back(replaced: Path, directory: Path) -> None:
    """End a replacement that stopped between its two renames, or after them."""
    if replaced.exists() and not directory.exists():
        replaced.rename(directory)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Put every file and folder of ``directory`` on disk before the rename makes it visible."""
    for path in (directory, *directory.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
