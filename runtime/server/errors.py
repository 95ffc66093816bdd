"""What goes wrong with an HTTP request, in the shape of the OpenAI API."""

import json
import logging
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llmopt.optimizer.errors import InputError
from llmopt.runtime.request import ContextLengthError

__all__ = ["ApiError", "error_body", "error_handlers"]

logger = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "internal_server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: Of HTTP.
        message: What is wrong, for the caller's eyes.
        param: The request field at fault.
        code: A word that programs can act on.
        retry_after: Seconds after which another try is worth it, told with status 429 and 503.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 1
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return error_body(self.status, self.message, param=self.param, code=self.code)


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON body of an error."""
    kind = _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _respond(error: ApiError) -> Response:
    # Clients of the OpenAI API try again after this many seconds; without it, all at once.
    headers = {"Retry-After": str(error.retry_after)} if error.status in (429, 503) else None
    return JSONResponse(error.body, error.status, headers)


async def _on_api_error(request: Request, error: Exception) -> Response:  # noqa: ARG001 - starlette's signature
    if isinstance(error, ApiError):
        return _respond(error)
    if isinstance(error, ContextLengthError):
        return _respond(ApiError(400, error.message, param="max_tokens", code="context_length_exceeded"))
    if isinstance(error, InputError):
        return _respond(ApiError(400, error.message))
    if isinstance(error, HTTPException):
        return JSONResponse(error_body(error.status_code, error.detail), error.status_code, error.headers)
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return _respond(ApiError(400, f"the body is not JSON: {error}"))
    logger.error("a bug in the server: %r", error)
    return _respond(ApiError(500, "the server made a mistake; its log has the details"))


error_handlers: dict[Any, Any] = dict.fromkeys(
    (ApiError, InputError, HTTPException, json.JSONDecodeError, UnicodeDecodeError, Exception), _on_api_error
)
"""For ``Starlette(exception_handlers=...)``."""
