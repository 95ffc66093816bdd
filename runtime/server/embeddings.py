"""``POST /v1/embeddings``: vectors of texts, by a build of an encoder that is loaded in the background."""

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llmopt.runtime.encoder import Encoded, Encoder
from llmopt.runtime.server.background import LoadedInBackground
from llmopt.runtime.server.errors import ApiError
from llmopt.runtime.server.models import check_model
from llmopt.runtime.server.protocol import EmbeddingBody, parse
from llmopt.runtime.server.service import Description

__all__ = ["EmbeddingService", "embed"]

MAX_WAITING = 4096
"""Texts of all requests that wait or run; beyond it, requests are refused."""


class EmbeddingService(LoadedInBackground[Encoder]):
    """One encoder, loaded in the background, that makes the vectors of one request after the other."""

    def __init__(
        self, load: Callable[[], Encoder], *, model_name: str, on_failure: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(load, model_name=model_name, on_failure=on_failure)
        self._encoder: Encoder | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="llmopt-encoder")
        self._waiting = 0

    @property
    def encoder(self) -> Encoder:
        """The encoder.

        Raises:
            ApiError: 503 while it is loading or when it could not be loaded.
        """
        self.check_health()
        assert self._encoder is not None
        return self._encoder

    @property
    def description(self) -> Description:
        """See ``Service.description``."""
        encoder = self.encoder
        return Description(encoder.engine.capacity, encoder.fingerprint, encoder.manifest)

    def check_health(self) -> None:
        """Return when requests can be answered.

        Raises:
            ApiError: 503 and why not.
        """
        self._check_loaded(is_loaded=self._encoder is not None)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load in the background; at the end wait for the request that is being answered."""
        self._start_loading()
        try:
            yield
        finally:
            await asyncio.to_thread(self._worker.shutdown, cancel_futures=True)

    def _loaded(self, loaded: Encoder, loop: asyncio.AbstractEventLoop) -> None:  # noqa: ARG002 - it delivers nothing
        self._encoder = loaded

    async def encode(self, texts: Sequence[str | Sequence[int]], prompt: str | None) -> Encoded:
        """The vectors of some texts, when the requests before have theirs.

        Raises:
            ApiError: 429 when too many texts wait.
            InputError: A text is too long, or there is no such prompt.
        """
        if self._waiting + len(texts) > MAX_WAITING:
            raise ApiError(429, f"{self._waiting} texts are waiting or running", code="queue_full")
        encoder = self.encoder
        self._waiting += len(texts)
        try:
            loop = asyncio.get_running_loop()
            work = partial(encoder.encode_counted, texts, prompt=prompt, cut=False)
            return await loop.run_in_executor(self._worker, work)
        finally:
            self._waiting -= len(texts)


async def embed(http: Request) -> Response:
    """The endpoint."""
    service: EmbeddingService = http.app.state.service
    body = parse(EmbeddingBody, await http.json())
    check_model(service, body.model)
    if not body.texts:
        raise ApiError(400, "input is an empty list", param="input")
    columns = service.encoder.dimensions
    if body.dimensions not in (None, columns):
        raise ApiError(400, f"the model's vectors have {columns} dimensions, and no fewer", param="dimensions")
    found = await service.encode(body.texts, body.prompt_name)
    data = [
        {"object": "embedding", "index": i, "embedding": _written(vector, body.encoding_format)}
        for i, vector in enumerate(found.vectors)
    ]
    usage = {"prompt_tokens": sum(found.tokens), "total_tokens": sum(found.tokens)}
    return JSONResponse({"object": "list", "data": data, "model": body.model or service.model_name, "usage": usage})


def _written(vector: Any, form: str) -> list[float] | str:
    """A vector as numbers, or as the bytes of its little-endian float32."""
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    numbers: list[float] = vector.tolist()
    return numbers
