"""A request on its way through the engine, and what the engine tells about it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from llmopt.optimizer.errors import InputError
from llmopt.optimizer.lora.adapter_file import AdapterFile
from llmopt.runtime.backends.base import IntArray
from llmopt.runtime.sampler import Row, Sampling, TokenLogprob
from llmopt.runtime.text import TextStream

__all__ = ["ContextLengthError", "Event", "FinishReason", "Generation", "Guide", "Request", "Sender"]

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]


class ContextLengthError(InputError):
    """Prompt and answer together do not fit in the context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What a request asks for.

    Attributes:
        max_tokens: Most tokens to generate; 0 only scores the prompt.
        min_tokens: Tokens to generate before a stop token may be chosen.
        stop_ids: Tokens that end the answer; empty where end-of-sequence is to be ignored.
        sampling: How tokens are chosen.
        prompt_logprobs: How many of the most likely tokens to report at each place of the prompt; None reports nothing.
    """

    max_tokens: int
    min_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sender:
    """Whose a request is.

    Attributes:
        tenant: Tenants get equal shares of the engine.
        priority: Of requests of one tenant, those with the lowest number are first.
        cache_salt: Prompts may begin with what was written for requests of the same salt.
        timeout: Seconds after which the request ends, finished or not; None is no limit.
    """

    tenant: str = ""
    priority: int = 0
    cache_salt: str = ""
    timeout: float | None = None


class Guide(Protocol):
    """Says which tokens may come next: ``llmopt.runtime.structured.grammar.Grammar`` for one."""

    words: int
    """Of a mask."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing more can follow: the answer ends, even before ``min_tokens``."""

    def fill(self, mask: npt.NDArray[np.int32]) -> None:
        """Set bit ``t % 32`` of word ``t // 32`` where token t may come next, and clear all others; any thread."""

    def accept(self, token: int) -> None:
        """Take the token that was chosen."""


@dataclass(frozen=True, slots=True)
class Event:
    """What one step did for one request.

    Attributes:
        request: Which.
        token: The token chosen; None where the request ended without one.
        text: Text that became certain, possibly empty.
        logprob: Of ``token``, where asked for.
        finish: Why the request ended; None while it goes on.
        error: What went wrong, with ``finish`` "error".
    """

    request: "Request"
    token: int | None = None
    text: str = ""
    logprob: TokenLogprob | None = None
    finish: FinishReason | None = None
    error: str | None = None


def _nobody(event: Event) -> None:
    raise AssertionError(f"{event} has no receiver")


class Request:
    """One sequence to generate.

    Args:
        prompt: int64 ``[tokens]``, at least one.
        generation: What is asked for.
        text: Where tokens become text and stop strings are found.
        receive: Called with every event of this request, the last of which has a ``finish``; whoever submits the
            request may set it until then.
        sender: Whose it is.
        guide: What the answer has to obey; this request's alone. ``min_tokens`` yields to it.
        adapter: Whose changes of the model answer it; the model as it is when omitted.
    """

    def __init__(
        self,
        prompt: IntArray,
        generation: Generation,
        *,
        text: TextStream,
        receive: Callable[[Event], None] = _nobody,
        sender: Sender | None = None,
        guide: Guide | None = None,
        adapter: AdapterFile | None = None,
    ) -> None:
        self.prompt = np.ascontiguousarray(prompt, np.int64)
        self.generation = generation
        self.text = text
        self.receive = receive
        self.sender = sender or Sender()
        self.guide = guide
        self.adapter = adapter
        self.arrival = time.monotonic()
        self.cached_tokens = 0
        """Tokens of the prompt that were copied from other sequences; known before the first event."""
        self.output: list[int] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        """One entry per prompt token but the first; complete before the first event."""
        self.row = Row(generation.sampling, self.prompt, self.output)
        self._stop_tokens = np.array(sorted(generation.stop_ids), np.int64)

    @property
    def deadline(self) -> float | None:
        """When it ends at the latest, in seconds of the monotonic clock; None is never."""
        return None if self.sender.timeout is None else self.arrival + self.sender.timeout

    @property
    def size(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return len(self.prompt) + self.generation.max_tokens

    @property
    def written(self) -> IntArray:
        """The tokens whose keys and values have been computed: all but the last one chosen, int64 ``[tokens]``."""
        return np.concatenate([self.prompt, np.array(self.output[:-1], np.int64)])

    def check(self, capacity: int, vocab_size: int) -> None:
        """Refuse what can never run.

        Raises:
            InputError: An empty prompt, or a token that the model does not have.
            ContextLengthError: Prompt and answer exceed ``capacity`` tokens. Nothing is ever truncated silently.
        """
        if not len(self.prompt):
            raise InputError("the prompt is empty", hint="give it at least one token")
        outside = self.prompt[(self.prompt < 0) | (self.prompt >= vocab_size)]
        if len(outside):
            raise InputError(f"the prompt has token {outside[0]}, and the model has 0 .. {vocab_size - 1}")
        prompt, answer = len(self.prompt), self.generation.max_tokens
        if prompt + answer > capacity:
            raise ContextLengthError(
                f"the context has {capacity} tokens, but the prompt has {prompt} and up to {answer} were asked for",
                hint="shorten the prompt, ask for fewer tokens, or serve with a larger --context",
            )

    def block_early_stops(self) -> None:
        """Keep the sampler from ending the answer before ``min_tokens``."""
        is_early = self.guide is None and len(self.output) < self.generation.min_tokens
        self.row.blocked = self._stop_tokens if is_early else self._stop_tokens[:0]

    def take(self, token: int, logprob: TokenLogprob | None) -> Event:
        """Append a token that was chosen, and say what that means.

        Raises:
            InputError: The guide does not know what to make of it.
        """
        self.output.append(token)
        if self.guide is not None:
            self.guide.accept(token)
        if token in self.generation.stop_ids:
            return Event(self, token, self.text.finish(), logprob, "stop")
        piece = self.text.push(token)
        if self.text.is_stopped:
            return Event(self, token, piece, logprob, "stop")
        if self.guide is not None and self.guide.is_complete:
            return Event(self, token, piece + self.text.finish(), logprob, "stop")
        if len(self.output) >= self.generation.max_tokens:
            return Event(self, token, piece + self.text.finish(), logprob, "length")
        return Event(self, token, piece, logprob)
