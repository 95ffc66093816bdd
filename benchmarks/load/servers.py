"""The servers that are compared: what each is made from, and the command that starts it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmopt.benchmarks.server import serve_command
from llmopt.optimizer.model import Model

__all__ = ["OURS", "SERVERS", "Contender", "Launch", "Subject"]

OURS = "llmopt"

SLOTS = 16
"""Requests that ours runs at once."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is served.

    Attributes:
        build: Ours, with the tokenizer of all.
        model: That it was made from.
        folder: Where what others need is made.
        threads: Of every server.
    """

    build: Path
    model: Model
    folder: Path
    threads: int


@dataclass(frozen=True, slots=True)
class Launch:
    """How a server is started and spoken to.

    Attributes:
        command: Program and arguments, for a port.
        fields: Of every request, besides the prompt: greedy, and on beyond the end of a text.
        environment: Variables that it needs.
        health: The path that answers when it is ready.
    """

    command: Callable[[int], list[str]]
    fields: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    health: str = "/health"


@dataclass(frozen=True, slots=True)
class Contender:
    """A server.

    Attributes:
        title: As printed, with version and precision.
        at_once: Requests that it works on at the same time, in words.
        prepare: Makes what is missing.
    """

    title: str
    at_once: str
    prepare: Callable[[Subject], Launch]


def _ours(subject: Subject) -> Launch:
    return Launch(
        lambda port: serve_command(subject.build, port, threads=subject.threads, slots=SLOTS),
        {"temperature": 0, "ignore_eos": True},
    )


SERVERS: Mapping[str, Contender] = {
    OURS: Contender("llmopt W8A8", f"{SLOTS} slots", _ours),
}
"""By the names that ``--servers`` takes."""
