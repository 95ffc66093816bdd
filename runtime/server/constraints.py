"""The fields of a request that say what its answer must look like: OpenAI's, and those that vLLM's clients send."""

import asyncio
import json
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmopt.optimizer.errors import UnsupportedError
from llmopt.runtime.server.errors import ApiError
from llmopt.runtime.structured.grammar import Constraint, Grammar, GrammarError, Grammars

__all__ = ["ConstrainedBody", "constraint_of", "grammar_of"]

Schema: TypeAlias = str | dict[str, Any]


class _Part(BaseModel):
    # An entry that nobody knows would be a wish that nobody obeys.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class JsonSchema(_Part):
    """``response_format.json_schema``. Schemas are enforced whether ``strict`` is set or not."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Part):
    """OpenAI's field."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Part):
    """vLLM's field; the older ``guided_json`` and its like are its entries one by one."""

    json_: Schema | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class ConstrainedBody(BaseModel):
    """What both kinds of request share of it."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _constraints_agree(self) -> "ConstrainedBody":
        constraint_of(self)
        return self


def constraint_of(body: ConstrainedBody) -> Constraint | None:
    """What the answer must look like; None where it may be anything.

    Raises:
        ApiError: 400 for a malformed constraint, or for more than one.
    """
    return next((constraint for _, constraint in _asked(body)), None)


async def grammar_of(body: ConstrainedBody, grammars: Grammars) -> Grammar | None:
    """The grammar that the answer must follow, compiled in a thread; None where there is none.

    Raises:
        ApiError: 400 where it cannot be compiled.
    """
    for field, constraint in _asked(body):
        try:
            return await asyncio.to_thread(grammars.compile, constraint)
        except GrammarError as error:
            raise ApiError(400, error.message, param=field) from error
        except UnsupportedError as error:
            raise ApiError(400, error.message, param=field, code="not_implemented") from error
    return None


def _asked(body: ConstrainedBody) -> list[tuple[str, Constraint]]:
    """The field and what it asks for, or nothing."""
    asked = _of_response_format(body.response_format) if body.response_format is not None else []
    if (outputs := body.structured_outputs) is not None:
        found = _of_entries(outputs.json_, outputs.regex, outputs.choice, outputs.grammar, "structured_outputs")
        if outputs.json_object:
            found.append(("structured_outputs", Constraint("json_object")))
        if not found:
            raise ApiError(400, "structured_outputs asks for nothing", param="structured_outputs")
        asked += found
    asked += _of_entries(body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar, "guided_{}")
    if len(asked) > 1:
        names = " and ".join(dict.fromkeys(field for field, _ in asked))
        raise ApiError(400, f"more than one constraint of the answer: {names}", param=asked[-1][0])
    return asked


def _of_response_format(field: ResponseFormat) -> list[tuple[str, Constraint]]:
    if (field.json_schema is not None) != (field.type == "json_schema"):
        raise ApiError(400, "json_schema goes with the type json_schema", param="response_format")
    if field.json_schema is not None:
        return [("response_format", _json_schema(field.json_schema.schema_, "response_format"))]
    return [("response_format", Constraint("json_object"))] if field.type == "json_object" else []


def _of_entries(
    schema: Schema | None, regex: str | None, choice: list[str] | None, grammar: str | None, field: str
) -> list[tuple[str, Constraint]]:
    """Those that are given, each with its field: ``{}`` in the name stands for the entry."""
    found = []
    if schema is not None:
        name = field.format("json")
        found.append((name, _json_schema(schema, name)))
    if regex is not None:
        found.append((field.format("regex"), Constraint("regex", regex)))
    if choice is not None:
        name = field.format("choice")
        if not choice:
            raise ApiError(400, "there is nothing to choose from", param=name)
        found.append((name, Constraint("choice", json.dumps(choice))))
    if grammar is not None:
        found.append((field.format("grammar"), Constraint("grammar", grammar)))
    return found


def _json_schema(schema: Schema, field: str) -> Constraint:
    """The schema in one spelling; the order of its properties stays, because answers keep it."""
    try:
        found = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(found, separators=(",", ":"), allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the schema is not JSON: {error}", param=field) from error
    if not isinstance(found, dict):
        raise ApiError(400, "the schema is not a JSON object", param=field)
    return Constraint("json_schema", text)
