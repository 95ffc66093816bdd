"""Runs the server: binds the port at once, loads in the background, drains when told to stop."""

import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from llmopt.optimizer.errors import InputError
from llmopt.runtime.server.app import create_app
from llmopt.runtime.server.embeddings import EmbeddingService
from llmopt.runtime.server.service import Conduct, Service

__all__ = ["Server", "bind", "serve"]

logger = logging.getLogger(__name__)

GRACE = 30
"""Seconds that running requests are given to end after the server was told to stop."""


class Server(uvicorn.Server):
    """uvicorn's server, but told to stop it ends in good order and does not raise the signal again."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM stop the server while it runs."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        InputError: The address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host} port {port}: {error}", hint="choose another --port") from error


def serve(
    load: Callable[[], Any],
    *,
    sock: socket.socket,
    model_name: str,
    vectors: bool = False,
    conduct: Conduct | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        load: Opens the build: a ``Build``, or an ``Encoder`` with ``vectors``.
        sock: As made by ``bind``.
        model_name: What clients call the model.
        vectors: Whether texts are answered by vectors; else by text.
        conduct: How a server of text behaves under load.

    Raises:
        LlmoptError: Whatever kept the build from opening.
    """

    def fail() -> None:
        server.handle_exit(signal.SIGTERM, None)

    service = (
        EmbeddingService(load, model_name=model_name, on_failure=fail)
        if vectors
        else Service(load, model_name=model_name, on_failure=fail, conduct=conduct)
    )
    config = uvicorn.Config(
        create_app(service), log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=GRACE
    )
    server = Server(config)
    server.run(sockets=[sock])
    if service.failure is not None:
        raise service.failure
