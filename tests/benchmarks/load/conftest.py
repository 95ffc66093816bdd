"""A tokenizer of bytes, entrants of which something was measured, and a server of letters."""

import asyncio
import json
import socket
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import tokenizers

from llmopt.benchmarks.load.entrant import Entrant, Measured
from llmopt.benchmarks.load.events import Answer
from llmopt.benchmarks.load.run_server import Front, News
from llmopt.benchmarks.load.servers import Contender
from llmopt.benchmarks.server import free_port

_LETTER = 64
"""A byte's token that is a character of its own."""


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory) -> Path:
    """A folder of a tokenizer with one token per byte."""
    directory = tmp_path_factory.mktemp("byte-tokenizer")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}), encoding="utf-8")
    return directory


@pytest.fixture
def entrant(tmp_path):
    """A server by its name, with what was measured of it or why it failed."""

    def make(name: str, error: str | None = None, **measured) -> Entrant:
        contender = Contender(f"{name} 1.0", "all", prepare=lambda subject: pytest.fail("nothing is started"))
        return Entrant(name, contender, tmp_path, Measured(**measured), error)

    return make


def _answer(first: float, gaps=(), *, begun: float = 0.0, finish: str | None = "length") -> Answer:
    """One whose first token came ``first`` seconds after it was due, and the others one gap after another."""
    times = [begun + first]
    for gap in gaps:
        times.append(times[-1] + gap)
    return Answer(begun, tuple(times), finish)


@pytest.fixture
def answer():
    return _answer


@pytest.fixture
def letters():
    return CountingEngine


class CountingEngine:
    """Gives every request the same letter in every step."""

    def __init__(self, seconds: float = 0.001) -> None:
        self.dropped: list[int] = []
        self.most = 0
        self._seconds = seconds
        self._left: dict[int, int] = {}

    def add(self, key: int, ids: list[int], max_tokens: int) -> None:
        assert ids
        self._left[key] = max_tokens

    def drop(self, key: int) -> None:
        self.dropped.append(key)
        self._left.pop(key, None)

    def step(self) -> list[News]:
        time.sleep(self._seconds)
        self.most = max(self.most, len(self._left))
        found = []
        for key in list(self._left):
            self._left[key] -= 1
            found.append(News(key, [_LETTER], self._left[key] == 0))
            if not self._left[key]:
                del self._left[key]
        return found

    def is_busy(self) -> bool:
        return bool(self._left)


@pytest.fixture
def front(byte_tokenizer):
    """Serves an engine of letters on a port for as long as the block lasts."""

    @contextmanager
    def serve(engine: CountingEngine):
        port, loop = free_port(), asyncio.new_event_loop()
        tokenizer = tokenizers.Tokenizer.from_file(str(byte_tokenizer / "tokenizer.json"))

        async def run() -> None:
            with suppress(asyncio.CancelledError):
                await Front(lambda: engine, tokenizer).serve(port)

        task = loop.create_task(run())
        thread = threading.Thread(target=loop.run_until_complete, args=(task,))
        thread.start()
        try:
            while True:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
            yield port
        finally:
            loop.call_soon_threadsafe(task.cancel)
            thread.join(10)
            assert not thread.is_alive()
            loop.close()

    return serve
