"""What all answers share: ids, usage, the stream of server-sent events, and errors of the engine."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import StreamingResponse

from llmopt.runtime.request import Event, Request
from llmopt.runtime.server.errors import ApiError, error_body
from llmopt.runtime.server.protocol import GenerationBody
from llmopt.runtime.server.service import Service

__all__ = ["Answer", "engine_error", "event_stream", "finite", "usage"]


class Answer:
    """The fields that all parts of one answer have in common.

    Args:
        kind: Of the OpenAI API, such as ``chat.completion``.
        prefix: Of the id.
        body: What was asked.
        service: Who answers.
    """

    def __init__(self, kind: str, prefix: str, body: GenerationBody, service: Service) -> None:
        self._shared = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": body.model or service.model_name,
            "system_fingerprint": service.build.fingerprint,
        }
        options = body.stream_options
        self._include_usage = options is not None and bool(options.include_usage)
        self._running_usage = options is not None and bool(options.continuous_usage_stats)

    def whole(self, choices: list[dict[str, Any]], requests: Sequence[Request], copies: int) -> dict[str, Any]:
        """A complete answer; ``copies`` is how many requests share each prompt."""
        return self._shared | {"choices": choices, "usage": usage(requests, copies)}

    def chunk(self, choice: dict[str, Any], requests: Sequence[Request], copies: int) -> str:
        """One server-sent event with a part of one choice."""
        data = self._shared | {"choices": [choice]}
        if self._running_usage:
            data["usage"] = usage(requests, copies)
        elif self._include_usage:
            data["usage"] = None
        return _event(data)

    def end(self, requests: Sequence[Request], copies: int) -> str:
        """What ends a stream."""
        done = "data: [DONE]\n\n"
        if not self._include_usage:
            return done
        return _event(self._shared | {"choices": [], "usage": usage(requests, copies)}) + done


def usage(requests: Sequence[Request], copies: int) -> dict[str, Any]:
    """Tokens read and written; a prompt with several answers counts once."""
    prompt = sum(len(request.prompt) for request in requests[::copies])
    completion = sum(len(request.output) for request in requests)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(request.cached_tokens for request in requests[::copies])},
    }


def engine_error(event: Event) -> ApiError | None:
    """The error that an event ends its answer with, if any."""
    if event.finish == "error":
        return ApiError(500, event.error or "the engine failed")
    if event.finish == "timeout":
        return ApiError(504, "the request took longer than this server allows", code="timeout")
    if event.finish == "abort":
        return ApiError(503, "the request was cancelled: the server is stopping or the client is gone", code="aborted")
    return None


def event_stream(parts: AsyncIterator[str]) -> StreamingResponse:
    """Server-sent events; an error in mid-stream becomes the last of them, since the status has been sent."""

    async def guarded() -> AsyncIterator[str]:
        try:
            async for part in parts:
                yield part
        except ApiError as error:
            yield _event(error.body)
        except Exception:
            yield _event(error_body(500, "the server made a mistake; its log has the details"))
            raise

    return StreamingResponse(guarded(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def finite(logprob: float) -> float:
    """JSON has no infinity; the value is the one vLLM writes."""
    return max(logprob, -9999.0)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
