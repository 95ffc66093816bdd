"""An HTTP front for engines that have none: streams completions token by token, as servers of the OpenAI API do.

It is run by the Python of the engine's own environment and imports nothing of llmopt. One thread runs the engine's
steps, whatever requests are there; the event loop reads requests and writes what a step gave. Its argument is JSON:
``engine`` (genai or openvino), ``path``, ``tokenizer``, ``threads`` and ``port``.
"""

import asyncio
import itertools
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
_HEALTHY = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"


class News(NamedTuple):
    """What a step gave one request: tokens, and whether they were its last."""

    key: int
    tokens: list[int]
    done: bool


class Engine(Protocol):
    """A program that works on several requests. All is called by one thread."""

    def add(self, key: int, ids: list[int], max_tokens: int) -> None:
        """Take up a request, greedy, on beyond the end of a text."""

    def drop(self, key: int) -> None:
        """Forget a request whose client has left."""

    def step(self) -> list[News]:
        """Work on what is there; nothing where nothing is."""

    def is_busy(self) -> bool:
        """Whether there is anything to work on."""


class Genai:
    """onnxruntime-genai's ``Engine``. On a CPU it makes static batches: the next begins when all of one have ended."""

    def __init__(self, path: str, threads: int) -> None:
        import onnxruntime_genai as og

        config = og.Config(path)
        session = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._og = og
        self._engine = og.Engine(og.Model(config))
        self._buffer = self._engine.create_event_buffer(256)
        self._requests: dict[int, tuple[Any, int]] = {}

    def add(self, key: int, ids: list[int], max_tokens: int) -> None:
        """See ``Engine``."""
        room = self._og.RequestOptions()
        room.set_max_session_tokens(len(ids) + max_tokens)
        request = self._engine.create_request(options=room)
        options = self._og.TurnOptions(request)
        options.set_do_sample(False)
        options.set_max_generated_tokens(max_tokens)
        options.set_min_generated_tokens(max_tokens)
        self._requests[key] = request, request.begin_turn(np.array(ids, np.int32), options)

    def drop(self, key: int) -> None:
        """See ``Engine``."""
        request, turn = self._requests.pop(key, (None, 0))
        if request is not None:
            request.cancel_turn(turn)
            request.close()

    def step(self) -> list[News]:
        """See ``Engine``."""
        keys = {id(request): key for key, (request, _) in self._requests.items()}
        found = []
        for event in self._engine.run(self._buffer):
            key = keys.get(id(event.request))
            if key is None:
                continue
            tokens = [event.token] if event.flags.value & self._og.EngineEventFlags.TOKEN.value else []
            done = event.finish_reason != self._og.FinishReason.NONE
            found.append(News(key, tokens, done))
            if done:
                request, _ = self._requests.pop(key)
                request.close()
        return found

    def is_busy(self) -> bool:
        """See ``Engine``."""
        return bool(self._engine.has_pending_requests())


class OpenVino:
    """OpenVINO GenAI's ``ContinuousBatchingPipeline``, which keeps blocks of prefixes it has seen."""

    def __init__(self, path: str, threads: int) -> None:
        import openvino as ov
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 2  # GB, far more than what is asked for at the same time
        scheduler.enable_prefix_caching = True
        self._ov, self._genai = ov, genai
        self._pipeline = genai.ContinuousBatchingPipeline(
            path, scheduler, "CPU", properties={"INFERENCE_NUM_THREADS": threads}
        )
        self._handles: dict[int, Any] = {}

    def add(self, key: int, ids: list[int], max_tokens: int) -> None:
        """See ``Engine``."""
        config = self._genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        prompt = self._ov.Tensor(np.array([ids], np.int64))
        self._handles[key] = self._pipeline.add_request(key, prompt, config)

    def drop(self, key: int) -> None:
        """See ``Engine``."""
        handle = self._handles.pop(key, None)
        if handle is not None:
            handle.cancel()

    def step(self) -> list[News]:
        """See ``Engine``."""
        if self.is_busy():
            self._pipeline.step()
        found = []
        for key, handle in list(self._handles.items()):
            tokens: list[int] = []
            while handle.can_read():
                tokens += [token for output in handle.read().values() for token in output.generated_ids]
            done = handle.get_status() != self._genai.GenerationStatus.RUNNING
            if tokens or done:
                found.append(News(key, tokens, done))
            if done:
                del self._handles[key]
        return found

    def is_busy(self) -> bool:
        """See ``Engine``."""
        return bool(self._pipeline.has_non_finished_requests())


