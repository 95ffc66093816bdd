"""What a client may ask an answer to look like, and the same in the language of llguidance."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from llmopt.optimizer.errors import InputError

__all__ = ["Constraint", "GrammarError", "source_of"]

MAX_LENGTH = 65_536
"""Characters of a constraint; what real schemas and grammars have is far below."""


class GrammarError(InputError):
    """A constraint that cannot be compiled or obeyed: invalid, unsupported, too large or too slow."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a client asks for.

    Attributes:
        kind: How ``text`` is to be read.
        text: Of "json_schema" the schema, of "regex" the expression, of "grammar" the grammar (Lark's syntax as
            llguidance reads it, or GBNF), of "choice" the strings as a JSON list; empty of "json_object".
    """

    kind: Literal["json_object", "json_schema", "regex", "grammar", "choice"]
    text: str = ""


# One space, or one end of line with what indents the next: JSON as programs write it. llguidance's own default, any
# number of blanks, lets a weak model write blanks until its tokens are used up.
_WHITESPACE = r"\x20|\r?\n[\x20\x09]{0,64}"

# Keywords that llguidance obeys: its json/schema.rs, IMPLEMENTED. Others it refuses or, where the schema's draft does
# not know them, ignores.
_VALUES = frozenset(
    {
        "$ref",
        "const",
        "enum",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "format",
        "maxItems",
        "maxLength",
        "maxProperties",
    }
    | {"maximum", "minItems", "minLength", "minProperties", "minimum", "multipleOf", "pattern", "required", "type"}
)
_SCHEMAS = frozenset({"additionalItems", "additionalProperties", "allOf", "anyOf", "items", "oneOf", "prefixItems"})
_NAMED_SCHEMAS = frozenset({"$defs", "definitions", "patternProperties", "properties"})

# Keywords that no value depends on.
_ANNOTATIONS = frozenset(
    {"$anchor", "$comment", "$id", "$schema", "default", "deprecated", "description", "discriminator", "examples"}
    | {"readOnly", "title", "writeOnly"}
)


def source_of(constraint: Constraint) -> str:
    """The constraint as a grammar of llguidance, which may still be invalid.

    Raises:
        GrammarError: It is too long, or says something that llguidance would ignore.
    """
    if len(constraint.text) > MAX_LENGTH:
        raise GrammarError(f"the {_name(constraint)} is longer than {MAX_LENGTH} characters")
    match constraint.kind:
        case "json_object":
            return _grammar(json_schema=_with_whitespace({"type": "object"}))
        case "json_schema":
            schema = json.loads(constraint.text)
            _check_schema(schema)
            return _grammar(json_schema=_with_whitespace(schema))
        case "regex":
            return _regex(constraint.text)
        case "choice":
            return _grammar(
                lark_grammar="start: " + " | ".join(json.dumps(text) for text in json.loads(constraint.text))
            )
        case "grammar":
            return _grammar(lark_grammar=_lark(constraint.text))


def _name(constraint: Constraint) -> str:
    return constraint.kind.replace("_", " ").replace("json", "JSON")


def _grammar(**entry: Any) -> str:
    return json.dumps({"grammars": [entry]})


def _with_whitespace(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE}}


def _check_schema(schema: Any) -> None:
    """Refuse whatever llguidance would ignore; what it knows and cannot do, it names itself."""
    for path, part in _parts(schema):
        for keyword in part:
            if keyword not in _VALUES | _SCHEMAS | _NAMED_SCHEMAS | _ANNOTATIONS:
                raise GrammarError(f"the JSON schema's keyword {keyword!r} is not supported (at {path})")
        if part.get("minProperties") not in (None, 0, 1):
            # A name that the schema does not list may come twice, which counts twice here and once in the object.
            raise GrammarError(f"the JSON schema's keyword 'minProperties' is supported up to 1 (at {path})")
        if "format" in part and "string" not in part.get("type", "string"):
            raise GrammarError(f"the JSON schema's keyword 'format' is supported for strings only (at {path})")


def _parts(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object in ``schema`` that is a schema itself, with its path."""
    left = [("$", schema)]
    while left:
        path, part = left.pop()
        if not isinstance(part, dict):
            continue
        yield path, part
        for keyword, value in part.items():
            where = f"{path}.{keyword}"
            if keyword in _NAMED_SCHEMAS and isinstance(value, dict):
                left += [(f"{where}.{name}", each) for name, each in value.items()]
            elif keyword in _SCHEMAS and isinstance(value, list):
                left += [(f"{where}[{i}]", each) for i, each in enumerate(value)]
            elif keyword in _SCHEMAS:
                left.append((where, value))


def _regex(text: str) -> str:
    from llguidance import LLMatcher

    try:
        return str(LLMatcher.grammar_from_regex(text))
    except UnicodeEncodeError as error:
        raise GrammarError("the regex has half a character") from error


def _lark(text: str) -> str:
    """The grammar in Lark's syntax, its schemas checked."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        lark = str(any_to_lark(text))
    except Exception as error:  # the converter raises nothing more special
        raise GrammarError(f"the grammar is neither Lark nor GBNF: {error}") from error
    if re.search(r"^\s*\w+\s*\[[^\]]*\btemperature\b", lark, re.MULTILINE):
        raise GrammarError("the grammar's attribute 'temperature' is not supported")
    for found in re.finditer(r"%json\s*", lark):
        try:
            schema, _ = json.JSONDecoder().raw_decode(lark, found.end())
        except json.JSONDecodeError:
            continue  # not a schema, or a broken one, which llguidance refuses
        _check_schema(schema)
    return lark
