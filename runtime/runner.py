"""Runs steps: what the scheduler planned is copied, read, decoded or verified, and tokens are chosen.

Everything here happens in one thread, the engine's.
"""

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np

from llmopt.optimizer.errors import InputError, VerificationError
from llmopt.optimizer.lora.adapter_file import AdapterFile
from llmopt.runtime.backends.base import Backend, ExecutionError, FloatArray
from llmopt.runtime.policy import Policy
from llmopt.runtime.request import Event, FinishReason, Request
from llmopt.runtime.sampler import sample, score
from llmopt.runtime.scheduling.pace import Pace
from llmopt.runtime.scheduling.scheduler import Chunk, Limits, Prompt, Scheduler, Step
from llmopt.runtime.scheduling.slots import Copy
from llmopt.runtime.speculation import Speculation
from llmopt.runtime.statistics import Statistics
from llmopt.runtime.structured.masks import Masks

__all__ = ["Runner", "deliver_here"]

logger = logging.getLogger(__name__)

# Scoring a prompt needs the logits of every row of a chunk; 64 rows of 50,000 float32 are 12 MB.
_SCORING_CHUNK = 64

_LEAST_PACE = 32
"""Tokens of a prompt that a step writes in any case."""


def deliver_here(events: Sequence[Event]) -> None:
    """Hand each event to its request, in the engine's own thread."""
    for event in events:
        event.request.receive(event)


