"""A server that takes part: started, asked, and what was measured of it; one that failed says why."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from llmopt.benchmarks.child import ChildError, last_line, peak_memory, run
from llmopt.benchmarks.load.events import Answer
from llmopt.benchmarks.load.servers import Contender, Launch, Subject
from llmopt.benchmarks.load.workload import Job
from llmopt.benchmarks.report import say
from llmopt.benchmarks.server import Server, free_port, running
from llmopt.optimizer.errors import LlmoptError

__all__ = ["Entrant", "Measured"]

_PATIENCE = 60.0
"""Seconds that a server is given to come to rest before the next one is measured."""

_REST = 0.1
"""Share of one core below which a server is at rest."""


@dataclass(slots=True)
class Measured:
    """Of one server, round by round.

    Attributes:
        throughput: Tokens per second, by clients.
        open: Answers to requests at given times, by load.
        cold: Seconds to the first token behind a prefix that is new.
        warm: The same behind one that was seen.
        peak_bytes: Of resident memory.
    """

    throughput: dict[int, list[float]] = field(default_factory=dict)
    open: dict[float, list[list[Answer]]] = field(default_factory=dict)
    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    peak_bytes: int = 0


@dataclass(slots=True)
class Entrant:
    """A server that takes part.

    Attributes:
        name: In ``SERVERS``.
        contender: What it is.
        folder: Where its log and the orders to ask it lie.
        measured: What came of it.
        error: Why it takes part no more; None while it does.
    """

    name: str
    contender: Contender
    folder: Path
    measured: Measured = field(default_factory=Measured)
    error: str | None = None
    _launch: Launch | None = None
    _server: Server | None = None

    def start(self, subject: Subject, stack: ExitStack) -> None:
        """Make what is missing and start it; it is stopped with ``stack``."""

        def started() -> None:
            self._launch = self.contender.prepare(subject)
            port = free_port()
            self._server = stack.enter_context(
                running(
                    self._launch.command(port),
                    port,
                    log=self._log,
                    health=self._launch.health,
                    environment=self._launch.environment,
                )
            )

        say(f"starting {self.contender.title}")
        self.attempt(started)

    @property
    def _log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def process(self) -> int:
        """The server's number."""
        assert self._server is not None
        return self._server.process

    def attempt(self, action: Callable[[], None]) -> None:
        """Do it if the server still takes part; if that fails it does no more."""
        if self.error is not None:
            return
        try:
            action()
            if self._server is not None:
                self.measured.peak_bytes = max(self.measured.peak_bytes, peak_memory(self.process))
        except LlmoptError as error:
            self.error = last_line(error)
            say(f"{self.contender.title} failed: {self.error}")

    def ask(self, jobs: Sequence[Job], **order: Any) -> list[Answer]:
        """Have the load generator ask for ``jobs``, and wait until the server is at rest again.

        Args:
            jobs: In this order.
            order: ``clients`` and ``seconds``, or ``times`` and ``patience``; see ``generator.py``.

        Raises:
            ChildError: The server is gone, or it refused a request.
        """
        assert self._launch is not None
        assert self._server is not None
        shared = {"stream": True, **self._launch.fields}
        bodies = [{"prompt": job.prompt, "max_tokens": job.max_tokens, **shared} for job in jobs]
        port = int(self._server.url.rpartition(":")[2])
        path = self.folder / f"{self.name}.order.json"
        path.write_text(json.dumps({"port": port, "bodies": bodies, **order}), encoding="utf-8")
        command = [sys.executable, "-m", "llmopt.benchmarks.load.generator", str(path)]
        finished = run(command, log=self.folder / f"{self.name}.generator.log")
        self._check_alive()
        answers = [_answer(plain) for plain in json.loads(finished.output)]
        if refused := next((answer.error for answer in answers if answer.error), None):
            raise ChildError(f"{self.contender.title} refused a request: {refused}")
        self._wait_for_rest()
        return answers

    def _check_alive(self) -> None:
        if not psutil.pid_exists(self.process) or psutil.Process(self.process).status() == psutil.STATUS_ZOMBIE:
            raise ChildError(f"{self.contender.title} has ended:\n{self._log.read_text('utf-8')[-2000:]}")

    def _wait_for_rest(self) -> None:
        """Until it works no more on what was cut off: servers share the cores."""
        process, deadline = psutil.Process(self.process), time.perf_counter() + _PATIENCE
        process.cpu_percent()
        while time.perf_counter() < deadline:
            time.sleep(0.3)
            if process.cpu_percent() < 100 * _REST:
                return
        say(f"{self.contender.title} still works {_PATIENCE:.0f} s after the last request was cut off")


def _answer(plain: dict[str, Any]) -> Answer:
    return Answer(plain["begun"], tuple(plain["times"]), plain["finish"], plain["error"])
