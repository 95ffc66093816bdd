"""A server over the toy backend, on a real socket."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from llmopt.optimizer.manifest import Manifest, SourceEntry, Verdict
from llmopt.runtime.backends.toy import ToyBackend, toy_engine
from llmopt.runtime.build import Build
from llmopt.runtime.catalogue import Catalogue
from llmopt.runtime.server.app import create_app
from llmopt.runtime.server.serve import Server, bind
from llmopt.runtime.server.service import Service
from llmopt.runtime.sizing import Sizes
from llmopt.runtime.structured.grammar import Grammars
from llmopt.runtime.text import Tokenizer


@dataclass(frozen=True)
class Served:
    url: str
    service: Service

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, trust_env=False)


def toy_build(directory: Path, **backend) -> Build:
    slots = backend.pop("slots", 4)
    engine = toy_engine(vocab_size=258, capacity=512, adapters=backend.pop("adapters", 0))
    catalogue = Catalogue(directory, engine.lora, backend.pop("catalogue", {}))
    manifest = Manifest(
        llmopt="0",
        versions={},
        source=SourceEntry(spec="toy", digest="", files={}),
        recipe={},
        architecture="toy",
        layers=[],
        passes=[],
        engines=[engine],
        verdict=Verdict(status="unjudged"),
    )
    sizes = Sizes(running=slots, slots=slots, capacity=engine.capacity, bytes=0)
    backend = ToyBackend(engine, slots=slots, **backend)
    tokenizer = Tokenizer(directory)
    grammars = Grammars(tokenizer, engine.vocab_size)
    return Build(directory, manifest, backend, tokenizer, "fp_toy", sizes, grammars, catalogue)


@contextmanager
def serving(load: Callable[[], Build], *, wait: bool = True, **service) -> Iterator[Served]:
    import uvicorn

    service = Service(load, model_name="toy", **service)
    sock = bind("127.0.0.1", 0)
    config = uvicorn.Config(create_app(service), log_level="warning", lifespan="on", timeout_graceful_shutdown=5)
    server = Server(config)
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    served = Served(f"http://127.0.0.1:{sock.getsockname()[1]}", service)
    try:
        with served.client() as client:
            while wait and client.get("/health").status_code != 200:
                pass
        yield served
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(byte_tokenizer) -> Iterator[Served]:
    with serving(lambda: toy_build(byte_tokenizer)) as found:
        yield found


@pytest.fixture
def client(served) -> Iterator[httpx.Client]:
    with served.client() as found:
        yield found


@pytest.fixture
def toy_server(byte_tokenizer):
    """Serves the toy for one test: options of its backend, its tokenizer, and what to do before it is loaded."""

    def start(*, wait=True, before_load=lambda: None, tokenizer=byte_tokenizer, service=(), **backend):
        def load() -> Build:
            before_load()
            return toy_build(tokenizer, **backend)

        return serving(load, wait=wait, **dict(service))

    return start
