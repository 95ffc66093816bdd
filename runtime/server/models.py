"""``GET /v1/models``, ``/health`` and ``/version``: what is served, and whether it is."""

import time
from collections.abc import Sequence
from importlib.metadata import version as installed_version
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llmopt.runtime.server.errors import ApiError
from llmopt.runtime.server.service import Description

__all__ = ["check_model", "health", "models", "one_model", "version"]

_STARTED = int(time.time())


class Served(Protocol):
    """What these routes ask of a service, whatever it serves."""

    model_name: str

    @property
    def adapter_names(self) -> Sequence[str]:
        """What it answers to besides: adapters of the model."""

    @property
    def description(self) -> Description:
        """What is served; raises ``ApiError`` 503 while there is nothing."""

    def check_health(self) -> None:
        """Raise ``ApiError`` 503 while requests cannot be answered."""


def check_model(service: Served, name: str | None) -> None:
    """Refuse requests for what is neither the model nor one of its adapters.

    Raises:
        ApiError: 404; or 503 while the model is loading.
    """
    service.check_health()
    if name is not None and name != service.model_name and name not in service.adapter_names:
        known = ", ".join(map(repr, (service.model_name, *service.adapter_names)))
        raise ApiError(404, f"there is no model {name!r} here, only {known}", param="model", code="model_not_found")


def _describe(service: Served, adapter: str | None = None) -> dict[str, Any]:
    parent = {} if adapter is None else {"parent": service.model_name}
    return {
        "id": adapter or service.model_name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "llmopt",
        "max_model_len": service.description.max_model_len,
        **parent,
    }


async def models(http: Request) -> Response:
    """The model and its adapters."""
    service: Served = http.app.state.service
    listed = [_describe(service), *(_describe(service, name) for name in service.adapter_names)]
    return JSONResponse({"object": "list", "data": listed})


async def one_model(http: Request) -> Response:
    """The model or an adapter by name."""
    service: Served = http.app.state.service
    name: str = http.path_params["name"]
    check_model(service, name)
    return JSONResponse(_describe(service, None if name == service.model_name else name))


async def health(http: Request) -> Response:
    """200 when requests can be answered, else 503 and why."""
    http.app.state.service.check_health()
    return JSONResponse({"status": "ok"})


async def version(http: Request) -> Response:
    """Which llmopt serves which build, and how it was judged."""
    _, fingerprint, manifest = http.app.state.service.description
    return JSONResponse(
        {
            "version": installed_version("llmopt"),
            "fingerprint": fingerprint,
            "model": manifest.source.spec,
            "verdict": manifest.verdict.status,
        }
    )
