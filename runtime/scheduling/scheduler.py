"""Decides what each step runs: who is admitted, which prompt chunk is written where, which rows decode.

Pure Python over integers. The running requests lie in the slots ``0 .. n-1`` in the order of ``running``; all but the
last have their whole prompt written, so a decode call over the first slots never touches a request that is not ready.
"""

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Chunk", "Copy", "Scheduler", "Step"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Chunk(Generic[T]):
    """Tokens ``start .. start+length-1`` of a prompt, to be written to ``slot``."""

    request: T
    slot: int
    start: int
    length: int
    completes: bool


@dataclass(frozen=True, slots=True)
class Copy:
    """Move a request: its first ``length`` tokens go from one slot to another."""

    source: int
    destination: int
    length: int


@dataclass(frozen=True, slots=True)
class Step(Generic[T]):
    """One step's work: first the chunks in order, then one decode of the slots ``0 .. len(decoding)-1``.

    Attributes:
        chunks: Prefill calls.
        decoding: The requests in the slots that decode, in slot order.
        lengths: How many tokens each of them holds.
    """

    chunks: tuple[Chunk[T], ...]
    decoding: tuple[T, ...]
    lengths: tuple[int, ...]


@dataclass(slots=True)
class _Entry(Generic[T]):
    request: T
    prompt: int
    max_chunk: int
    written: int = 0

    @property
    def is_ready(self) -> bool:
        return self.written >= self.prompt


class Scheduler(Generic[T]):
    """First come, first served; decode rows join every step, and prompts share what a step may write besides.

    Every request reserves a whole slot, so one that was admitted can never run out of room.

    Args:
        slots: Requests that run at the same time.
        max_chunk: Most tokens of one prefill call, and of all prefill calls of a step: this bounds how long a prompt
            can hold up the requests that are decoding.
        min_chunk: Fewest tokens of a prefill call, unless the prompt is shorter: smaller ones are not bit-exact.
    """

    def __init__(self, *, slots: int, max_chunk: int, min_chunk: int) -> None:
        if max_chunk < 2 * min_chunk - 1:
            raise ValueError(f"chunks of {min_chunk} to {max_chunk} tokens cannot make up every prompt")
        self._slots = slots
        self._max_chunk = max_chunk
        self._min_chunk = min_chunk
        self._waiting: deque[_Entry[T]] = deque()
        self._running: list[_Entry[T]] = []

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._waiting or self._running)

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> tuple[T, ...]:
        """The requests that have a slot, in slot order."""
        return tuple(entry.request for entry in self._running)

    def add(self, request: T, prompt: int, *, max_chunk: int | None = None) -> None:
        """Queue a request.

        Args:
            request: Anything that is equal to itself alone.
            prompt: Tokens of its prompt, at least one.
            max_chunk: A smaller limit for its chunks.
        """
        limit = self._max_chunk if max_chunk is None else min(max_chunk, self._max_chunk)
        self._waiting.append(_Entry(request, prompt, max(limit, 2 * self._min_chunk - 1)))

    def plan(self) -> Step[T]:
        """Admit what fits and say what this step runs. What it plans counts as written from here on."""
        ready = [entry for entry in self._running if entry.is_ready]
        lengths = tuple(entry.written for entry in ready)
        chunks = self._plan_chunks()
        for entry in ready:
            entry.written += 1
        return Step(tuple(chunks), tuple(entry.request for entry in ready), lengths)

    def remove(self, request: T) -> list[Copy]:
        """Forget a request, waiting or running.

        Returns:
            The copies, in this order, that close the gap it leaves.
        """
        slot = next((i for i, entry in enumerate(self._running) if entry.request == request), None)
        if slot is None:
            self._waiting = deque(entry for entry in self._waiting if entry.request != request)
            return []
        copies = []
        # The last ready request fills the gap, and then one whose prompt is still being written takes its place.
        for last in (self._last_ready(), len(self._running) - 1):
            if last > slot:
                copies.append(Copy(last, slot, self._running[last].written))
                self._running[slot] = self._running[last]
                slot = last
        del self._running[slot]
        return copies

    def _last_ready(self) -> int:
        count = len(self._running)
        return count - 1 if count == 0 or self._running[-1].is_ready else count - 2

    def _plan_chunks(self) -> list[Chunk[T]]:
        chunks: list[Chunk[T]] = []
        budget = self._max_chunk
        while entry := self._next_to_write():
            length = _chunk(entry.prompt - entry.written, min(budget, entry.max_chunk), self._min_chunk)
            if length == 0:
                break
            if not self._running or self._running[-1] is not entry:
                self._running.append(self._waiting.popleft())
            slot, start = len(self._running) - 1, entry.written
            entry.written += length
            budget -= length
            chunks.append(Chunk(entry.request, slot, start, length, entry.is_ready))
        return chunks

    def _next_to_write(self) -> _Entry[T] | None:
        """The request whose prompt is being written, else the one at the head of the queue if a slot is free."""
        if self._running and not self._running[-1].is_ready:
            return self._running[-1]
        return self._waiting[0] if self._waiting and len(self._running) < self._slots else None


def _chunk(left: int, most: int, least: int) -> int:
    """How many of ``left`` tokens to write now, so that neither this chunk nor the rest has fewer than ``least``.

    Returns:
        0 when that cannot be done with ``most`` tokens.
    """
    if left <= most:
        return left
    length = min(most, left - least)
    return length if length >= least else 0
