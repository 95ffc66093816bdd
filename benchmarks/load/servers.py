"""The servers that are compared: what each is made from, and the command that starts it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmopt.benchmarks.child import run
from llmopt.benchmarks.genai_peer import GENAI_VERSION, genai_python, make_peer
from llmopt.benchmarks.loaders.programs import LOADERS
from llmopt.benchmarks.peer import TORCH, Peer, installed
from llmopt.benchmarks.plain_checkpoint import write_checkpoint
from llmopt.benchmarks.report import say
from llmopt.benchmarks.server import serve_command
from llmopt.optimizer.cache import publish
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.loader import load
from llmopt.optimizer.model import Model

__all__ = ["OURS", "SERVERS", "Contender", "Launch", "Subject"]

OURS = "llmopt"

SLOTS = 32
"""Requests that ours runs at once."""

CONTEXT = 2048
"""Tokens of one request at most, prompt and answer: what ours takes by default."""

_FRONT = Path(__file__).with_name("run_server.py")

_LLAMA_CPP = Peer(
    "llama-cpp-python 0.3.36",
    _FRONT,
    (
        *LOADERS["llama_cpp"].install,
        "fastapi==0.165.0",
        "pydantic-settings==2.16.3",
        "sse-starlette==3.7.0",
        "starlette-context==0.5.1",
        "uvicorn==0.54.0",
    ),
    environment=LOADERS["llama_cpp"].environment,
)

_OPENVINO = Peer(
    "OpenVINO GenAI 2026.4.1",
    _FRONT,
    (
        TORCH,
        "huggingface-hub==1.21.0",
        "nncf==3.4.0",
        "openvino==2026.4.1",
        "openvino-genai==2026.4.1.0",
        "openvino-tokenizers==2026.4.1.0",
        "requests",
        "setuptools==84.2.1",
        "transformers==5.5.4",
    ),
    alone=("optimum==2.3.0", "optimum-intel==2.2.0"),  # they ask for torchvision, which this torch does not load
)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is served.

    Attributes:
        build: Ours, with the tokenizer of all.
        model: That it was made from.
        out: Where what others need is made.
        threads: Of every server.
    """

    build: Path
    model: Model
    out: Path
    threads: int

    @property
    def peers(self) -> Path:
        """Where their environments and models are."""
        return self.out / "bench" / "peers"

    @property
    def version(self) -> str:
        """Of the model, for names of folders."""
        return self.model.source.digest[:12]


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
    fields: Mapping[str, Any] = field(default_factory=dict)
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
        {"temperature": 0, "ignore_eos": True, "skip_special_tokens": False},
    )


def _llama_cpp(subject: Subject) -> Launch:
    """Its own server, which leaves a request unfinished when the next one comes unless it is told not to."""
    python = installed(_LLAMA_CPP, subject.peers / "llama_cpp")
    folder = subject.peers / "models" / f"gguf-{subject.version}"
    if not folder.is_dir():
        with publish(folder) as partial:
            load("exporters", "gguf")(type="Q8_0").export(subject.model, partial, PassContext(verify="none"))
    model = next(folder.rglob("*.gguf"))
    settings = {
        "model": str(model.absolute()),
        "n_ctx": str(CONTEXT),
        "n_threads": str(subject.threads),
        "n_threads_batch": str(subject.threads),
        "logits_all": "false",
        "interrupt_requests": "false",
        "verbose": "false",
        "host": "127.0.0.1",
    }
    options = [part for name, value in settings.items() for part in (f"--{name}", value)]
    return Launch(
        lambda port: [str(python), "-m", "llama_cpp.server", *options, "--port", str(port)],
        {"temperature": 0, "repeat_penalty": 1, "logit_bias": dict.fromkeys(_special_tokens(subject.build), -1000)},
        environment=_alone(subject.threads),
        health="/v1/models",
    )


def _special_tokens(build: Path) -> list[str]:
    """Their numbers: among them are all that llama.cpp takes for the end of a text."""
    content = json.loads((build / "tokenizer.json").read_text("utf-8"))
    return [str(token["id"]) for token in content["added_tokens"] if token["special"]]


def _genai(subject: Subject) -> Launch:
    model = make_peer(subject.model, subject.out)
    return _behind_front(subject, genai_python(subject.out), "genai", model)


def _openvino(subject: Subject) -> Launch:
    python = installed(_OPENVINO, subject.peers / "openvino")
    folder = subject.peers / "models" / f"openvino-{subject.version}"
    if not folder.is_dir():
        say(f"exporting the model for {_OPENVINO.title}")
        checkpoint = write_checkpoint(subject.model, subject.out / "bench" / "checkpoints" / subject.version)
        with publish(folder) as partial:
            command = [str(python.with_name("optimum-cli")), "export", "openvino", "-m", str(checkpoint.absolute())]
            command += ["--task", "text-generation-with-past", "--weight-format", "int8", str(partial)]
            run(command, log=folder.with_suffix(".log"), environment=_alone(subject.threads))
    return _behind_front(subject, python, "openvino", folder)


def _behind_front(subject: Subject, python: Path, engine: str, model: Path) -> Launch:
    """An engine that has no server: ours for it never stops at the end of a text."""
    given = {
        "engine": engine,
        "path": str(model.absolute()),
        "tokenizer": str((subject.build / "tokenizer.json").absolute()),
        "threads": subject.threads,
    }
    return Launch(
        lambda port: [str(python.absolute()), str(_FRONT), json.dumps({**given, "port": port})],
        environment=_alone(subject.threads),
    )


def _alone(threads: int) -> dict[str, str]:
    """Variables of programs that must not see this environment."""
    return {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}


SERVERS: Mapping[str, Contender] = {
    OURS: Contender("llmopt W8A8", f"{SLOTS} slots, continuous", _ours),
    "llama_cpp": Contender(f"{_LLAMA_CPP.title} Q8_0", "1 request: its server makes no batches", _llama_cpp),
    "genai": Contender(f"onnxruntime-genai {GENAI_VERSION} int4", "batches of 4, static", _genai),
    "openvino": Contender(f"{_OPENVINO.title} int8", "all, continuous", _openvino),
}
"""By the names that ``--servers`` takes."""
