"""How far a command is: bars with time left for a person, one line per step for a log, JSON lines for a program."""

import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["Bars", "JsonLines", "Lines", "Progress", "Silent", "Tick", "choose"]


class Tick(Protocol):
    """Reports progress within a step; the same call as ``PassContext.progress``."""

    def __call__(self, done: int, total: int | None = None, /) -> None:
        """``done`` units of ``total`` are finished; ``total`` may become known, or change, on the way."""


class Progress(ABC):
    """Where steps, notes and results are shown.

    Steps may nest. A step that ends with an exception is reported as failed, and the exception goes on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` gives seconds; only differences of it are used."""
        self._clock = clock

    @contextmanager
    def step(self, name: str, *, total: int | None = None) -> Iterator[Tick]:
        """Time one step and yield what its progress is reported to.

        Args:
            name: As shown.
            total: How many units the step has; None when that is not known.
        """
        started = self._clock()
        token = self._started(name, total)

        def tick(done: int, total: int | None = total, /) -> None:
            self._ticked(token, done, total, self._clock() - started)

        try:
            yield tick
        except BaseException:
            self._ended(token, self._clock() - started, failed=True)
            raise
        self._ended(token, self._clock() - started, failed=False)

    @abstractmethod
    def note(self, text: str) -> None:
        """Tell the user one fact, such as a fallback."""

    def result(self, data: Mapping[str, Any]) -> None:  # noqa: B027 - only programs read it; commands print for people
        """What the command arrived at, as plain data. Shown by ``JsonLines`` only."""

    @abstractmethod
    def _started(self, name: str, total: int | None) -> Any:
        """Show that a step began; the value identifies it in the two calls below."""

    @abstractmethod
    def _ticked(self, token: Any, done: int, total: int | None, seconds: float) -> None: ...

    @abstractmethod
    def _ended(self, token: Any, seconds: float, *, failed: bool) -> None: ...


class Silent(Progress):
    """Shows nothing; for tests and for use as a library."""

    def note(self, text: str) -> None:
        """See ``Progress.note``."""

    def _started(self, name: str, total: int | None) -> None: ...

    def _ticked(self, token: None, done: int, total: int | None, seconds: float) -> None: ...

    def _ended(self, token: None, seconds: float, *, failed: bool) -> None: ...


class Lines(Progress):
    """One line when a step has ended: for logs, where a bar would be noise."""

    def __init__(self, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """``stream`` defaults to stderr."""
        super().__init__(clock)
        self._stream = stream

    def note(self, text: str) -> None:
        """See ``Progress.note``."""
        self._write(text)

    def _started(self, name: str, total: int | None) -> str:  # noqa: ARG002 - a log shows no totals
        return name

    def _ticked(self, token: str, done: int, total: int | None, seconds: float) -> None: ...

    def _ended(self, token: str, seconds: float, *, failed: bool) -> None:
        self._write(_ending(token, seconds, failed=failed))

    def _write(self, text: str) -> None:
        print(text, file=self._stream or sys.stderr, flush=True)


class Bars(Progress):
    """A bar with elapsed time and time left for each running step, and a line for each that has ended."""

    def __init__(self, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """``stream`` is a terminal; it defaults to stderr."""
        super().__init__(clock)
        self._bars = _rich_bars(stream or sys.stderr)
        self._names: dict[TaskID, str] = {}

    def note(self, text: str) -> None:
        """See ``Progress.note``."""
        self._bars.console.print(text, markup=False, highlight=False)

    def _started(self, name: str, total: int | None) -> "TaskID":
        if not self._names:
            self._bars.start()
        token = self._bars.add_task(_escape(name), total=total)
        self._names[token] = name
        return token

    def _ticked(self, token: "TaskID", done: int, total: int | None, seconds: float) -> None:  # noqa: ARG002 - rich has its own clock
        self._bars.update(token, completed=done, total=total)

    def _ended(self, token: "TaskID", seconds: float, *, failed: bool) -> None:
        name = self._names.pop(token)
        self._bars.remove_task(token)
        self.note(_ending(name, seconds, failed=failed))
        if not self._names:
            self._bars.stop()


class JsonLines(Progress):
    """One JSON object per line on stdout. The events are described in docs/json-events.md."""

    def __init__(
        self, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic, *, interval: float = 0.5
    ) -> None:
        """``interval`` is the least time in seconds between two progress events of a step; 0 shows all."""
        super().__init__(clock)
        self._stream = stream
        self._interval = interval
        self._shown: dict[int, float] = {}
        self._names: list[str] = []

    def note(self, text: str) -> None:
        """See ``Progress.note``."""
        self._emit("note", text=text)

    def result(self, data: Mapping[str, Any]) -> None:
        """See ``Progress.result``."""
        self._emit("result", result=dict(data))

    def _started(self, name: str, total: int | None) -> int:
        self._names.append(name)
        self._emit("started", step=name, total=total)
        return len(self._names) - 1

    def _ticked(self, token: int, done: int, total: int | None, seconds: float) -> None:
        if seconds - self._shown.get(token, 0.0) < self._interval and done != total:
            return
        self._shown[token] = seconds
        left = round(seconds * (total - done) / done, 1) if total and done else None
        self._emit("progress", step=self._names[token], done=done, total=total, seconds=round(seconds, 3), left=left)

    def _ended(self, token: int, seconds: float, *, failed: bool) -> None:
        self._emit("failed" if failed else "finished", step=self._names[token], seconds=round(seconds, 3))

    def _emit(self, event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}), file=self._stream or sys.stdout, flush=True)


def choose(*, as_json: bool = False, quiet: bool = False) -> Progress:
    """What fits this process: JSON lines or nothing when asked for, bars on a terminal, else lines."""
    if as_json:
        return JsonLines()
    if quiet:
        return Silent()
    return Bars() if sys.stderr.isatty() else Lines()


def _ending(name: str, seconds: float, *, failed: bool) -> str:
    return f"{name}: {'failed after ' if failed else ''}{seconds:.1f} s"


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _rich_bars(stream: IO[str]) -> "RichProgress":
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=30),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        console=Console(file=stream),
        transient=True,
    )
