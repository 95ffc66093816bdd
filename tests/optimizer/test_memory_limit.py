"""A build within a limit of memory: refused where nothing fits, named where it is met, and gone afterwards."""

import mmap
import resource
import sys

import pytest

from llmopt.optimizer import memory_limit as limits
from llmopt.optimizer.errors import ResourceError
from llmopt.optimizer.memory_limit import memory_limit


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> float:
    """GB in use, fixed."""
    monkeypatch.setattr(limits, "_in_use", lambda: 64_000_000_000)
    return 64.0


@pytest.mark.parametrize("threads", [1, 100])
def test_a_limit_below_what_is_in_use_and_the_libraries_is_refused_at_once(used: float, threads: int) -> None:
    least = used + 0.2 + threads * 0.016
    with memory_limit(least + 0.001, threads=threads):
        pass
    with pytest.raises(ResourceError, match=rf"max_ram_gb: \S+ is too little: .* take {least:.2f} GB") as caught:
        memory_limit(least - 0.001, threads=threads).__enter__()
    assert caught.value.exit_code == 7
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a limit counts")
def test_what_is_in_use_grows_with_what_is_allocated() -> None:
    before = limits._in_use()
    # Of the system itself: an array might lie in what the C library kept of memory that was freed.
    with mmap.mmap(-1, 50_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
        assert 50_000_000 <= limits._in_use() - before <= 60_000_000


def test_an_allocation_beyond_it_is_told_with_its_name(used: float) -> None:
    limit = memory_limit(80, threads=1)
    with pytest.raises(ResourceError, match=r"needs more memory than resources\.max_ram_gb: 80"), limit:
        bytearray(200_000_000_000)


def test_other_errors_pass_and_the_limit_ends(used: float) -> None:
    with pytest.raises(ValueError, match="other"), memory_limit(80, threads=1):
        raise ValueError("other")
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


def test_without_a_limit_nothing_is_refused(used: float) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with memory_limit(None, threads=1):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before