class Runner:
    """Continuous batching over one backend, a step at a time.

    Args:
        backend: Used by this alone from here on.
        policy: How to run.
        deliver: Called with the events of a step, once or twice in it.
    """

    def __init__(self, backend: Backend, policy: Policy, *, deliver: Callable[[Sequence[Event]], None]) -> None:
        self.statistics = Statistics()
        self._backend = backend
        self._policy = policy
        self._deliver = deliver
        described = backend.engine
        limits = Limits(
            slots=backend.slots,
            running=min(policy.running or backend.slots, backend.slots, described.slots or backend.slots),
            max_chunk=described.max_chunk,
            min_chunk=described.min_chunk,
            shares=policy.shares_prefixes,
            adapters=0 if described.lora is None else described.lora.slots,
        )
        self._scheduler: Scheduler[Request] = Scheduler(limits)
        self.pace = Pace(policy.target, min(max(_LEAST_PACE, limits.least_budget), limits.max_chunk), limits.max_chunk)
        self._masks = Masks(described.vocab_size)
        self._requests: set[Request] = set()
        self._timed: set[Request] = set()
        self._events: list[Event] = []
        self._lost: set[int] = set()
        self._unreadable: dict[AdapterFile, str] = {}

    @property
    def has_work(self) -> bool:
        """Whether anything is left to do or to say."""
        return self._scheduler.has_work or bool(self._events)

    def add(self, request: Request) -> None:
        """Take a request."""
        self._requests.add(request)
        if request.deadline is not None:
            self._timed.add(request)
        is_scored = request.generation.prompt_logprobs is not None
        prompt = Prompt(
            ids=request.prompt,
            tenant=request.sender.tenant,
            priority=request.sender.priority,
            arrival=int(request.arrival * 1000),
            # Keys and values are those of the model with the adapter: nobody else may begin with them.
            namespace=(request.sender.cache_salt, None if request.adapter is None else request.adapter.entry.sha256),
            adapter=request.adapter,
            is_scored=is_scored,
            max_chunk=_SCORING_CHUNK if is_scored else None,
        )
        self._scheduler.add(request, prompt)
        self._masks.prepare(request)

    def cancel(self, request: Request) -> None:
        """End a request with ``abort``; its slot is free at once. Nothing happens if it has ended."""
        if request in self._requests:
            self._end(request, "abort")

    def step(self) -> None:
        """Run one step, and say what it did."""
        began = time.perf_counter()
        self._expire()
        if self._scheduler.has_work:
            decoding = sum(1 for request in self._scheduler.running if request.output)
            step = self._scheduler.plan(self.pace.budget(decoding))
            for chunk in step.chunks:
                self._read(chunk)
            self._lost.clear()
            if step.decoding and self._events:
                self._say()  # a first token does not wait for the others' next
            self._go_on(step)
            self.statistics.steps += 1
        self._say()
        self.statistics.step_seconds += time.perf_counter() - began

    def close(self, finish: FinishReason, error: str | None) -> None:
        """End all requests."""
        for request in tuple(self._requests):
            self._requests.remove(request)
            self._events.append(Event(request, finish=finish, error=error))
        self._masks.close()
        self._say()

    def _say(self) -> None:
        """Deliver what happened, and free the slots of what has ended."""
        events, self._events = self._events, []
        for event in events:
            if event.finish is not None and event.request in self._requests:
                self._release(event.request, event.finish)
        self._count()
        if events:
            self._deliver(events)

    def _count(self) -> None:
        statistics, scheduler = self.statistics, self._scheduler
        statistics.waiting, statistics.running = scheduler.waiting, len(scheduler.running)
        statistics.adapters_in_use = scheduler.adapters.in_use
        statistics.held_tokens = sum(held.length for held in scheduler.pool.active)

    def _expire(self) -> None:
        """End what has run out of time."""
        now = time.monotonic()
        for request in [each for each in self._timed if each.deadline is not None and each.deadline <= now]:
            self._end(request, "timeout")

    def _end(self, request: Request, finish: FinishReason) -> None:
        """End a request between two steps."""
        self._release(request, finish)
        self._events.append(Event(request, finish=finish))

    def _release(self, request: Request, finish: FinishReason) -> None:
        """Give back the slot of a request that has ended."""
        self._requests.remove(request)
        self._timed.discard(request)
        self._masks.forget(request)
        self.statistics.finished[finish] += 1
        is_sound = finish != "error"
        written = request.written if request.output and not self._policy.is_exact else None
        self._copy(self._scheduler.remove(request, keep=is_sound, written=written))
        if request.adapter in self._unreadable and self._scheduler.forget_adapter(request.adapter):
            del self._unreadable[request.adapter]  # the next one that asks for it tries again
        slot = len(self._scheduler.running)
        if slot < self._backend.slots and not self._scheduler.pool.is_kept(slot):
            self._backend.drop(slot)

    def _copy(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            self._backend.copy_prefix(copy.source, copy.destination, copy.length)

    def _read(self, chunk: Chunk[Request]) -> None:
        """Write one chunk, and choose the first token where it completes the prompt."""
        request, end = chunk.request, chunk.start + chunk.length
        if chunk.load is not None and request.adapter is not None:
            self._load(request.adapter, chunk.load.slot)
        if self._lost & {copy.source for copy in chunk.copies}:
            self._fail([request], "the request whose prompt this one shares failed", slot=chunk.slot)
            return
        self._copy(chunk.copies)
        request.cached_tokens += chunk.cached
        if chunk.slot in self._lost:
            return
        if request.adapter in self._unreadable:
            self._fail([request], self._unreadable[request.adapter], slot=chunk.slot)
            return
        top = request.generation.prompt_logprobs
        first = 0 if top is not None else chunk.length - 1 if chunk.completes else chunk.length
        began = time.perf_counter()
        try:
            rows = np.arange(first, chunk.length)
            self._choose_adapters([chunk.adapter])
            logits = self._backend.prefill(chunk.slot, request.prompt[chunk.start : end], chunk.start, rows)
        except ExecutionError as error:
            self._fail([request], str(error), slot=chunk.slot)
            return
        seconds = time.perf_counter() - began
        self.pace.note_prefill(chunk.length, seconds)
        self.statistics.prefill_seconds += seconds
        if top is not None:
            following = request.prompt[chunk.start + 1 : end + 1]
            request.prompt_logprobs += score(logits[: len(following)], following, top)
        if not chunk.completes:
            return
        if request.adapter is not None:
            self.statistics.adapter_requests[request.adapter.name] += 1
        self.statistics.prompt_tokens += len(request.prompt)
        self.statistics.cached_tokens += request.cached_tokens
        if request.generation.max_tokens == 0:
            self._events.append(Event(request, finish="length"))
        else:
            self._choose([request], logits[-1:])

    def _load(self, adapter: AdapterFile, slot: int) -> None:
        """Read an adapter into memory; where that fails, the requests that need it will."""
        assert self._backend.adapters is not None
        self.statistics.adapter_loads += 1
        try:
            self._backend.adapters.load(slot, adapter)
        except VerificationError as error:
            self._unreadable[adapter] = error.message

    def _choose_adapters(self, slots: Sequence[int]) -> None:
        """Say whose changes the next call's sequences have."""
        if self._backend.adapters is not None:
            self._backend.adapters.choose(slots)

    def _go_on(self, step: Step[Request]) -> None:
        """Let the running requests go on, each by a token, or by what was guessed right and one more."""
        if not step.decoding:
            return
        speculation = self._policy.speculation
        if speculation is not None and speculation.pays(len(step.decoding)) and self._guess(step, speculation):
            return
        ids = np.array([request.output[-1] for request in step.decoding], np.int64)
        began = time.perf_counter()
        self._choose_adapters(step.adapters)
        try:
            logits = self._backend.decode(ids, np.array(step.lengths, np.int64))
        except ExecutionError as error:
            self._fail(step.decoding, str(error))
            return
        seconds = time.perf_counter() - began
        self.pace.note_decode(seconds)
        self.statistics.decode_seconds += seconds
        if speculation is not None:
            speculation.note_decode(len(step.decoding), seconds)
        self._choose(step.decoding, logits)

    def _guess(self, step: Step[Request], speculation: Speculation) -> bool:
        """Guess tokens of the running requests, and verify them.

        Returns:
            False when there is nothing to verify.
        """
        began = time.perf_counter()
        try:
            guesses = [
                self._guessed(request, length, speculation)
                for request, length in zip(step.decoding, step.lengths, strict=True)
            ]
        except ExecutionError as error:
            logger.warning("no tokens are guessed in this step: %s", error)
            return False
        if not any(guesses):
            return False
        before = self.statistics.generated_tokens
        for slot, (request, length) in enumerate(zip(step.decoding, step.lengths, strict=True)):
            self._choose_adapters(step.adapters[slot : slot + 1])
            self._verify(request, slot, length, guesses[slot])
        seconds = time.perf_counter() - began
        self.statistics.decode_seconds += seconds
        count = len(step.decoding)
        speculation.note_verify((self.statistics.generated_tokens - before) / count, seconds / count)
        return True

    def _guessed(self, request: Request, length: int, speculation: Speculation) -> Sequence[int]:
        """Tokens that may follow, as many as there is room for."""
        room = min(self._backend.capacity - length, self._backend.engine.max_chunk) - 1
        most = min(speculation.tokens, room, request.generation.max_tokens - len(request.output) - 1)
        ids = np.concatenate([request.prompt, np.array(request.output, np.int64)])
        return speculation.drafter.propose(ids, most) if most > 0 else ()

    def _verify(self, request: Request, slot: int, length: int, guess: Sequence[int]) -> None:
        """Choose tokens at all places of a guess, up to the first that differs from it."""
        ids = np.array([request.output[-1], *guess], np.int64)
        try:
            logits = self._backend.prefill(slot, ids, length, np.arange(len(ids)))
        except ExecutionError as error:
            self._fail([request], str(error))
            return
        right = 0
        for place, row in enumerate(logits):
            self._choose([request], row[None])
            event = self._events[-1]
            is_right = event.finish is None and place < len(guess) and event.token == guess[place]
            if not is_right:
                break
            right += 1
        self._scheduler.advance(request, right)
        self.statistics.drafted_tokens += len(guess)
        self.statistics.accepted_tokens += right

    def _choose(self, requests: Sequence[Request], logits: FloatArray) -> None:
        """Choose a token for each row of ``logits``, float32 ``[requests, vocab]``."""
        broken = np.isnan(logits.max(axis=1))
        if broken.any():
            nameless = [request for request, is_broken in zip(requests, broken, strict=True) if is_broken]
            self._fail(nameless, "the model's logits are not numbers (NaN)")
            requests = [request for request, is_broken in zip(requests, broken, strict=True) if not is_broken]
            logits = logits[~broken]
        able = [self._is_able(request) for request in requests]
        if not all(able):
            requests = [request for request, is_able in zip(requests, able, strict=True) if is_able]
            logits = logits[np.array(able)]
        if not requests:
            return
        tokens, logprobs = sample(logits, [request.row for request in requests])
        self.statistics.generated_tokens += len(requests)
        for request, token, logprob in zip(requests, tokens.tolist(), logprobs, strict=True):
            try:
                event = request.take(token, logprob)
            except InputError as error:
                event = Event(request, finish="error", error=error.message)
            self._events.append(event)
            if event.finish is None:
                self._masks.prepare(request)

    def _is_able(self, request: Request) -> bool:
        """Bring what limits a request's next token to its row; False, and the request ends, if that fails."""
        request.block_early_stops()
        try:
            request.row.allowed = self._masks.take(request)
        except InputError as error:
            self._fail([request], error.message)
            return False
        if request.row.allowed is not None and not request.row.allowed.any():
            self._fail([request], "no token can follow what the answer has to obey")
            return False
        return True

    def _fail(self, requests: Sequence[Request], reason: str, *, slot: int | None = None) -> None:
        """End the requests of a run that failed; all others go on."""
        logger.error("a run failed and ended %d request(s): %s", len(requests), reason)
        self._events += [Event(request, finish="error", error=reason) for request in requests]
        if slot is not None:
            self._lost.add(slot)
