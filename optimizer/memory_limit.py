"""The limit of memory that a recipe gives its build, and what helps to keep within it."""

import ctypes
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmopt.optimizer.errors import ResourceError, is_out_of_memory

__all__ = ["memory_limit", "return_memory"]

_STATUS = Path("/proc/self/status")

_LIBRARIES = 200_000_000
"""Bytes that the libraries a build imports later take, and a build of the smallest model in them."""

_THREAD = 16_000_000
"""Bytes of one thread's stacks: torch and ONNX Runtime each have as many threads as the recipe says."""


@contextmanager
def memory_limit(gigabytes: float | None, *, threads: int) -> Iterator[None]:
    """Let allocations beyond ``resources.max_ram_gb`` fail. Files that are only mapped do not count.

    Args:
        gigabytes: The limit; None for none.
        threads: Of the build.

    Raises:
        ResourceError: The build needs more; or the limit is so low that libraries would end the process where they
            cannot allocate, without a word.
    """
    if gigabytes is None:
        yield
        return
    limit, least = int(gigabytes * 1e9), _in_use() + _LIBRARIES + threads * _THREAD
    if limit < least:
        raise ResourceError(
            f"resources.max_ram_gb: {gigabytes:g} is too little: the libraries of a build alone take "
            f"{least / 1e9:.2f} GB",
            hint="raise it",
        )
    before = resource.getrlimit(resource.RLIMIT_DATA)
    lower = [limit, *(value for value in before if value != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(lower), before[1]))
    try:
        yield
    except Exception as error:
        # Extension modules whose allocation fails while they are imported raise SystemError.
        if not is_out_of_memory(error) and not isinstance(error, SystemError):
            raise
        raise ResourceError(
            f"the build needs more memory than resources.max_ram_gb: {gigabytes:g}",
            hint="raise it; passes that were finished are not run again",
        ) from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def return_memory() -> None:
    """Give freed memory back to the system, where the C library is one that holds on to it (glibc).

    It keeps what lies between blocks that are still used: going through a model's layers that adds up.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _in_use() -> int:
    """Bytes of this process that the limit counts: its data segment and private mappings that can be written."""
    found = re.search(r"^VmData:\s+(\d+) kB$", _STATUS.read_text("utf-8"), re.MULTILINE) if _STATUS.is_file() else None
    return int(found[1]) * 1024 if found else 0
