"""What a request wants its answer to obey, in each of the forms that clients use."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from llmopt.runtime.grammar import Constraint, ConstraintKind, Grammar, GrammarError
from llmopt.runtime.server.errors import ApiError
from llmopt.runtime.server.protocol import GenerationBody
from llmopt.runtime.server.service import Service

__all__ = ["compiled", "constraint_of"]

_KINDS: Mapping[str, ConstraintKind] = {
    "choice": "choice",
    "grammar": "grammar",
    "json": "json_schema",
    "json_object": "json_object",
    "regex": "regex",
}
"""Keys of vLLM's ``structured_outputs``, which ``guided_...`` fields end with too."""


def constraint_of(body: GenerationBody) -> Constraint | None:
    """The constraint of a request, if it has one.

    Raises:
        ApiError: 400 for one that is malformed, and for two at once.
    """
    found: list[tuple[str, Constraint]] = []
    if (constraint := _of_response_format(body.response_format)) is not None:
        found.append(("response_format", constraint))
    for key, value in (body.structured_outputs or {}).items():
        if value is not None and value is not False:
            found.append(("structured_outputs", _constraint("structured_outputs", key, value)))
    guided = {
        "json": body.guided_json,
        "regex": body.guided_regex,
        "choice": body.guided_choice,
        "grammar": body.guided_grammar,
    }
    found += [(f"guided_{key}", _constraint(f"guided_{key}", key, value)) for key, value in guided.items() if value]
    if len(found) > 1:
        raise ApiError(400, f"an answer can obey one of {' and '.join(name for name, _ in found)}", param=found[1][0])
    return found[0][1] if found else None


async def compiled(body: GenerationBody, service: Service) -> Grammar | None:
    """The constraint of a request, ready to be used; the event loop goes on meanwhile.

    Raises:
        ApiError: 400 for one that cannot be used.
    """
    constraint = constraint_of(body)
    if constraint is None:
        return None
    try:
        return await asyncio.to_thread(service.build.grammars.compile, constraint)
    except GrammarError as error:
        raise ApiError(400, error.message, param=_param(body), code="invalid_constraint") from error


def _param(body: GenerationBody) -> str:
    names = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
    return next(name for name in names if getattr(body, name))


def _of_response_format(given: dict[str, Any] | None) -> Constraint | None:
    kind = "text" if given is None else given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint("json_object")
    if kind != "json_schema":
        raise ApiError(
            400, f"response_format.type is text, json_object or json_schema, not {kind!r}", param="response_format"
        )
    described = (given or {}).get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise ApiError(400, "response_format.json_schema.schema is not a JSON schema", param="response_format")
    return Constraint("json_schema", _canonical(schema))


def _constraint(param: str, key: str, value: Any) -> Constraint:
    """One of vLLM's kinds; a schema may be an object or its text."""
    kind = _KINDS.get(key)
    if kind == "json_object" and value is True:
        return Constraint("json_object")
    if kind == "json_schema" and isinstance(value, dict):
        return Constraint("json_schema", _canonical(value))
    if kind in ("json_schema", "regex", "grammar") and isinstance(value, str):
        return Constraint(kind, value)
    if kind == "choice" and isinstance(value, list) and value and all(isinstance(each, str) and each for each in value):
        return Constraint("choice", json.dumps(value))
    if kind is None:
        raise ApiError(400, f"{param} has one of {', '.join(sorted(_KINDS))}, not {key}", param=param)
    raise ApiError(400, f"{param}: {key} cannot be {json.dumps(value)[:80]}", param=param)


def _canonical(schema: dict[str, Any]) -> str:
    """As text; the order of properties is kept, since answers have them in this order."""
    return json.dumps(schema, ensure_ascii=False)
