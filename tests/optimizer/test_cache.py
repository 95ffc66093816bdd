"""The cache's building blocks: keys, locks, and directories that appear whole or not at all."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llmopt.optimizer import cache
from llmopt.optimizer.cache import cache_root, digest_of, locked, publish, sources_digest


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def fail(directory: Path, error: type[BaseException] = ValueError, *, also: Path | None = None) -> None:
    """Fail after writing into the temporary directory, and into ``also``."""
    with publish(directory) as partial:
        (partial / "file").write_text("x")
        if also:
            also.write_text("x")
        raise error


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LLMOPT_CACHE": "/c", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/c"),
        ({"LLMOPT_CACHE": "", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/llmopt"),
        ({"LLMOPT_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/llmopt"),
    ],
)
def test_the_cache_is_where_the_environment_says(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_root() == Path(expected)


def test_a_digest_depends_on_values_and_not_on_the_order_of_keys() -> None:
    assert digest_of({"a": 1, "b": [2.0, "x"]}) == digest_of({"b": [2.0, "x"], "a": 1})
    assert digest_of(["a", "b"]) != digest_of(["b", "a"])
    assert digest_of([1]) != digest_of(["1"])


def test_the_digest_of_sources_sees_code_but_no_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("optimizer/cache.py", "passes/a.py", "passes/graph/b.py", "docs/page.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "optimizer/cache.py"))
    before = sources_digest()
    (tmp_path / "docs/page.md").write_text("changed\n")
    assert sources_digest() == before
    (tmp_path / "passes/graph/b.py").write_text("x = 2\n")
    changed = sources_digest()
    (tmp_path / "passes/graph/b.py").rename(tmp_path / "passes/graph/c.py")
    assert len({before, changed, sources_digest()}) == 3


def test_a_lock_that_is_held_can_be_waited_for_or_not(tmp_path: Path) -> None:
    entered = threading.Event()

    def wait() -> None:
        with locked(tmp_path / "made" / "thing"):
            entered.set()

    with locked(tmp_path / "made" / "thing"):
        with pytest.raises(BlockingIOError), locked(tmp_path / "made" / "thing", wait=False):
            pass
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not entered.wait(0.1)
    waiting.join(timeout=30)
    assert entered.is_set()


def test_a_lock_ends_with_an_exception(tmp_path: Path) -> None:
    with pytest.raises(ValueError), locked(tmp_path / "thing"):
        raise ValueError
    with locked(tmp_path / "thing", wait=False):
        pass


def test_a_lock_ends_with_the_process_however_that_ends(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\nfrom llmopt.optimizer.cache import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    path = tmp_path / "thing"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError), locked(path, wait=False):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    with locked(path, wait=False):
        pass


def test_a_directory_appears_when_it_is_whole(tmp_path: Path) -> None:
    with publish(tmp_path / "a" / "b") as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert names(tmp_path / "a") == ["b"]
    assert (tmp_path / "a" / "b" / "deep" / "file").read_text() == "x"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_not_even_the_folders_above(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        fail(tmp_path / "a" / "b" / "c", error)
    assert names(tmp_path) == []


def test_a_failure_leaves_folders_that_hold_something_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        fail(tmp_path / "a" / "b", also=tmp_path / "a" / "other")
    assert names(tmp_path / "a") == ["other"]


def test_what_a_killed_process_left_is_no_part_of_the_next_directory(tmp_path: Path) -> None:
    (tmp_path / ".build.partial").mkdir()
    (tmp_path / ".build.partial" / "old").write_text("x")
    with publish(tmp_path / "build") as partial:
        (partial / "new").write_text("x")
    assert names(tmp_path) == ["build"]
    assert names(tmp_path / "build") == ["new"]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "old").write_text("x")
    return tmp_path / "build"


def test_an_existing_directory_is_replaced(old: Path) -> None:
    with publish(old) as partial:
        (partial / "new").write_text("x")
        assert names(old) == ["old"]
    assert names(old) == ["new"]
    assert names(old.parent) == ["build"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_replacement_leaves_the_old_directory(old: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        fail(old, error)
    assert names(old) == ["old"]
    assert names(old.parent) == ["build"]


def test_an_interruption_between_the_two_renames_puts_the_old_directory_back(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name == ".build.partial":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), publish(old) as partial:
        (partial / "new").write_text("x")
    assert names(old) == ["old"]
    assert names(old.parent) == ["build"]


def test_a_kill_between_the_two_renames_is_mended_by_the_next_one(old: Path) -> None:
    old.rename(old.parent / ".build.replaced")
    with pytest.raises(ValueError):
        fail(old)
    assert names(old) == ["old"]
    assert names(old.parent) == ["build"]


def test_a_kill_after_the_two_renames_leaves_nothing_after_the_next_one(old: Path) -> None:
    (old.parent / ".build.replaced").mkdir()
    with pytest.raises(ValueError):
        fail(old)
    assert names(old) == ["old"]
    assert names(old.parent) == ["build"]


def test_a_disk_that_fails_while_files_are_put_on_it_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), publish(tmp_path / "build") as partial:
        (partial / "file").write_text("x")
    assert names(tmp_path) == []
