"""The thread that serves all requests, a step at a time.

It owns the backend and all requests in it; others only put messages in its inbox. Each step reports everything it did
at once.
"""

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from llmopt.optimizer.errors import InputError, LlmoptError
from llmopt.optimizer.lora.adapter_file import AdapterFile
from llmopt.runtime.backends.base import Backend
from llmopt.runtime.policy import Policy
from llmopt.runtime.request import Event, FinishReason, Request
from llmopt.runtime.runner import Runner, deliver_here
from llmopt.runtime.statistics import Statistics

__all__ = ["Engine", "EngineClosedError", "QueueFullError", "QueueLimits"]

logger = logging.getLogger(__name__)

_Message: TypeAlias = Literal["add", "cancel", "stop"]


class EngineClosedError(RuntimeError):
    """The engine has stopped and takes no more requests."""


class QueueFullError(LlmoptError):
    """Too much is unfinished.

    Attributes:
        retry_after: About when there is room again, in whole seconds.
    """

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message, hint=f"try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """How much may be unfinished, waiting or running.

    Attributes:
        requests: Sequences.
        tokens: Of their prompts and longest answers together.
    """

    requests: int = 1024
    tokens: int = 4_000_000


class Engine:
    """Continuous batching over one backend.

    Args:
        backend: Used by the engine's thread alone from here on.
        policy: How to run.
        limits: How much may be unfinished.
        deliver: Called with the events of a step, once or twice in it, in the engine's thread.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        policy: Policy | None = None,
        limits: QueueLimits | None = None,
        deliver: Callable[[Sequence[Event]], None] = deliver_here,
    ) -> None:
        self.backend = backend
        self.policy = policy or Policy()
        self._limits = limits or QueueLimits()
        self._deliver = deliver
        self._runner = Runner(backend, self.policy, deliver=self._settle)
        self._inbox: queue.SimpleQueue[tuple[_Message, Request | None]] = queue.SimpleQueue()
        self._step_began: float | None = None
        self._is_stopping = False
        self._is_closed = False
        self._books = threading.Lock()
        self._unfinished: set[Request] = set()
        self._unfinished_tokens = 0
        self._thread = threading.Thread(target=self._loop, name="llmopt-engine", daemon=True)

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """End the loop after its current step, and all requests with ``abort``; wait at most ``timeout`` seconds."""
        self._inbox.put(("stop", None))
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    @property
    def seconds_in_step(self) -> float:
        """How long the current step has been running, in seconds; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def statistics(self) -> Statistics:
        """What was done so far; to be read."""
        return self._runner.statistics

    def check_room(self, requests: Sequence[Request]) -> None:
        """Refuse requests when too much is unfinished; any thread may call this.

        Raises:
            QueueFullError: With the time after which it is worth another try.
        """
        with self._books:
            self._check_room(len(requests), sum(request.size for request in requests))

    def uses(self, adapter: AdapterFile) -> bool:
        """Whether an unfinished request has this adapter; any thread may ask."""
        with self._books:
            return any(request.adapter == adapter for request in self._unfinished)

    def submit(self, request: Request) -> None:
        """Queue a request; any thread may call this.

        Raises:
            InputError: It can never run.
            EngineClosedError: The engine has stopped.
            QueueFullError: Too much is unfinished.
        """
        request.check(self.backend.capacity, self.backend.engine.vocab_size)
        if request.adapter is not None and self.backend.adapters is None:
            raise InputError("the engine takes no adapters", hint="build it with lora: {}")
        with self._books:
            if self._is_closed:
                raise EngineClosedError("the engine has stopped")
            self._check_room(1, request.size)
            self._unfinished.add(request)
            self._unfinished_tokens += request.size
            self._inbox.put(("add", request))

    def cancel(self, request: Request) -> None:
        """End a request with ``abort`` before the next step; nothing happens if it has ended. Any thread may call."""
        self._inbox.put(("cancel", request))

    def step(self) -> bool:
        """Read the inbox and run one step, in the calling thread.

        Returns:
            Whether anything is left to do.
        """
        while not self._inbox.empty():
            self._obey(*self._inbox.get())
        self._runner.step()
        return self._runner.has_work

    def _check_room(self, count: int, tokens: int) -> None:
        is_full = len(self._unfinished) + count > self._limits.requests
        # One that is larger than the limit may run alone.
        is_full |= bool(self._unfinished) and self._unfinished_tokens + tokens > self._limits.tokens
        if is_full:
            raise QueueFullError(
                f"{len(self._unfinished)} sequences with up to {self._unfinished_tokens} tokens are waiting or running",
                retry_after=self._seconds_until_room(),
            )

    def _seconds_until_room(self) -> int:
        """About how long one of those that are unfinished takes, spread over those that run together."""
        count = max(len(self._unfinished), 1)
        prompt = sum(len(request.prompt) for request in self._unfinished) // count
        answer = self._unfinished_tokens // count - prompt
        together = min(self.policy.running or self.backend.slots, count)
        return max(1, min(60, math.ceil(self._runner.pace.seconds_for(prompt, answer) / together)))

    def _settle(self, events: Sequence[Event]) -> None:
        """Cross off what has ended, and pass on what happened."""
        ended = [event.request for event in events if event.finish is not None]
        if ended:
            with self._books:
                for request in ended:
                    self._unfinished.discard(request)
                    self._unfinished_tokens -= request.size
        self._deliver(events)

    def _loop(self) -> None:
        try:
            while self._wait():
                self._step_began = time.monotonic()
                self.step()
                self._step_began = None
        except BaseException as error:
            logger.exception("the engine stopped")
            self._close("error", f"the engine stopped: {error}")
            raise
        self._close("abort", None)

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when that is to stop."""
        if not self._runner.has_work and not self._is_stopping:
            self._obey(*self._inbox.get())
        return not self._is_stopping

    def _obey(self, message: _Message, request: Request | None) -> None:
        if request is None:
            self._is_stopping = True
        elif message == "add":
            self._runner.add(request)
        else:
            self._runner.cancel(request)

    def _close(self, finish: FinishReason, error: str | None) -> None:
        """Take no more requests, and end those there are."""
        with self._books:
            self._is_closed = True
        while not self._inbox.empty():
            self._obey(*self._inbox.get())
        self._runner.close(finish, error)
