"""A build as a Python object: many prompts in, their answers out, in one continuous batch."""

import queue
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np

from llmopt.optimizer.errors import InputError, LlmoptError
from llmopt.runtime.backends.opening import Executor
from llmopt.runtime.build import open_build
from llmopt.runtime.engine import Engine, QueueLimits
from llmopt.runtime.policy import Choices, policy_for
from llmopt.runtime.request import Event, FinishReason, Generation, Request
from llmopt.runtime.sampler import Sampling, TokenLogprob
from llmopt.runtime.structured.grammar import Constraint
from llmopt.runtime.text import TextStream

__all__ = ["LLM", "Answer", "Options", "Piece", "Prompt"]

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text, token ids, or the messages of a conversation, which the model's chat template turns into a text."""

_WITHOUT_LIMIT = QueueLimits(requests=2**62, tokens=2**62)

_AHEAD = 64
"""Prompts that wait in the engine for each that runs: enough to choose from, few enough for files of any length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What answers are to be like.

    Attributes:
        max_tokens: Most tokens of an answer; None takes what is left of the context.
        yields: Whether ``max_tokens`` is lowered to what is left of the context; else such a prompt is refused.
        sampling: How tokens are chosen; greedy, where nothing is said.
        stop: Texts that end an answer.
        ignore_eos: Whether tokens that end a generation are taken like any other.
        constraint: What answers have to obey.
        adapter: The name of the build's adapter that answers; the model as it is when None.
    """

    max_tokens: int | None = 256
    yields: bool = False
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0))
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    constraint: Constraint | None = None
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a prompt.

    Attributes:
        text: The answer.
        tokens: Its tokens, the one that ended it included.
        finish: Why it ended: ``stop``, ``length``, or ``error``.
        prompt_tokens: How long the prompt is.
        cached_tokens: Of these, those that were computed before, for other prompts.
        logprobs: Of its tokens, where asked for.
        error: What went wrong, with ``finish`` "error".
    """

    text: str
    tokens: tuple[int, ...]
    finish: FinishReason
    prompt_tokens: int
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer.

    Attributes:
        index: Of its prompt.
        text: What has become certain, possibly empty.
        answer: The whole answer, with its last piece.
    """

    index: int
    text: str
    answer: Answer | None = None


class LLM:
    """A build that is ready to answer.

    ``with LLM("out/int8") as llm: llm.generate(["Once upon a time"])``

    Args:
        build: The build's directory.
        slots: Prompts that run at the same time; 16, or as many as fit, when omitted.
        context: Tokens of prompt and answer; the engine's, at most 2048, when omitted.
        threads: Of the engine; the cores this process may use when omitted.
        memory: Bytes that keys and values may take; half of what is free when omitted.
        choices: What else somebody who starts an engine may choose.
        executor: Which of the build's engines is executed, and by what; the best that runs here when omitted.
        force: Whether to open a build that missed its gates.

    Raises:
        LlmoptError: As ``open_build`` and ``policy_for`` do.
    """

    def __init__(
        self,
        build: str | Path,
        *,
        slots: int | None = None,
        kept_slots: int | None = None,
        context: int | None = None,
        threads: int | None = None,
        memory: int | None = None,
        choices: Choices | None = None,
        executor: Executor | None = None,
        force: bool = False,
    ) -> None:
        self.build = open_build(
            Path(build),
            slots=slots,
            kept_slots=kept_slots,
            context=context,
            threads=threads,
            memory=memory,
            executor=executor,
            force=force,
        )
        policy = policy_for(self.build, choices or Choices())
        self.engine = Engine(self.build.backend, policy=policy, limits=_WITHOUT_LIMIT)
        self.engine.start()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine."""
        self.engine.stop()
        self.build.grammars.close()

    def generate(
        self, prompts: Iterable[Prompt], options: Options | None = None, *, adapter: str | None = None
    ) -> list[Answer]:
        """Answer prompts, all in one batch that is always as full as it can be.

        Args:
            prompts: Read as they are needed.
            options: For all of them.
            adapter: In place of that of the options.

        Returns:
            One answer per prompt, in their order. A prompt whose run failed has ``finish`` "error".

        Raises:
            InputError: A prompt is empty, does not fit, or has tokens that the model does not know, or there is no such
                adapter; nothing is lost but the answers of this call.
        """
        if adapter is not None:
            options = replace(options or Options(), adapter=adapter)
        answers: dict[int, Answer] = {
            piece.index: piece.answer for piece in self.stream(prompts, options) if piece.answer is not None
        }
        return [answers[index] for index in range(len(answers))]

    def stream(self, prompts: Iterable[Prompt], options: Options | Sequence[Options] | None = None) -> Iterator[Piece]:
        """Answer prompts and say so piece by piece, whichever prompt they belong to; closing the iterator cancels.

        Args:
            prompts: Read as they are needed.
            options: For all of them, or for each.

        Raises:
            InputError: As ``generate`` does.
        """
        return _Stream(self, prompts, options or Options()).pieces()

    def request(self, prompt: Prompt, options: Options) -> Request:
        """A request of the engine, nobody's yet.

        Raises:
            InputError: The prompt is empty, does not fit, or has tokens that the model does not know.
        """
        build = self.build
        ids, is_continued = self._ids(prompt)
        room, wanted = max(build.backend.capacity - len(ids), 1), options.max_tokens
        if wanted is None or options.yields:
            wanted = room if wanted is None else min(wanted, room)
        generation = Generation(
            max_tokens=wanted,
            stop_ids=frozenset() if options.ignore_eos else build.tokenizer.stop_ids,
            sampling=options.sampling,
        )
        guide = None if options.constraint is None else build.grammars.compile(options.constraint)
        text = TextStream(build.tokenizer, stop=options.stop, context=ids if is_continued else ())
        adapter = None if options.adapter is None else build.adapters.find(options.adapter)
        request = Request(np.array(ids, np.int64), generation, text=text, guide=guide, adapter=adapter)
        request.check(build.backend.capacity, build.backend.engine.vocab_size)
        return request

    def _ids(self, prompt: Prompt) -> tuple[list[int], bool]:
        """A prompt's tokens, and whether its answer continues a text."""
        tokenizer = self.build.tokenizer
        if isinstance(prompt, str):
            return tokenizer.encode(prompt, add_special_tokens=True), True
        if prompt and isinstance(prompt[0], Mapping):
            if tokenizer.chat_template is None:
                raise InputError("this model has no chat template", hint="give it texts instead of messages")
            messages = [message for message in prompt if isinstance(message, Mapping)]
            return tokenizer.encode(tokenizer.chat_template.render(messages), add_special_tokens=False), False
        return [int(token) for token in prompt if not isinstance(token, Mapping)], True


