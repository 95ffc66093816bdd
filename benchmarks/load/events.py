"""Server-sent events out of the bytes of an HTTP response, each with the time at which its last byte came."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Answer", "read_answer"]

Parts = Sequence[tuple[float, bytes]]
"""When bytes were read, and the bytes."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request.

    Attributes:
        begun: When it was due, in seconds.
        times: When each piece of text came.
        finish: Why the text ended; None where it has not.
        error: What the server said instead; None where it did not.
    """

    begun: float
    times: tuple[float, ...] = ()
    finish: str | None = None
    error: str | None = None


def read_answer(begun: float, parts: Parts) -> Answer:
    """The answer that a stream of completions holds, also one that was cut off."""
    times: list[float] = []
    finish = error = None
    for time, event in _events(parts):
        if event == "[DONE]":
            continue
        content = json.loads(event)
        if "error" in content:
            error = str(content["error"].get("message", content["error"]))
        for choice in content.get("choices", ()):
            if choice.get("text"):
                times.append(time)
            finish = choice.get("finish_reason") or finish
    status = parts[0][1].split(b"\r\n", 1)[0] if parts else b""
    if status and b" 200 " not in status + b" ":
        error = _body(parts)
    return Answer(begun, tuple(times), finish, error)


def _events(parts: Parts) -> Iterator[tuple[float, str]]:
    """The data of every event."""
    pending = b""
    for time, content in _contents(parts):
        pending += content.replace(b"\r", b"")
        *whole, pending = pending.split(b"\n\n")
        for event in whole:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    yield time, line.removeprefix(b"data:").strip().decode()


def _contents(parts: Parts) -> Iterator[tuple[float, bytes]]:
    """What is in the body, as it came: without the head, and without the sizes of chunks."""
    buffer, head = b"", None
    left = 0  # bytes of a chunk that have not come, its end of line included
    for time, data in parts:
        buffer += data
        if head is None:
            head, found, rest = buffer.partition(b"\r\n\r\n")
            if not found:
                head = None
                continue
            buffer = rest
        if b"transfer-encoding: chunked" not in head.lower():
            yield time, buffer
            buffer = b""
            continue
        while buffer:
            if not left:
                size, found, rest = buffer.partition(b"\r\n")
                if not found:
                    break
                left, buffer = int(size, 16) + 2, rest
            taken, buffer = buffer[:left], buffer[left:]
            left -= len(taken)
            yield time, taken if left else taken.removesuffix(b"\r\n")


def _body(parts: Parts) -> str:
    body = b"".join(content for _, content in _contents(parts)).decode(errors="replace")
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200] or "no answer"
