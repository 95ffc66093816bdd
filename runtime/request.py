"""A request on its way through the engine, and what the engine tells about it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from llmopt.optimizer.errors import InputError
from llmopt.runtime.backends.base import IntArray
from llmopt.runtime.sampler import Row, Sampling, TokenLogprob
from llmopt.runtime.text import TextStream

__all__ = ["ContextLengthError", "Event", "FinishReason", "Generation", "Request"]

FinishReason = Literal["stop", "length", "abort", "error"]


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


class Request:
    """One sequence to generate.

    Args:
        prompt: int64 ``[tokens]``, at least one.
        generation: What is asked for.
        text: Where tokens become text and stop strings are found.
        receive: Called with every event of this request, the last of which has a ``finish``.
    """

    def __init__(
        self, prompt: IntArray, generation: Generation, *, text: TextStream, receive: Callable[[Event], None]
    ) -> None:
        self.prompt = np.ascontiguousarray(prompt, np.int64)
        self.generation = generation
        self.text = text
        self.receive = receive
        self.output: list[int] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        """One entry per prompt token but the first; complete before the first event."""
        self.row = Row(generation.sampling, self.prompt, self.output)
        self._stop_tokens = np.array(sorted(generation.stop_ids), np.int64)

    def check(self, capacity: int) -> None:
        """Refuse what can never run.

        Raises:
            ContextLengthError: Prompt and answer exceed ``capacity`` tokens. Nothing is ever truncated silently.
        """
        prompt, answer = len(self.prompt), self.generation.max_tokens
        if prompt + answer > capacity:
            raise ContextLengthError(
                f"the context has {capacity} tokens, but the prompt has {prompt} and up to {answer} were asked for",
                hint="shorten the prompt, ask for fewer tokens, or serve with a larger --context",
            )

    def block_early_stops(self) -> None:
        """Keep the sampler from ending the answer before ``min_tokens``."""
        is_early = len(self.output) < self.generation.min_tokens
        self.row.blocked = self._stop_tokens if is_early else self._stop_tokens[:0]

    def take(self, token: int, logprob: TokenLogprob | None) -> Event:
        """Append a token that was chosen, and say what that means."""
        self.output.append(token)
        if token in self.generation.stop_ids:
            return Event(self, token, self.text.finish(), logprob, "stop")
        piece = self.text.push(token)
        if self.text.is_stopped:
            return Event(self, token, piece, logprob, "stop")
        if len(self.output) >= self.generation.max_tokens:
            return Event(self, token, piece + self.text.finish(), logprob, "length")
        return Event(self, token, piece, logprob)