class _Stream:
    """Prompts on their way through an engine."""

    def __init__(self, llm: LLM, prompts: Iterable[Prompt], options: Options | Sequence[Options]) -> None:
        self._llm = llm
        self._prompts = enumerate(prompts)
        self._is_alone = isinstance(prompts, Sequence) and len(prompts) == 1
        self._options = options
        self._events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        self._open: dict[int, Request] = {}
        self._texts: dict[int, list[str]] = {}
        self._logprobs: dict[int, list[TokenLogprob]] = {}

    def pieces(self) -> Iterator[Piece]:
        """What happens, until all have ended."""
        try:
            most = _AHEAD * self._llm.build.sizes.running
            is_more = True
            while is_more or self._open:
                while is_more and len(self._open) < most:
                    is_more = self._submit()
                if self._open:
                    yield self._piece(*self._events.get())
        finally:
            for request in self._open.values():
                self._llm.engine.cancel(request)

    def _submit(self) -> bool:
        """Hand the next prompt to the engine; False when there is none."""
        index, prompt = next(self._prompts, (-1, ""))
        if index < 0:
            return False
        options = self._options if isinstance(self._options, Options) else self._options[index]
        try:
            request = self._llm.request(prompt, options)
        except InputError as error:
            if self._is_alone:
                raise
            raise InputError(f"prompt {index}: {error.message}", hint=error.hint) from error
        request.receive = lambda event: self._events.put((index, event))
        self._open[index], self._texts[index], self._logprobs[index] = request, [], []
        self._llm.engine.submit(request)
        return True

    def _piece(self, index: int, event: Event) -> Piece:
        self._texts[index].append(event.text)
        if event.logprob is not None:
            self._logprobs[index].append(event.logprob)
        if event.finish is None:
            return Piece(index, event.text)
        if event.finish == "abort":
            raise LlmoptError("the engine was stopped before all prompts were answered")
        request = self._open.pop(index)
        answer = Answer(
            text="".join(self._texts.pop(index)),
            tokens=tuple(request.output),
            finish=event.finish,
            prompt_tokens=len(request.prompt),
            cached_tokens=request.cached_tokens,
            logprobs=tuple(self._logprobs.pop(index)),
            error=event.error,
        )
        return Piece(index, event.text, answer)
