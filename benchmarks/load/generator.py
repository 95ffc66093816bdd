"""Asks a server for completions, in a process of its own: some clients that are always busy, or at given times.

``python -m llmopt.benchmarks.load.generator ORDER`` prints the answers as JSON. While it measures it only notes bytes
and times: the server needs the cores. ORDER is a JSON file: ``port`` of 127.0.0.1; ``bodies`` of POST /v1/completions;
and either ``clients`` and ``seconds`` (None: until there is no more to ask), or ``times``, when each is asked, and
``patience``, the seconds after the last one at which those without an answer are given up.
"""

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmopt.benchmarks.load.events import Answer, read_answer

__all__ = ["main"]

_ACCEPTED = b"HTTP/1.1 200"


@dataclass(slots=True)
class _Request:
    """A request under way: when it was due and what has come so far."""

    begun: float
    parts: list[tuple[float, bytes]]


class _Generator:
    """Asks one server, and keeps what it says."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._requests: list[_Request] = []
        self._zero = time.perf_counter()

    def answers(self) -> list[Answer]:
        """Of all that was asked, in that order."""
        return [read_answer(request.begun, request.parts) for request in self._requests]

    async def keep_busy(self, bodies: list[bytes], clients: int, seconds: float | None) -> None:
        """Every client asks the next as soon as its last is answered; what is under way at the end is cut off."""
        waiting = iter(bodies)
        async with asyncio.timeout(seconds):
            await asyncio.gather(*(self._client(waiting) for _ in range(clients)))

    async def at_times(self, bodies: list[bytes], times: list[float], patience: float) -> None:
        """Ask each at its time, whether others are answered or not."""
        async with asyncio.timeout(times[-1] + patience):
            async with asyncio.TaskGroup() as tasks:
                for body, due in zip(bodies, times, strict=True):
                    await asyncio.sleep(max(due - self._now(), 0))
                    tasks.create_task(self._ask(body, due))

    async def _client(self, waiting: Iterator[bytes]) -> None:
        for body in waiting:
            if not await self._ask(body, self._now()):
                return

    async def _ask(self, body: bytes, begun: float) -> bool:
        """Whether the server took it up."""
        request = _Request(begun, [])
        self._requests.append(request)
        with suppress(OSError):  # what has come until then is the answer
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            try:
                writer.write(body)
                while data := await reader.read(1 << 16):
                    request.parts.append((self._now(), data))
            finally:
                writer.close()
        return bool(request.parts) and request.parts[0][1].startswith(_ACCEPTED)

    def _now(self) -> float:
        return time.perf_counter() - self._zero


def _request(body: dict[str, Any], port: int) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content


async def _answers(order: dict[str, Any]) -> list[Answer]:
    port = order["port"]
    bodies = [_request(body, port) for body in order["bodies"]]
    generator = _Generator(port)
    with suppress(TimeoutError):  # the time is over, which is how most runs end
        if "times" in order:
            await generator.at_times(bodies, order["times"], order["patience"])
        else:
            await generator.keep_busy(bodies, order["clients"], order["seconds"])
    return generator.answers()


def main() -> None:
    """Do what the order says."""
    order = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    answers = asyncio.run(_answers(order))
    json.dump([asdict(answer) for answer in answers], sys.stdout)


if __name__ == "__main__":
    main()