class Worker:
    """Runs an engine in a thread of its own, which is also the one that makes it: some engines insist on that.

    Args:
        make: Makes the engine.
        deliver: Called in the event loop with what each step gave.

    Attributes:
        ready: Set when the engine is there.
    """

    def __init__(self, make: Callable[[], Engine], deliver: Callable[[list[News]], None]) -> None:
        self.ready = asyncio.Event()
        self._make = make
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._inbox: list[tuple[int, list[int], int]] = []
        self._left: list[int] = []
        self._something = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, key: int, ids: list[int], max_tokens: int) -> None:
        """Take up a request before the next step."""
        with self._something:
            self._inbox.append((key, ids, max_tokens))
            self._something.notify()

    def drop(self, key: int) -> None:
        """Forget one before the next step."""
        with self._something:
            self._left.append(key)
            self._something.notify()

    def _run(self) -> None:
        engine = self._make()
        self._loop.call_soon_threadsafe(self.ready.set)
        while True:
            with self._something:
                while not (self._inbox or self._left or engine.is_busy()):
                    self._something.wait()
                inbox, self._inbox = self._inbox, []
                left, self._left = self._left, []
            for request in inbox:
                engine.add(*request)
            for key in left:
                engine.drop(key)
            if news := engine.step():
                self._loop.call_soon_threadsafe(self._deliver, news)


class Stream:
    """An answer on its way to a client."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.done = asyncio.Event()
        self._writer = writer
        self._decoder = DecodeStream(skip_special_tokens=False)

    def send(self, tokenizer: Tokenizer, news: News) -> None:
        """Write the text of each token, as far as its characters are whole."""
        for number, token in enumerate(news.tokens, start=1):
            is_last = news.done and number == len(news.tokens)
            self._write(self._decoder.step(tokenizer, token) or "", "length" if is_last else None)
        if news.done:
            if not news.tokens:
                self._write("", "length")
            self._writer.write(b"data: [DONE]\n\n")
            self.done.set()

    def _write(self, text: str, finish: str | None) -> None:
        choice = {"index": 0, "text": text, "finish_reason": finish}
        if text or finish:
            self._writer.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())


class Front:
    """The server: what comes in goes to the worker, what a step gave goes out."""

    def __init__(self, make: Callable[[], Engine], tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._keys = itertools.count(1)
        self._streams: dict[int, Stream] = {}
        self._worker = Worker(make, self._deliver)

    async def serve(self, port: int) -> None:
        """Listen as soon as the engine is there."""
        await self._worker.ready.wait()
        server = await asyncio.start_server(self.answer, "127.0.0.1", port)
        await server.serve_forever()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, with one request."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            if head.startswith("GET"):
                writer.write(_HEALTHY)
                return
            body = json.loads(await reader.readexactly(_length(head.splitlines())))
            await self._stream(body, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has left
        finally:
            writer.close()

    async def _stream(self, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        key, stream = next(self._keys), Stream(writer)
        self._streams[key] = stream
        writer.write(_HEAD)
        self._worker.add(key, self._tokenizer.encode(body["prompt"]).ids, body["max_tokens"])
        waiting = [asyncio.create_task(stream.done.wait()), asyncio.create_task(reader.read())]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        if self._streams.pop(key, None) is not None and not stream.done.is_set():
            self._worker.drop(key)

    def _deliver(self, news: Iterable[News]) -> None:
        for each in news:
            if stream := self._streams.get(each.key):
                stream.send(self._tokenizer, each)


def _length(lines: Iterable[str]) -> int:
    return next(int(line.partition(":")[2]) for line in lines if line.lower().startswith("content-length:"))


async def _serve(given: dict[str, Any]) -> None:
    kinds: dict[str, type[Genai] | type[OpenVino]] = {"genai": Genai, "openvino": OpenVino}
    tokenizer = Tokenizer.from_file(given["tokenizer"])
    await Front(lambda: kinds[given["engine"]](given["path"], given["threads"]), tokenizer).serve(given["port"])


def _give_up(failure: threading.ExceptHookArgs) -> None:
    """End the process when the engine's thread has failed: nobody would be answered any more."""
    traceback.print_exception(failure.exc_value)
    os._exit(1)


def main() -> None:
    """Serve until the process is told to stop."""
    threading.excepthook = _give_up
    asyncio.run(_serve(json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
