"""How a command ends: every outcome becomes a message on stderr and an exit code of docs/architecture.md."""

import errno
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click

from llmopt.optimizer.errors import (
    InputError,
    LlmoptError,
    MissingExtraError,
    RecipeError,
    ResourceError,
    is_out_of_memory,
)

__all__ = ["exit_code_of", "interrupted_by_signals"]

_BUG = 1
_INTERRUPTED = 130
_PIPE_CLOSED = 128 + signal.SIGPIPE

_DISK_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file system allows no file this large",
}
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")
"""What numpy says when a disk is full, without the number of the error."""

_UNUSABLE_PATH = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG}

_EXTRA_OF = {"onnxruntime": "cpu", "starlette": "serve", "uvicorn": "serve"}


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise ``KeyboardInterrupt``, so that temporary directories are removed on the way out.

    Only the first one counts: a second must not break into the cleaning up. A signal the parent told this process
    to ignore (``nohup``) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of handlers
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    watched = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]
    for each in watched:
        signal.signal(each, interrupt)
    try:
        yield
    finally:
        for each in watched:
            signal.signal(each, signal.SIG_DFL)


def exit_code_of(body: Callable[[], object], *, wants_traceback: Callable[[], bool]) -> int:
    """Run a command and report how it ended.

    Args:
        body: The command; a returned int is its exit code.
        wants_traceback: Asked after a failure: whether to print the traceback too.
    """
    try:
        result = body()
        sys.stdout.flush()
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted")
        return _INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output went away. Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except Exception as error:  # noqa: BLE001 - the outermost handler: the user gets a message and an exit code
        if wants_traceback():
            traceback.print_exc()
        return _report(error, with_traceback=wants_traceback())
    return result if isinstance(result, int) else 0


def _report(error: Exception, *, with_traceback: bool) -> int:
    expected = error if isinstance(error, LlmoptError) else _translated(error)
    if expected is None:
        where = _last_own_line(error)
        _say(f"{type(error).__name__}: {error}{f' (at {where})' if where else ''}", prefix="error")
        seen = "the traceback is above" if with_traceback else "run again with --debug to see the traceback"
        _say(f"this is a bug in llmopt; {seen}, and report it", prefix="hint")
        return _BUG
    if isinstance(expected, RecipeError):
        for problem in expected.problems:
            _say(str(problem))
    _say(expected.message, prefix="error")
    if expected.hint:
        _say(expected.hint, prefix="hint")
    return expected.exit_code


def _translated(error: Exception) -> LlmoptError | None:
    """The error a user can do something about, for those that Python and libraries raise; None for a bug."""
    if isinstance(error, OSError) and (full := _disk_full(error)):
        where = f" while writing {error.filename}" if error.filename else ""
        hint = "make room and run it again; LLMOPT_CACHE and TMPDIR choose other disks"
        return ResourceError(f"{full}{where}", hint=hint)
    if isinstance(error, OSError) and error.errno in _UNUSABLE_PATH and error.filename:
        return InputError(f"cannot use {error.filename}: {error.strerror}")
    if is_out_of_memory(error):
        return ResourceError("out of memory", hint="close other programs, or use a machine with more memory")
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return MissingExtraError(package, _EXTRA_OF[package]) if package in _EXTRA_OF else None
    return None


def _disk_full(error: OSError) -> str | None:
    if error.errno is None:
        return "the disk is full" if _SHORT_WRITE.fullmatch(str(error)) else None
    return _DISK_FULL.get(error.errno)


def _last_own_line(error: Exception) -> str:
    """The innermost line of llmopt's own files in the traceback, as ``passes/awq.py:12``; empty when there is none."""
    root = Path(__file__).parents[2]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(root) and "site-packages" not in path.relative_to(root).parts:
            return f"{path.relative_to(root)}:{frame.lineno}"
    return ""


def _say(text: str, *, prefix: str = "") -> None:
    colors = {"error": "red", "hint": "cyan"}
    head = click.style(f"{prefix}:", fg=colors[prefix], bold=True) + " " if prefix else ""
    click.echo(head + text, err=True)
