"""``POST /v1/completions``: continue prompts, or score them."""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from llmopt.runtime.request import Event, Request
from llmopt.runtime.sampler import TokenLogprob
from llmopt.runtime.server.adapters import chosen_adapter
from llmopt.runtime.server.answers import Answer, engine_error, event_stream, finite
from llmopt.runtime.server.constraints import grammar_of
from llmopt.runtime.server.prompts import completion_parts, completion_prompts, make_requests
from llmopt.runtime.server.protocol import CompletionBody, parse
from llmopt.runtime.server.service import Service
from llmopt.runtime.text import Tokenizer

__all__ = ["complete"]


async def complete(http: HttpRequest) -> Response:
    """The endpoint."""
    service: Service = http.app.state.service
    body = parse(CompletionBody, await http.json())
    adapter = chosen_adapter(service, body.model)
    grammar = await grammar_of(body, service.build.grammars)
    prompts = completion_prompts(body, service.build)
    requests = make_requests(body, prompts, service.build, timeout=service.timeout, grammar=grammar, adapter=adapter)
    service.check_room(requests)
    choices = [_Choice(i, request, body, service.build.tokenizer) for i, request in enumerate(requests)]
    answer = Answer("text_completion", "cmpl", body, service)
    if body.stream:
        return event_stream(_stream(http, service, answer, choices, body))
    async with aclosing(service.run(requests, http)) as events:
        async for index, event in events:
            if error := engine_error(event):
                raise error
            choices[index].add(event)
    return JSONResponse(answer.whole([choice.take() for choice in choices], requests, body.choices))


async def _stream(
    http: HttpRequest, service: Service, answer: Answer, choices: "list[_Choice]", body: CompletionBody
) -> AsyncIterator[str]:
    requests = [choice.request for choice in choices]
    async with aclosing(service.run(requests, http)) as events:
        async for index, event in events:
            if error := engine_error(event):
                raise error
            choices[index].add(event)
            if choices[index].has_news:
                yield answer.chunk(choices[index].take(), requests, body.choices)
    yield answer.end(requests, body.choices)


class _Choice:
    """One continuation as far as it is known: the whole of it, or what is new since the last ``take``."""

    def __init__(self, index: int, request: Request, body: CompletionBody, tokenizer: Tokenizer) -> None:
        self.request = request
        self._index = index
        self._tokenizer = tokenizer
        self._echo = _echo(body, index, tokenizer) if body.echo else None
        self._text = ""
        self._finish: str | None = None
        self._logprobs = _Logprobs(tokenizer) if body.logprobs is not None else None

    @property
    def has_news(self) -> bool:
        """Whether there is anything to send."""
        return bool(self._text or self._finish or (self._logprobs is not None and self._logprobs.tokens))

    def add(self, event: Event) -> None:
        """Take up what one step did."""
        if self._echo is not None:
            self._text += self._echo
            if self._logprobs is not None:
                self._logprobs.add_prompt(self.request)
            self._echo = None
        self._text += event.text
        if self._logprobs is not None and event.logprob is not None:
            self._logprobs.add(event.logprob)
        self._finish = event.finish

    def take(self) -> dict[str, Any]:
        """The choice as JSON, and begin anew."""
        logprobs = self._logprobs.take() if self._logprobs is not None else None
        text, self._text = self._text, ""
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": self._finish}


def _echo(body: CompletionBody, index: int, tokenizer: Tokenizer) -> str:
    part = completion_parts(body)[index // body.choices]
    return part if isinstance(part, str) else tokenizer.decode(part, skip_special_tokens=False)


class _Logprobs:
    """The arrays of the API, one entry per token; the prompt's first token has no probability."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens: list[str] = []
        self._tokenizer = tokenizer
        self._logprobs: list[float | None] = []
        self._tops: list[dict[str, float] | None] = []
        self._offsets: list[int] = []
        self._offset = 0

    def add_prompt(self, request: Request) -> None:
        """Take up a prompt that was scored."""
        self._append(int(request.prompt[0]), None, None)
        for entry in request.prompt_logprobs:
            self.add(entry)

    def add(self, entry: TokenLogprob) -> None:
        """Take up one token."""
        self._append(entry.token, finite(entry.logprob), self._top(entry))

    def take(self) -> dict[str, Any]:
        """The arrays as JSON, and begin anew behind the last token."""
        taken = {
            "tokens": self.tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._tops,
            "text_offset": self._offsets,
        }
        self.tokens, self._logprobs, self._tops, self._offsets = [], [], [], []
        return taken

    def _append(self, token: int, logprob: float | None, top: dict[str, float] | None) -> None:
        text = self._tokenizer.token_text(token)
        self.tokens.append(text)
        self._logprobs.append(logprob)
        self._tops.append(top)
        self._offsets.append(self._offset)
        self._offset += len(text)

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The most likely tokens and the token itself; of tokens that look the same, the likelier one."""
        found: dict[str, float] = {}
        pairs: Sequence[tuple[int, float]] = (*entry.top, (entry.token, entry.logprob))
        for token, logprob in pairs:
            text = self._tokenizer.token_text(token)
            found[text] = max(finite(logprob), found.get(text, -9999.0))
        return found
