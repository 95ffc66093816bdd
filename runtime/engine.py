"""The loop that serves all requests: one step writes prompt chunks, decodes every running request once, and samples.

One thread owns the backend and all requests in it; others only put messages in its inbox. Each step reports everything
it did at once.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np

from llmopt.runtime.backends.base import Backend, ExecutionError, FloatArray
from llmopt.runtime.request import Event, FinishReason, Request
from llmopt.runtime.sampler import sample, score
from llmopt.runtime.scheduler import Chunk, Scheduler, Step

__all__ = ["Engine", "EngineClosedError", "deliver_here"]

logger = logging.getLogger(__name__)

# Scoring a prompt needs the logits of every row of a chunk; 64 rows of 50,000 float32 are 12 MB.
_SCORING_CHUNK = 64

_Message: TypeAlias = Literal["add", "cancel", "stop"]


def deliver_here(events: Sequence[Event]) -> None:
    """Hand each event to its request, in the engine's own thread."""
    for event in events:
        event.request.receive(event)


class EngineClosedError(RuntimeError):
    """The engine has stopped and takes no more requests."""


class Engine:
    """Continuous batching over one backend.

    Args:
        backend: Used by the engine's thread alone from here on.
        deliver: Called once per step with all its events, in the engine's thread.
    """

    def __init__(self, backend: Backend, *, deliver: Callable[[Sequence[Event]], None] = deliver_here) -> None:
        self.backend = backend
        self._deliver = deliver
        described = backend.engine
        self._scheduler: Scheduler[Request] = Scheduler(
            slots=backend.slots, max_chunk=described.max_chunk, min_chunk=described.min_chunk
        )
        self._inbox: queue.SimpleQueue[tuple[_Message, Request | None]] = queue.SimpleQueue()
        self._requests: set[Request] = set()
        self._events: list[Event] = []
        self._step_began: float | None = None
        self._is_stopping = False
        self._is_closed = False
        self._closing = threading.Lock()
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

    def submit(self, request: Request) -> None:
        """Queue a request; any thread may call this.

        Raises:
            ContextLengthError: It can never run.
            EngineClosedError: The engine has stopped.
        """
        request.check(self.backend.capacity)
        with self._closing:
            if self._is_closed:
                raise EngineClosedError("the engine has stopped")
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
        if self._scheduler.has_work:
            step = self._scheduler.plan()
            for chunk in step.chunks:
                self._prefill(chunk)
            self._decode(step)
        events, self._events = self._events, []
        for event in events:
            if event.finish is not None:
                self._release(event.request)
        if events:
            self._deliver(events)
        return self._scheduler.has_work

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
        if not self._scheduler.has_work and not self._is_stopping:
            self._obey(*self._inbox.get())
        return not self._is_stopping

    def _obey(self, message: _Message, request: Request | None) -> None:
        if request is None:
            self._is_stopping = True
        elif message == "add":
            self._requests.add(request)
            chunk = None if request.generation.prompt_logprobs is None else _SCORING_CHUNK
            self._scheduler.add(request, len(request.prompt), max_chunk=chunk)
        elif request in self._requests:
            self._release(request)
            self._events.append(Event(request, finish="abort"))

    def _release(self, request: Request) -> None:
        """Give back the slot of a request that has ended, and close the gap."""
        if request not in self._requests:
            return
        self._requests.remove(request)
        for copy in self._scheduler.remove(request):
            self.backend.copy_prefix(copy.source, copy.destination, copy.length)
        self.backend.drop(len(self._scheduler.running))

    def _close(self, finish: FinishReason, error: str | None) -> None:
        """Take no more requests, and end those there are."""
        with self._closing:
            self._is_closed = True
        while not self._inbox.empty():
            self._obey(*self._inbox.get())
        self._events += [Event(request, finish=finish, error=error) for request in self._requests]
        self._deliver(self._events)

    def _prefill(self, chunk: Chunk[Request]) -> None:
        """Write one chunk, and choose the first token where it completes the prompt."""
        request, end = chunk.request, chunk.start + chunk.length
        top = request.generation.prompt_logprobs
        first = 0 if top is not None else chunk.length - 1 if chunk.completes else chunk.length
        try:
            logits = self.backend.prefill(
                chunk.slot, request.prompt[chunk.start : end], chunk.start, np.arange(first, chunk.length)
            )
        except ExecutionError as error:
            self._fail([request], str(error))
            return
        if top is not None:
            following = request.prompt[chunk.start + 1 : end + 1]
            request.prompt_logprobs += score(logits[: len(following)], following, top)
        if chunk.completes and request.generation.max_tokens == 0:
            self._events.append(Event(request, finish="length"))
        elif chunk.completes:
            self._choose([request], logits[-1:])

    def _decode(self, step: Step[Request]) -> None:
        """Decode the running requests once, and choose the next token of each."""
        if not step.decoding:
            return
        ids = np.array([request.output[-1] for request in step.decoding], np.int64)
        try:
            logits = self.backend.decode(ids, np.array(step.lengths, np.int64))
        except ExecutionError as error:
            self._fail(step.decoding, str(error))
            return
        self._choose(step.decoding, logits)

    def _choose(self, requests: Sequence[Request], logits: FloatArray) -> None:
        """Sample a token for each row of ``logits``, float32 ``[requests, vocab]``."""
        broken = np.isnan(logits.max(axis=1))
        if broken.any():
            self._fail(
                [r for r, is_broken in zip(requests, broken, strict=True) if is_broken], "logits are not numbers"
            )
            requests = [r for r, is_broken in zip(requests, broken, strict=True) if not is_broken]
            logits = logits[~broken]
        for request in requests:
            request.block_early_stops()
        tokens, logprobs = sample(logits, [request.row for request in requests])
        for request, token, logprob in zip(requests, tokens.tolist(), logprobs, strict=True):
            self._events.append(request.take(token, logprob))

    def _fail(self, requests: Sequence[Request], reason: str) -> None:
        """End the requests of a run that failed; all others go on."""
        logger.error("a run failed and ended %d request(s): %s", len(requests), reason)
        self._events += [Event(request, finish="error", error=reason) for request in requests]
