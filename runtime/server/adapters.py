"""``POST /v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``: adapters that come and go while a build is served.

Bodies are vLLM's. Both need the server's admin key: a path names any folder of the server's machine.
"""

import asyncio
import hmac
import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from llmopt.optimizer.errors import LlmoptError
from llmopt.optimizer.lora.adapter_file import AdapterFile
from llmopt.runtime.server.errors import ApiError
from llmopt.runtime.server.models import check_model
from llmopt.runtime.server.protocol import parse
from llmopt.runtime.server.service import Service

__all__ = ["chosen_adapter", "load_adapter", "unload_adapter"]

logger = logging.getLogger(__name__)


class _Unload(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    lora_name: str


class _Load(_Unload):
    lora_path: str


def chosen_adapter(service: Service, model: str | None) -> AdapterFile | None:
    """The adapter that a request asks for by its ``model``; None is the model itself.

    Raises:
        ApiError: 404 where nothing is called so; 503 while the build is loading.
    """
    check_model(service, model)
    if model is None or model == service.model_name:
        return None
    return service.build.adapters.find(model)


async def load_adapter(http: Request) -> Response:
    """Take in an adapter that PEFT saved, for as long as the server runs."""
    service: Service = http.app.state.service
    _check_key(http, service)
    body = parse(_Load, await http.json())
    if body.lora_name == service.model_name:
        raise ApiError(400, f"{body.lora_name} is the model's own name", param="lora_name")
    try:
        file = await asyncio.to_thread(service.build.adapters.add, body.lora_name, Path(body.lora_path))
    except LlmoptError as error:
        raise ApiError(400, error.message, param="lora_path") from error
    logger.info("adapter %s: rank %d in %d linears", file.name, file.entry.rank, file.entry.modules)
    return PlainTextResponse(f"Success: LoRA adapter '{file.name}' added successfully.")


async def unload_adapter(http: Request) -> Response:
    """Let an adapter go that no request uses. A build's own is there again at the next start."""
    service: Service = http.app.state.service
    _check_key(http, service)
    name = parse(_Unload, await http.json()).lora_name
    adapters = service.build.adapters
    if name not in adapters:
        raise ApiError(404, f"there is no adapter {name!r} here", param="lora_name", code="model_not_found")
    if service.engine.uses(adapters.find(name)):
        raise ApiError(409, f"requests with the adapter {name} are unfinished: try again", code="adapter_in_use")
    adapters.remove(name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _check_key(http: Request, service: Service) -> None:
    """Let pass whoever has the admin key.

    Raises:
        ApiError: 401 without it, 403 where the server has none.
    """
    key = service.admin_key
    if key is None:
        raise ApiError(403, "this server has no admin key: start it with LLMOPT_ADMIN_KEY set", code="no_admin_key")
    kind, _, given = http.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
        raise ApiError(401, "this needs the admin key: Authorization: Bearer KEY", code="invalid_api_key")
