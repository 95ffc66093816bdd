"""``POST /v1/chat/completions``: answer a conversation."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from llmopt.runtime.request import Event, Request
from llmopt.runtime.sampler import TokenLogprob
from llmopt.runtime.server.adapters import chosen_adapter
from llmopt.runtime.server.answers import Answer, engine_error, event_stream, finite
from llmopt.runtime.server.constraints import grammar_of
from llmopt.runtime.server.prompts import chat_prompt, make_requests
from llmopt.runtime.server.protocol import ChatBody, parse
from llmopt.runtime.server.service import Service
from llmopt.runtime.text import Tokenizer

__all__ = ["chat"]


async def chat(http: HttpRequest) -> Response:
    """The endpoint."""
    service: Service = http.app.state.service
    body = parse(ChatBody, await http.json())
    adapter = chosen_adapter(service, body.model)
    grammar = await grammar_of(body, service.build.grammars)
    prompts = [chat_prompt(body, service.build)]
    requests = make_requests(body, prompts, service.build, timeout=service.timeout, grammar=grammar, adapter=adapter)
    service.check_room(requests)
    if body.stream:
        answer = Answer("chat.completion.chunk", "chatcmpl", body, service)
        return event_stream(_stream(http, service, answer, requests))
    choices = [_Choice(i, service.build.tokenizer) for i in range(len(requests))]
    async with aclosing(service.run(requests, http)) as events:
        async for index, event in events:
            if error := engine_error(event):
                raise error
            choices[index].add(event)
    answer = Answer("chat.completion", "chatcmpl", body, service)
    return JSONResponse(answer.whole([choice.whole() for choice in choices], requests, body.choices))


async def _stream(http: HttpRequest, service: Service, answer: Answer, requests: list[Request]) -> AsyncIterator[str]:
    copies, tokenizer = len(requests), service.build.tokenizer
    opened: set[int] = set()
    async with aclosing(service.run(requests, http)) as events:
        async for index, event in events:
            if error := engine_error(event):
                raise error
            if index not in opened:
                opened.add(index)
                yield answer.chunk(_delta(index, {"role": "assistant", "content": ""}), requests, copies)
            if event.text or event.logprob is not None:
                entry = _logprobs([event.logprob], tokenizer) if event.logprob is not None else None
                yield answer.chunk(_delta(index, {"content": event.text}, logprobs=entry), requests, copies)
            if event.finish is not None:
                yield answer.chunk(_delta(index, {}, finish=event.finish), requests, copies)
    yield answer.end(requests, copies)


def _delta(
    index: int, delta: dict[str, Any], *, logprobs: dict[str, Any] | None = None, finish: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


class _Choice:
    """One answer, collected."""

    def __init__(self, index: int, tokenizer: Tokenizer) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._text = ""
        self._finish: str | None = None
        self._entries: list[TokenLogprob] = []

    def add(self, event: Event) -> None:
        """Take up what one step did."""
        self._text += event.text
        self._finish = event.finish
        if event.logprob is not None:
            self._entries.append(event.logprob)

    def whole(self) -> dict[str, Any]:
        """The choice as JSON."""
        return {
            "index": self._index,
            "message": {"role": "assistant", "content": self._text, "refusal": None},
            "logprobs": _logprobs(self._entries, self._tokenizer) if self._entries else None,
            "finish_reason": self._finish,
        }


def _logprobs(entries: list[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    def named(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token),
            "logprob": finite(logprob),
            "bytes": list(tokenizer.token_bytes(token)),
        }

    content = [
        named(entry.token, entry.logprob) | {"top_logprobs": [named(token, value) for token, value in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}
