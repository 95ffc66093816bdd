"""The request bodies of the API: which fields there are, what they may be, and what is refused."""

import logging
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmopt.runtime.server.constraints import ConstrainedBody
from llmopt.runtime.server.errors import ApiError

__all__ = ["ChatBody", "CompletionBody", "EmbeddingBody", "GenerationBody", "Message", "parse"]

logger = logging.getLogger(__name__)

# Fields of the API that are not implemented, and the values that ask for nothing. Anything else is refused: an answer
# that quietly did not obey would be worse.
_NOT_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "guided_decoding_backend": ("auto", "guidance"),
    "guided_whitespace_pattern": (),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "return_token_ids": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "web_search_options": (),
}

# Fields that concern the operator of a service, or nothing that an answer depends on.
_WITHOUT_EFFECT = frozenset(
    {"metadata", "parallel_tool_calls", "prompt_cache_key", "request_id", "safety_identifier"}
    | {"service_tier", "store", "verbosity"}
)

_MAX_LOGPROBS = 20
_MAX_CHOICES = 128

Count = Annotated[int, Field(ge=0)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class StreamOptions(_Body):
    """How a stream reports usage."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(_Body, ConstrainedBody):
    """What both kinds of request share."""

    model: str | None = None
    max_tokens: Count | None = None
    min_tokens: Count = 0
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=_MAX_CHOICES)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    user: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream", param="stream_options")
        if any(stop == "" for stop in self.stop_strings):
            raise ApiError(400, "a stop string is empty", param="stop")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        """How many answers to each prompt."""
        return self.n or 1


class CompletionBody(GenerationBody):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=_MAX_LOGPROBS)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _asks_for_something(self) -> "CompletionBody":
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens must be at least 1, or 0 together with echo", param="max_tokens")
        if not self.prompt:
            raise ApiError(400, "the prompt is empty", param="prompt")
        return self


class EmbeddingBody(_Body):
    """The body of a request for vectors."""

    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    prompt_name: str | None = None

    @property
    def texts(self) -> list[str | list[int]]:
        """The inputs one by one: texts, or the token ids of each."""
        if isinstance(self.input, str):
            return [self.input]
        ids = [token for token in self.input if isinstance(token, int)]
        return [ids] if ids else [text for text in self.input if not isinstance(text, int)]


class Message(_Body):
    """One message of a conversation. The content is text, or a list of text parts."""

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatBody(GenerationBody):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _asks_for_an_answer(self) -> "ChatBody":
        if self.max_tokens == 0:
            raise ApiError(400, "max_tokens must be at least 1", param="max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs")
        return self


Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], data: object) -> Body:
    """Check a request's JSON.

    Raises:
        ApiError: 400, with the field at fault.
    """
    if not isinstance(data, dict):
        raise ApiError(400, "the body is not a JSON object")
    try:
        body = kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"]]
        message = f"{where[0] if where else 'body'}: {first['msg']}"
        raise ApiError(400, message, param=where[0] if where else None) from error
    _check_extra(body)
    return body


def _check_extra(body: BaseModel) -> None:
    """Refuse what the API has and we have not; warn of what nobody knows."""
    for name, value in (body.model_extra or {}).items():
        if name in _NOT_IMPLEMENTED:
            if value is not None and value not in _NOT_IMPLEMENTED[name]:
                raise ApiError(400, f"{name} is not implemented by this server", param=name, code="not_implemented")
        elif name not in _WITHOUT_EFFECT:
            logger.warning("a request has an unknown field, which is ignored: %s", name)
