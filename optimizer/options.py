"""The options of a pass, exporter or gate in words, read from its JSON schema: for help and for documentation."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Option", "nested_options", "options_of", "words_of"]

_Schema = Mapping[str, Any]

_TYPES = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false", "object": "mapping"}
_UNBOUNDED = 2**53
"""Bounds from here on are those of a number format, of no interest to a reader."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Attributes:
        name: As in a recipe.
        takes: Its type and bounds, or the words it may be.
        default: As it would be written; "required" when there is none.
        meaning: Its description.
    """

    name: str
    takes: str
    default: str
    meaning: str


def options_of(schema: Mapping[str, Any]) -> list[Option]:
    """The options of a pydantic model's JSON schema, in their order."""
    required = set(schema.get("required", ()))
    definitions = schema.get("$defs", {})
    return [
        Option(
            name,
            _takes(option, definitions),
            "required" if name in required else _written(option.get("default")),
            option.get("description", ""),
        )
        for name, option in schema.get("properties", {}).items()
    ]


def nested_options(schema: Mapping[str, Any]) -> Iterator[tuple[str, list[Option]]]:
    """The options of each mapping that an option may hold, under the name ``takes`` gives it."""
    definitions = schema.get("$defs", {})
    for name, each in definitions.items():
        if "properties" in each:
            yield words_of(name), options_of({**each, "$defs": definitions})


def _takes(option: _Schema, definitions: Mapping[str, _Schema]) -> str:
    if "$ref" in option:
        name = option["$ref"].rpartition("/")[2]
        target = definitions.get(name, {})
        return _takes(target, definitions) if "enum" in target else words_of(name)
    if "const" in option:
        return _written(option["const"])
    if "enum" in option:
        return ", ".join(_written(each) for each in option["enum"])
    alternatives = option.get("anyOf", option.get("oneOf"))
    if alternatives is not None:
        words = (_takes(each, definitions) for each in alternatives if each.get("type") != "null")
        return " or ".join(dict.fromkeys(words))
    if option.get("type") == "array":
        return f"list of {_takes(option.get('items', {}), definitions)}"
    return _TYPES.get(option.get("type", ""), "any value") + _bounds(option)


def _bounds(option: _Schema) -> str:
    low, high = option.get("minimum"), option.get("maximum")
    if high is not None and high >= _UNBOUNDED:
        high = None
    if low is not None and high is not None:
        return f" from {_written(low)} to {_written(high)}"
    above = option.get("exclusiveMinimum") if low is None else None
    signs = ((">", above), (">=", low), ("<", option.get("exclusiveMaximum")), ("<=", high))
    return "".join(f" {sign} {_written(bound)}" for sign, bound in signs if bound is not None)


def words_of(name: str) -> str:
    """``QuantSpec`` -> ``quant spec``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()


def _written(value: Any) -> str:
    """A default or a bound as one would write it."""
    if value is None or (isinstance(value, dict) and value and not any(value.values())):
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if value in ([], {}):
        return "empty"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
