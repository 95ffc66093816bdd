"""``GET /v1/models``, ``/health`` and ``/version``: what is served, and whether it is."""

import time
from importlib.metadata import version as installed_version
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llmopt.runtime.server.errors import ApiError
from llmopt.runtime.server.service import Service

__all__ = ["check_model", "health", "models", "one_model", "version"]

_STARTED = int(time.time())


def check_model(service: Service, name: str | None) -> None:
    """Refuse requests for another model.

    Raises:
        ApiError: 404; or 503 while the model is loading.
    """
    service.check_health()
    if name is not None and name != service.model_name:
        raise ApiError(
            404, f"there is no model {name!r} here, only {service.model_name!r}", param="model", code="model_not_found"
        )


def _describe(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "llmopt",
        "max_model_len": service.build.backend.capacity,
    }


async def models(http: Request) -> Response:
    """The list of models, which has one."""
    return JSONResponse({"object": "list", "data": [_describe(http.app.state.service)]})


async def one_model(http: Request) -> Response:
    """One model by name."""
    service: Service = http.app.state.service
    check_model(service, http.path_params["name"])
    return JSONResponse(_describe(service))


async def health(http: Request) -> Response:
    """200 when requests can be answered, else 503 and why."""
    http.app.state.service.check_health()
    return JSONResponse({"status": "ok"})


async def version(http: Request) -> Response:
    """Which llmopt serves which build, and how it was judged."""
    build = http.app.state.service.build
    return JSONResponse(
        {
            "version": installed_version("llmopt"),
            "fingerprint": build.fingerprint,
            "model": build.manifest.source.spec,
            "verdict": build.manifest.verdict.status,
        }
    )
