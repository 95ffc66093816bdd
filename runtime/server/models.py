"""``GET /v1/models``, ``/health`` and ``/version``: what is served, and whether it is."""

import time
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
    def description(self) -> Description:
        """What is served; raises ``ApiError`` 503 while there is nothing."""

    def check_health(self) -> None:
        """Raise ``ApiError`` 503 while requests cannot be answered."""


def check_model(service: Served, name: str | None) -> None:
    """Refuse requests for another model.

    Raises:
        ApiError: 404; or 503 while the model is loading.
    """
    service.check_health()
    if name is not None and name != service.model_name:
        raise ApiError(
            404, f"there is no model {name!r} here, only {service.model_name!r}", param="model", code="model_not_found"
        )


def _describe(service: Served) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "llmopt",
        "max_model_len": service.description.max_model_len,
    }


async def models(http: Request) -> Response:
    """The list of models, which has one."""
    return JSONResponse({"object": "list", "data": [_describe(http.app.state.service)]})


async def one_model(http: Request) -> Response:
    """One model by name."""
    service: Served = http.app.state.service
    check_model(service, http.path_params["name"])
    return JSONResponse(_describe(service))


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
