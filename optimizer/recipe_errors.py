"""pydantic's complaints in the words of a recipe: which option, what is wrong with it, and what to write instead."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic_core import ErrorDetails

from llmopt.optimizer.loader import nearest
from llmopt.optimizer.recipe_text import Document, Keys, scalar_of

__all__ = ["shown", "validated"]

Options = TypeVar("Options", bound=BaseModel)

_KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "model_type": "a mapping (key: value)",
    "dict_type": "a mapping (key: value)",
    "dataclass_type": "a mapping (key: value)",
}
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_BOOLEANS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def validated(
    model: type[Options],
    data: Any,
    document: Document,
    path: Keys,
    *,
    also: Iterable[str] = (),
    base: Path = Path(),
) -> Options | None:
    """``model`` made of ``data`` without any coercion; None when that fails, with the reasons in the problems.

    Args:
        model: What the data must be.
        data: Plain data as YAML gave it.
        document: Where places are looked up and problems go.
        path: Of ``data`` in the document.
        also: Options that exist but are checked elsewhere, for the hints.
        base: The recipe's directory, which paths in the data are relative to.
    """
    try:
        # Strict JSON: "0" is no number, while lists become tuples and texts become paths and enums.
        return model.model_validate_json(json.dumps(data), strict=True, context={"base": base})
    except ValidationError as error:
        details = error.errors(include_url=False)
    options = _Options(model, also)
    by_path = _by_path(details, data)
    for below, complaints in by_path.items():
        if _is_misspelt(below, by_path) or _lacks_wrong_items(below, by_path):
            continue
        what, hint = _explained(complaints, below, options, is_quoted=path + below not in document.unquoted)
        at_key = complaints[0]["type"] == "extra_forbidden"
        document.problems.append(document.problem(path + below, what, hint, at_key=at_key))
    return None


def shown(value: Any) -> str:
    """A value as a message names it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {value if len(value) <= 60 else value[:57] + '...'!r}"
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list | tuple) else str(value)


def _by_path(details: list[ErrorDetails], data: Any) -> dict[Keys, list[ErrorDetails]]:
    """Complaints by the path they are about, without those of union members that were not meant."""
    found: dict[Keys, list[ErrorDetails]] = {}
    in_union: set[Keys] = set()
    for each in details:
        path = _real_path(each, data)
        found.setdefault(path, []).append(each)
        if len(path) < len(each["loc"]):
            in_union.add(path)
    deeper = {path[:depth] for path in found for depth in range(len(path))}
    return {path: each for path, each in found.items() if not (path in in_union and path in deeper)}


def _real_path(detail: ErrorDetails, data: Any) -> Keys:
    """The location without the names pydantic adds for members of a union."""
    path: list[str | int] = []
    for part in detail["loc"]:
        if part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int):
            data = data[part]
            path.append(part)
    if detail["type"] == "missing":
        path.append(detail["loc"][-1])
    return tuple(path)


def _is_misspelt(path: Keys, by_path: Mapping[Keys, list[ErrorDetails]]) -> bool:
    """Whether a missing option is there after all, under a name that is nearly its own and has its own complaint."""
    if not path or by_path[path][0]["type"] != "missing":
        return False
    unknown = [str(each[-1]) for each, about in by_path.items() if about[0]["type"] == "extra_forbidden"]
    beside = [name for name in unknown if (*path[:-1], name) in by_path]
    return nearest(str(path[-1]), beside).startswith("did you mean")


def _lacks_wrong_items(path: Keys, by_path: Mapping[Keys, list[ErrorDetails]]) -> bool:
    """Whether a list is called too short because pydantic does not count its items that have their own complaints."""
    is_short = by_path[path][0]["type"] == "too_short"
    return is_short and any(len(each) > len(path) and each[: len(path)] == path for each in by_path)


