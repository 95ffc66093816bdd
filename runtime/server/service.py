"""Joins the event loop of the server to the engine's thread: loading, submitting, waiting, cancelling, health."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from starlette.requests import Request as HttpRequest

from llmopt.optimizer.manifest import Manifest
from llmopt.runtime.build import Build
from llmopt.runtime.engine import Engine, EngineClosedError, QueueFullError, QueueLimits
from llmopt.runtime.policy import Policy, default_policy
from llmopt.runtime.request import Event, Request
from llmopt.runtime.runner import deliver_here
from llmopt.runtime.server.background import LoadedInBackground
from llmopt.runtime.server.errors import ApiError
from llmopt.runtime.server.metrics import Metrics

__all__ = ["Conduct", "Description", "Receiver", "Service"]

logger = logging.getLogger(__name__)

STUCK_AFTER = 60.0
"""Seconds one step may take before the server calls itself unhealthy."""

Receiver: TypeAlias = Callable[[Event], None]


class Description(NamedTuple):
    """What a server tells of its build.

    Attributes:
        max_model_len: Tokens of the longest request.
        fingerprint: Equal for equal builds.
        manifest: Of the build.
    """

    max_model_len: int
    fingerprint: str
    manifest: Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Conduct:
    """How a server behaves under load.

    Attributes:
        policy: Of its engine, made when the build has been opened.
        limits: How much may be unfinished.
        timeout: Seconds that a request may take; None is no limit.
        admin_key: Lets its holder load and unload adapters; None lets nobody.
    """

    policy: Callable[[Build], Policy] = default_policy
    limits: QueueLimits = field(default_factory=QueueLimits)
    timeout: float | None = None
    admin_key: str | None = None


class Service(LoadedInBackground[Build]):
    """One build, loaded in the background and served by one engine."""

    def __init__(
        self,
        load: Callable[[], Build],
        *,
        model_name: str,
        on_failure: Callable[[], None] = lambda: None,
        conduct: Conduct | None = None,
    ) -> None:
        super().__init__(load, model_name=model_name, on_failure=on_failure)
        self._conduct = conduct or Conduct()
        self._build: Build | None = None
        self._metrics: Metrics | None = None
        self._engine: Engine | None = None

    @property
    def build(self) -> Build:
        """The build.

        Raises:
            ApiError: 503 while it is loading or when it cannot be used any more.
        """
        self.check_health()
        if self._build is None:
            raise ApiError(503, "the model is loading", code="loading")
        return self._build

    @property
    def description(self) -> Description:
        """What is served.

        Raises:
            ApiError: 503; see ``build``.
        """
        build = self.build
        return Description(build.backend.capacity, build.fingerprint, build.manifest)

    def check_health(self) -> None:
        """Return when requests can be answered.

        Raises:
            ApiError: 503 and why not.
        """
        self._check_loaded(is_loaded=self._engine is not None)
        assert self._engine is not None
        if not self._engine.is_alive:
            raise ApiError(503, "the engine has stopped", code="dead")
        if self._engine.seconds_in_step > STUCK_AFTER:
            raise ApiError(503, f"one step has run for more than {STUCK_AFTER:.0f} s", code="stuck")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load in the background, and stop the engine at the end."""
        self._start_loading()
        try:
            yield
        finally:
            if self._engine is not None:
                await asyncio.to_thread(self._engine.stop)
            if self._build is not None:
                await asyncio.to_thread(self._build.grammars.close)

    def _loaded(self, loaded: Build, loop: asyncio.AbstractEventLoop) -> None:
        def deliver(events: Sequence[Event]) -> None:
            metrics.note(events)
            loop.call_soon_threadsafe(deliver_here, events)

        policy = self._conduct.policy(loaded)
        engine = Engine(loaded.backend, policy=policy, limits=self._conduct.limits, deliver=deliver)
        metrics = Metrics(engine, self.model_name, loaded.sizes.running * loaded.sizes.capacity)
        engine.start()
        self._build, self._metrics, self._engine = loaded, metrics, engine

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            ApiError: 503 while the build is loading.
        """
        if self._engine is None:
            raise ApiError(503, "the model is loading", code="loading")
        return self._engine

    @property
    def metrics(self) -> Metrics:
        """The figures of the engine.

        Raises:
            ApiError: 503 while the build is loading.
        """
        self._check_loaded(is_loaded=self._metrics is not None)
        assert self._metrics is not None
        return self._metrics

    @property
    def adapter_names(self) -> Sequence[str]:
        """Of the build's adapters that can be told from the model itself."""
        return [name for name in self.build.adapters.names if name != self.model_name]

    @property
    def admin_key(self) -> str | None:
        """Lets its holder load and unload adapters; None lets nobody."""
        return self._conduct.admin_key

    @property
    def timeout(self) -> float | None:
        """Seconds that a request may take; None is no limit."""
        return self._conduct.timeout

    def check_room(self, requests: Sequence[Request]) -> None:
        """Refuse requests when too much is unfinished.

        Raises:
            ApiError: 429.
        """
        try:
            self.engine.check_room(requests)
        except QueueFullError as error:
            raise _queue_full(error) from error

    async def run(self, requests: Sequence[Request], http: HttpRequest) -> AsyncGenerator[tuple[int, Event]]:
        """Submit requests and yield what happens to them, each with the request's index, until all have ended.

        They are cancelled when the client leaves, and when the caller stops listening.

        Args:
            requests: Made with ``receive`` unset; this sets it.
            http: Whose client waits for them.
        """
        engine = self.engine
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        left = len(requests)
        watcher = asyncio.create_task(_cancel_when_gone(http, engine, requests))
        try:
            for index, request in enumerate(requests):
                request.receive = _receiver(index, events)
                try:
                    engine.submit(request)
                except EngineClosedError as error:
                    raise ApiError(503, str(error), code="dead") from error
                except QueueFullError as error:
                    raise _queue_full(error) from error
            while left:
                index, event = await events.get()
                if event.finish is not None:
                    left -= 1
                yield index, event
        finally:
            watcher.cancel()
            if left:
                _cancel(engine, requests)


def _queue_full(error: QueueFullError) -> ApiError:
    return ApiError(429, error.message, code="queue_full", retry_after=error.retry_after)


def _receiver(index: int, events: "asyncio.Queue[tuple[int, Event]]") -> Receiver:
    return lambda event: events.put_nowait((index, event))


def _cancel(engine: Engine, requests: Sequence[Request]) -> None:
    for request in requests:
        engine.cancel(request)


async def _cancel_when_gone(http: HttpRequest, engine: Engine, requests: Sequence[Request]) -> None:
    """Wait for the client to leave: neither kind of response notices by itself while it waits for the engine."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    logger.info("a client left: %d request(s) cancelled", len(requests))
    _cancel(engine, requests)
