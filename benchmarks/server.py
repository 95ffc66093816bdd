"""A server on a free port of this machine, ours or another, for as long as a ``with`` block lasts."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt.benchmarks.child import ChildError, llmopt_command

__all__ = ["Server", "free_port", "running", "running_server", "serve_command"]

_PATIENCE = 120.0
"""Seconds after which a server that does not answer is given up."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers.

    Attributes:
        url: Without a path.
        seconds_to_start: Until it was healthy.
        process: Its number.
    """

    url: str
    seconds_to_start: float
    process: int

    def chat(self, question: str, *, system: str | None = None, model: str | None = None, max_tokens: int = 64) -> str:
        """A model's greedy answer to one question behind a system prompt; omitted, it is the server's first model."""
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": question})
        asked = {"messages": messages, "temperature": 0, "max_tokens": max_tokens}
        answer = self._post("/v1/chat/completions", asked, model=model)
        return str(answer["choices"][0]["message"]["content"])

    def _post(self, path: str, body: dict[str, Any], *, model: str | None) -> Any:
        model = model or _get(f"{self.url}/v1/models")["data"][0]["id"]
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps({"model": model, **body}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=_PATIENCE) as response:
            return json.load(response)


def serve_command(directory: Path, port: int, *, threads: int, slots: int | None = None) -> list[str]:
    """The command that serves a build on a port of this machine."""
    command = [llmopt_command(), "serve", str(directory), "--host", "127.0.0.1", "--port", str(port)]
    return [*command, "--threads", str(threads), *([] if slots is None else ["--slots", str(slots)])]


@contextmanager
def running_server(directory: Path, *, log: Path, threads: int = 2) -> Iterator[Server]:
    """Serve the build in ``directory``, and stop when the block ends.

    Raises:
        ChildError: See ``running``.
    """
    port = free_port()
    with running(serve_command(directory, port, threads=threads), port, log=log) as server:
        yield server


@contextmanager
def running(
    command: Sequence[str],
    port: int,
    *,
    log: Path,
    health: str = "/health",
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run a program that serves on ``port``, and stop it when the block ends.

    Args:
        command: Program and arguments.
        port: That they name.
        log: What it says; overwritten.
        health: The path that answers when it is ready.
        environment: Variables added to this process's own.

    Raises:
        ChildError: The server ended, or did not answer in two minutes; the message holds the end of its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "NO_PROXY": "127.0.0.1", **(environment or {})},
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(url + health, process, started, log)
            yield Server(url, time.perf_counter() - started, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], started: float, log: Path) -> None:
    while time.perf_counter() - started < _PATIENCE:
        if process.poll() is not None:
            raise ChildError(f"the server ended with {process.returncode}:\n{log.read_text('utf-8')[-2000:]}")
        try:
            _get(url)
        except urllib.error.URLError:  # not listening yet, or not ready
            time.sleep(0.01)
        else:
            return
    raise ChildError(f"the server did not answer in {_PATIENCE:.0f} s:\n{log.read_text('utf-8')[-2000:]}")


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=_PATIENCE) as response:
        return json.load(response)


def free_port() -> int:
    """One of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