def _explained(
    complaints: list[ErrorDetails], path: Keys, options: "_Options", *, is_quoted: bool
) -> tuple[str, str | None]:
    """What is wrong at ``path``, and a hint. Several complaints come from a union: nothing it takes was given."""
    first = complaints[0]
    kinds = {each["type"] for each in complaints}
    if "extra_forbidden" in kinds:
        return f"unknown option {path[-1]!r}", nearest(str(path[-1]), options.at(path[:-1]))
    if "missing" in kinds:
        return "is missing", options.at(path[:-1]).get(str(path[-1])) or None
    if "json_invalid" in kinds:  # all that JSON cannot hold of what YAML and the environment can
        return "has text that is not valid Unicode", None
    literals = [str(each["ctx"]["expected"]) for each in complaints if each["type"] == "literal_error"]
    for each in complaints:
        if each["type"] == "value_error":
            # A validator's own sentence; what follows a semicolon is the hint.
            what, _, hint = str(each["ctx"]["error"]).partition("; ")
            return what, "; or ".join(filter(None, [hint, *literals])) or None
    wanted = list(dict.fromkeys(filter(None, map(_wanted, complaints))))
    if not wanted:
        return first["msg"][:1].lower() + first["msg"][1:], None
    value = first["input"]
    return f"must be {' or '.join(wanted)}, not {shown(value)}", _type_hint(value, kinds, literals, is_quoted=is_quoted)


def _wanted(complaint: ErrorDetails) -> str | None:
    """What would have been accepted, as in "must be ..."; None when pydantic's own message has to do."""
    kind = complaint["type"]
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        bound = complaint["ctx"][name]
        return f"{words} {bound:g}" if isinstance(bound, float) else f"{words} {bound}"
    if kind in ("literal_error", "enum"):
        return str(complaint["ctx"]["expected"])
    if kind == "string_too_short":
        return "some text"
    return _KINDS.get(kind)


def _type_hint(value: Any, kinds: set[str], literals: list[str], *, is_quoted: bool) -> str | None:
    if value is None:
        return "give a value, or remove the line"
    if "bool_type" in kinds and isinstance(value, str) and (word := _BOOLEANS.get(value.lower())):
        return f"write {word}"
    if isinstance(value, str) and kinds & {"int_type", "float_type", "bool_type"}:
        return "remove the quotes" if is_quoted and not isinstance(scalar_of(value), str) else None
    if isinstance(value, str) and literals:
        names = [name for name in re.findall(r"'([^']*)'", " ".join(literals)) if name]
        close = nearest(value, names)
        return close if close.startswith("did you mean") else None
    if "string_type" in kinds and isinstance(value, bool | int | float):
        return "put it in quotes"
    if kinds & {"int_type", "int_from_float"} and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if kinds & {"tuple_type", "list_type"}:
        return "start each item with '- '"
    return None


class _Options:
    """The options of a model and of what is nested in it, read from its JSON schema."""

    def __init__(self, model: type[BaseModel], also: Iterable[str]) -> None:
        self._also = dict.fromkeys(also, "")
        try:
            self._schema: dict[str, Any] = model.model_json_schema()
        except PydanticInvalidForJsonSchema:  # a type of a third-party pass; only hints are lost
            self._schema = {}

    def at(self, path: Keys) -> dict[str, str]:
        """Name and description of every option of the mapping at ``path``."""
        nodes = self._variants(self._schema)
        for part in path:
            below = [self._below(node, part) for node in nodes]
            nodes = [variant for node in below for variant in self._variants(node)]
        found = {
            name: str(each.get("description", ""))
            for node in nodes
            for name, each in node.get("properties", {}).items()
        }
        return found if path else found | self._also

    def _variants(self, node: dict[str, Any]) -> list[dict[str, Any]]:
        """The schemas a node may stand for: itself, what it refers to, the members of a union."""
        found = [node]
        if "$ref" in node:
            found += self._variants(self._schema["$defs"][node["$ref"].rpartition("/")[2]])
        for each in (*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ())):
            found += self._variants(each)
        return found

    @staticmethod
    def _below(node: dict[str, Any], part: str | int) -> dict[str, Any]:
        below = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
        if below is None and isinstance(part, str):
            below = node.get("additionalProperties")
        return below if isinstance(below, dict) else {}
