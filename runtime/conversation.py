"""Answers to one caller in this process: what ``llmopt chat`` and ``llmopt generate`` talk to."""

import queue
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from llmopt.optimizer.errors import InputError, LlmoptError
from llmopt.runtime.build import Build
from llmopt.runtime.engine import Engine
from llmopt.runtime.request import Event, Generation, Request
from llmopt.runtime.sampler import Sampling
from llmopt.runtime.text import TextStream

__all__ = ["Speaker", "speaking"]


class Speaker:
    """Streams answers of one build.

    Args:
        build: The build.
        engine: Running over its backend.
    """

    def __init__(self, build: Build, engine: Engine) -> None:
        self._build = build
        self._engine = engine

    def chat(self, messages: Sequence[Mapping[str, Any]], sampling: Sampling, *, max_tokens: int) -> Iterator[str]:
        """The answer to a conversation, piece by piece; closing the iterator ends it.

        Raises:
            InputError: No chat template, messages it refuses, or a conversation that leaves no room for an answer.
        """
        template = self._build.tokenizer.chat_template
        if template is None:
            raise InputError("this model has no chat template", hint="llmopt generate continues plain text")
        ids = self._build.tokenizer.encode(template.render(messages), add_special_tokens=False)
        return self._answer(ids, sampling, max_tokens)

    def complete(self, prompt: str, sampling: Sampling, *, max_tokens: int) -> Iterator[str]:
        """The continuation of a text, piece by piece; closing the iterator ends it.

        Raises:
            InputError: An empty prompt, or one that leaves no room.
        """
        ids = self._build.tokenizer.encode(prompt, add_special_tokens=True)
        return self._answer(ids, sampling, max_tokens, context=ids)

    def _answer(
        self, ids: Sequence[int], sampling: Sampling, max_tokens: int, *, context: Sequence[int] = ()
    ) -> Iterator[str]:
        capacity = self._build.backend.capacity
        if not ids:
            raise InputError("the prompt is empty")
        if len(ids) >= capacity:
            raise InputError(
                f"the context has {capacity} tokens and the prompt {len(ids)}: no room for an answer",
                hint="begin anew (/reset in a chat), or use a larger --context",
            )
        generation = Generation(
            max_tokens=min(max_tokens, capacity - len(ids)),
            stop_ids=self._build.tokenizer.stop_ids,
            sampling=sampling,
        )
        text = TextStream(self._build.tokenizer, context=context)
        return self._listen(np.array(ids, np.int64), generation, text)

    def _listen(
        self, ids: np.ndarray[Any, np.dtype[np.int64]], generation: Generation, text: TextStream
    ) -> Iterator[str]:
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request = Request(ids, generation, text=text, receive=events.put)
        self._engine.submit(request)
        try:
            while True:
                event = events.get()
                if event.text:
                    yield event.text
                if event.finish == "error":
                    raise LlmoptError(f"the engine failed: {event.error}")
                if event.finish is not None:
                    return
        finally:
            self._engine.cancel(request)


@contextmanager
def speaking(build: Build) -> Iterator[Speaker]:
    """Run an engine over a build as long as the context lasts."""
    engine = Engine(build.backend)
    engine.start()
    try:
        yield Speaker(build, engine)
    finally:
        engine.stop()
