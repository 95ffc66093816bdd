"""The ASGI application: the routes, and the service behind them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.routing import Route

from llmopt.runtime.server.adapters import load_adapter, unload_adapter
from llmopt.runtime.server.chat import chat
from llmopt.runtime.server.completions import complete
from llmopt.runtime.server.embeddings import EmbeddingService, embed
from llmopt.runtime.server.errors import error_handlers
from llmopt.runtime.server.metrics import metrics
from llmopt.runtime.server.models import health, models, one_model, version
from llmopt.runtime.server.service import Service

__all__ = ["create_app"]


def create_app(service: Service | EmbeddingService) -> Starlette:
    """The application that answers for ``service``, which starts and stops with it."""
    if isinstance(service, EmbeddingService):
        answering = [Route("/v1/embeddings", embed, methods=["POST"])]
    else:
        answering = [
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/load_lora_adapter", load_adapter, methods=["POST"]),
            Route("/v1/unload_lora_adapter", unload_adapter, methods=["POST"]),
            Route("/metrics", metrics),
        ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.service = service
        async with service.running():
            yield

    routes = [
        Route("/health", health),
        Route("/version", version),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        *answering,
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=error_handlers)
