"""Loads what a server answers with while it already listens, and says why it cannot answer yet."""

import asyncio
import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from llmopt.runtime.server.errors import ApiError

__all__ = ["LoadedInBackground"]

Loaded = TypeVar("Loaded")


class LoadedInBackground(ABC, Generic[Loaded]):
    """A build that is opened in a thread.

    Args:
        load: Opens the build; called in a thread.
        model_name: What clients call the model.
        on_failure: Called in the event loop when the build cannot be opened.
    """

    def __init__(
        self, load: Callable[[], Loaded], *, model_name: str, on_failure: Callable[[], None] = lambda: None
    ) -> None:
        self.model_name = model_name
        self.failure: BaseException | None = None
        self._load = load
        self._on_failure = on_failure

    @property
    def adapter_names(self) -> Sequence[str]:
        """What it answers to besides ``model_name``: adapters of the model."""
        return ()

    @abstractmethod
    def _loaded(self, loaded: Loaded, loop: asyncio.AbstractEventLoop) -> None:
        """Take what was loaded; called in the thread."""

    def _check_loaded(self, *, is_loaded: bool) -> None:
        """Return when there is something to answer with.

        Raises:
            ApiError: 503 and why not.
        """
        if self.failure is not None:
            raise ApiError(503, f"the model cannot be loaded: {self.failure}", code="failed")
        if not is_loaded:
            raise ApiError(503, "the model is loading", code="loading")

    def _start_loading(self) -> None:
        loop = asyncio.get_running_loop()
        # A daemon thread and not the loop's executor: an interrupted start must not wait for the load to finish.
        threading.Thread(target=self._open, args=(loop,), name="llmopt-load", daemon=True).start()

    def _open(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self._loaded(self._load(), loop)
        except BaseException as error:  # noqa: BLE001 - raised again by whoever started the server
            self.failure = error
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self._on_failure)
