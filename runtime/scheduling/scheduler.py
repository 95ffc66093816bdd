"""Decides what each step runs: who is admitted, which prompt chunk is written where, which rows decode.

Pure Python over integers. The running requests lie in the slots ``0 .. n-1`` in the order of ``running``; all but the
last have their whole prompt written, so a decode call over the first slots never touches a request that is not ready.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from llmopt.runtime.backends.base import IntArray
from llmopt.runtime.scheduling.adapter_slots import AdapterLoad, AdapterSlots
from llmopt.runtime.scheduling.slots import Copy, Held, SlotPool
from llmopt.runtime.scheduling.waiting import WaitingLine

__all__ = ["Chunk", "Limits", "Prompt", "Scheduler", "Step"]

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a scheduler has to keep to.

    Attributes:
        slots: Sequences that are in memory at the same time.
        running: Requests that run at the same time, at most ``slots``. The other slots keep what may be shared.
        max_chunk: Most tokens of one prefill call.
        min_chunk: Fewest tokens of a prefill call, unless the prompt is shorter: smaller ones are not bit-exact.
        shares: Whether prompts may begin with what other requests wrote.
        adapters: Adapters that are in memory at the same time.
    """

    slots: int
    running: int
    max_chunk: int
    min_chunk: int
    shares: bool = True
    adapters: int = 0

    def __post_init__(self) -> None:
        """Check that every prompt can be cut into chunks."""
        if self.max_chunk < self.least_budget:
            raise ValueError(f"chunks of {self.min_chunk} to {self.max_chunk} tokens cannot make up every prompt")
        if not 0 < self.running <= self.slots:
            raise ValueError(f"{self.running} requests cannot run in {self.slots} slots")

    @property
    def least_budget(self) -> int:
        """Tokens with which any prompt can go on."""
        return 2 * self.min_chunk - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the scheduler has to know of a request.

    Attributes:
        ids: int64 ``[tokens]``, at least one.
        tenant: On whose behalf.
        priority: Lower is earlier.
        arrival: When, in milliseconds.
        namespace: It may begin with what requests of the same one wrote.
        is_scored: Whether the logits of all its tokens are wanted: then nothing can be taken from others.
        max_chunk: A smaller limit for its chunks.
        adapter: Whose changes of the model it is for; None is nobody's. What others wrote for another adapter is of no
            use to it: that is for ``namespace`` to say.
    """

    ids: IntArray
    tenant: str = ""
    priority: int = 0
    arrival: int = 0
    namespace: Hashable = None
    is_scored: bool = False
    max_chunk: int | None = None
    adapter: Hashable = None


@dataclass(frozen=True, slots=True)
class Chunk(Generic[T]):
    """Tokens ``start .. start+length-1`` of a prompt, to be written to ``slot`` after ``copies``.

    ``cached`` of the tokens before it, all of them, were found in the pool; 0 but for the first chunk of a prompt.
    ``adapter`` is the slot of the request's, 0 where it has none; ``load`` comes before the first chunk that needs it.
    """

    request: T
    slot: int
    start: int
    length: int
    completes: bool
    copies: tuple[Copy, ...] = ()
    cached: int = 0
    adapter: int = 0
    load: AdapterLoad[Hashable] | None = None


@dataclass(frozen=True, slots=True)
class Step(Generic[T]):
    """One step's work: first the chunks in order, then one decode of the slots ``0 .. len(decoding)-1``.

    Attributes:
        chunks: Prefill calls.
        decoding: The requests in the slots that decode, in slot order.
        lengths: How many tokens each of them holds.
        adapters: The slots of their adapters; 0 is none.
    """

    chunks: tuple[Chunk[T], ...]
    decoding: tuple[T, ...]
    lengths: tuple[int, ...]
    adapters: tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Entry(Generic[T]):
    request: T
    prompt: Prompt
    held: Held
    adapter: int

    @property
    def is_ready(self) -> bool:
        return self.held.length >= len(self.prompt.ids)


class Scheduler(Generic[T]):
    """Decode rows join every step, and prompts share what a step may write besides, one after the other.

    Every request reserves a whole slot, so one that was admitted can never run out of room; its adapter stays in memory
    until it has ended. While the request that is next waits for an adapter's slot, others whose adapters are in memory
    pass it, except for those of the one adapter that is to make room: so it waits for that one's running requests only.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._line: WaitingLine[T] = WaitingLine()
        self._prompts: dict[T, Prompt] = {}
        self._running: list[_Entry[T]] = []
        self._pool = SlotPool(limits.slots, shares=limits.shares)
        self._adapters: AdapterSlots[Hashable] = AdapterSlots(limits.adapters)

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._prompts)

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._line)

    @property
    def running(self) -> tuple[T, ...]:
        """The requests that have a slot, in slot order."""
        return tuple(entry.request for entry in self._running)

    @property
    def pool(self) -> SlotPool:
        """The books of the slots, to be read."""
        return self._pool

    @property
    def adapters(self) -> AdapterSlots[Hashable]:
        """The books of the adapters, to be read."""
        return self._adapters

    def forget_adapter(self, adapter: Hashable) -> bool:
        """Take an adapter for not loaded, unless a request runs with it; whether that was done."""
        return self._adapters.forget(adapter)

    def add(self, request: T, prompt: Prompt) -> None:
        """Queue a request, which is anything that is equal to itself alone."""
        self._prompts[request] = prompt
        self._line.add(request, tenant=prompt.tenant, priority=prompt.priority, arrival=prompt.arrival)

    def plan(self, budget: int | None = None) -> Step[T]:
        """Admit what fits and say what this step runs. What it plans counts as written from here on.

        Args:
            budget: Most tokens of all chunks together; ``max_chunk`` when omitted. Too little to go on with any prompt
                is raised to what is enough.
        """
        ready = [entry for entry in self._running if entry.is_ready]
        lengths = tuple(entry.held.length for entry in ready)
        adapters = tuple(entry.adapter for entry in ready)
        chunks = self._plan_chunks(max(budget or self._limits.max_chunk, self._limits.least_budget))
        for entry in ready:
            entry.held.length += 1
            self._line.charge(entry.request, 1)
        return Step(tuple(chunks), tuple(entry.request for entry in ready), lengths, adapters)

    def advance(self, request: T, tokens: int) -> None:
        """Count ``tokens`` more as written than ``plan`` said: they were guessed, and guessed right."""
        entry = self._running[self._position(request)]
        entry.held.length += tokens
        self._line.charge(request, tokens)

    def remove(self, request: T, *, keep: bool = False, written: IntArray | None = None) -> tuple[Copy, ...]:
        """Forget a request, waiting or running.

        Args:
            request: The request.
            keep: Whether others may still begin with its prompt, if that was written whole.
            written: int64 ``[tokens]``, what they may begin with instead.

        Returns:
            The copies, in this order, that keep it and close the gap it leaves.
        """
        self._line.remove(request)
        prompt = self._prompts.pop(request)
        place = next((i for i, entry in enumerate(self._running) if entry.request == request), None)
        if place is None:
            return ()
        if prompt.adapter is not None:
            self._adapters.release(prompt.adapter)
        held = self._running[place].held
        if keep and written is not None:
            self._pool.share(held, written)
        # The last ready request fills the gap, and then one whose prompt is still being written takes its place.
        movers, gap = [], place
        for last in (self._last_ready(), len(self._running) - 1):
            if last > gap:
                movers.append(self._running[last])
                self._running[gap] = self._running[last]
                gap = last
        del self._running[gap]
        return self._pool.release(held, [entry.held for entry in movers], keep=keep)

    def _position(self, request: T) -> int:
        return next(i for i, entry in enumerate(self._running) if entry.request == request)

    def _last_ready(self) -> int:
        count = len(self._running)
        return count - 1 if count == 0 or self._running[-1].is_ready else count - 2

    def _plan_chunks(self, budget: int) -> list[Chunk[T]]:
        chunks: list[Chunk[T]] = []
        while True:
            copies: tuple[Copy, ...] = ()
            cached, load = 0, None
            entry = self._running[-1] if self._running and not self._running[-1].is_ready else None
            if entry is None:
                # Any prompt can begin with the least budget: nobody gets a slot who cannot use it in this step.
                if budget < self._limits.least_budget or (admitted := self._admit()) is None:
                    return chunks
                entry, copies, load = admitted
                cached = entry.held.length
            held, total = entry.held, len(entry.prompt.ids)
            length = _chunk(total - held.length, min(budget, self._most(entry.prompt)), self._limits.min_chunk)
            if length == 0:
                return chunks
            start = held.length
            held.length += length
            budget -= length
            self._line.charge(entry.request, length)
            if entry.is_ready:
                self._pool.share(held, entry.prompt.ids)
            chunks.append(
                Chunk(entry.request, held.slot, start, length, entry.is_ready, copies, cached, entry.adapter, load)
            )

    def _admit(self) -> tuple[_Entry[T], tuple[Copy, ...], AdapterLoad[Hashable] | None] | None:
        request = self._next() if len(self._running) < self._limits.running else None
        if request is None:
            return None
        self._line.admit(request)
        prompt = self._prompts[request]
        most = 0 if prompt.is_scored else len(prompt.ids) - self._limits.min_chunk
        admission = self._pool.admit(prompt.ids, prompt.namespace, most=most)
        load = None if prompt.adapter is None else self._adapters.take(prompt.adapter)
        slot = 0 if prompt.adapter is None else self._adapters.slot_of(prompt.adapter)
        entry = _Entry(request, prompt, admission.held, slot)
        self._running.append(entry)
        return entry, admission.copies, load

    def _next(self) -> T | None:
        """Who gets a slot."""
        first = self._line.next()
        if first is None or self._may_begin(first):
            return first
        spared = self._adapters.spared()

        def may(request: T) -> bool:
            adapter = self._prompts[request].adapter
            return adapter is None or (adapter in self._adapters.resident and adapter != spared)

        return self._line.next_of(may)

    def _may_begin(self, request: T) -> bool:
        adapter = self._prompts[request].adapter
        return adapter is None or self._adapters.has_room(adapter)

    def _most(self, prompt: Prompt) -> int:
        """Tokens of one of its chunks."""
        if prompt.max_chunk is None:
            return self._limits.max_chunk
        return max(min(prompt.max_chunk, self._limits.max_chunk), self._limits.least_budget)


def _chunk(left: int, most: int, least: int) -> int:
    """How many of ``left`` tokens to write now, so that neither this chunk nor the rest has fewer than ``least``.

    Returns:
        0 when that cannot be done with ``most`` tokens.
    """
    if left <= most:
        return left
    length = min(most, left - least)
    return length if length >= least else 0
