"""The JSON schema of recipes, with which editors complete and check them while they are written."""

from typing import Any

from llmopt.optimizer import loader
from llmopt.optimizer.loader import Kind
from llmopt.optimizer.recipe import Settings

__all__ = ["json_schema"]

_Schema = dict[str, Any]


def json_schema() -> dict[str, Any]:
    """Draft 2020-12, with every pass and exporter that is installed. Imports all of them.

    What it cannot say, such as which schemes a target runs, ``Recipe.load`` checks.
    """
    settings = Settings.model_json_schema()
    definitions: _Schema = settings.pop("$defs", {})
    steps = {
        "passes": _list("passes", definitions, description="Weight passes, in the order they run.", default=[]),
        "export": _list("exporters", definitions, description="What is written, each with its target.", minItems=1),
    }
    options = settings["properties"]
    head = {name: options.pop(name) for name in ("version", "model", "calibration")}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "llmopt recipe",
        "description": "What llmopt builds from which model, and how much it may lose.",
        "type": "object",
        "properties": {**head, **steps, **options},
        "required": [*settings["required"], "export"],
        "additionalProperties": False,
        "$defs": definitions,
    }


def _list(kind: Kind, definitions: _Schema, **keywords: Any) -> _Schema:
    """A list whose items are ``NAME: {options}``, or the name alone where no option has to be given."""
    choices: list[_Schema] = []
    bare: list[str] = []
    for name, summary in loader.names(kind).items():
        options = _adopted(loader.load(kind, name).model_json_schema(), f"{kind}.{name}", definitions)
        if not options.get("required"):
            bare.append(name)
            options = {"anyOf": [options, {"type": "null"}]}
        choices.append(
            {
                "type": "object",
                "title": name,
                "description": summary,
                "properties": {name: options},
                "required": [name],
                "additionalProperties": False,
            }
        )
    if bare:
        choices.append({"enum": bare, "type": "string"})
    return {"type": "array", "items": {"anyOf": choices}, **keywords}


def _adopted(schema: _Schema, owner: str, definitions: _Schema) -> _Schema:
    """``schema`` with its definitions moved to ``definitions``; those whose name is taken are renamed."""
    own: _Schema = schema.pop("$defs", {})
    renamed = {name: f"{owner}.{name}" for name in own if definitions.get(name, own[name]) != own[name]}
    for name, each in own.items():
        definitions[renamed.get(name, name)] = _repointed(each, renamed)
    adopted: _Schema = _repointed(schema, renamed)
    return adopted


def _repointed(schema: Any, renamed: dict[str, str]) -> Any:
    """``schema`` with references to renamed definitions replaced."""
    if isinstance(schema, list):
        return [_repointed(each, renamed) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _new_reference(each, renamed) if key == "$ref" else _repointed(each, renamed)
        for key, each in schema.items()
    }


def _new_reference(reference: str, renamed: dict[str, str]) -> str:
    head, _, name = reference.rpartition("/")
    return f"{head}/{renamed.get(name, name)}"
