"""The lists of a recipe: names of passes and exporters with their options, turned into objects."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmopt.optimizer import loader
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.loader import Kind
from llmopt.optimizer.recipe_errors import shown, validated
from llmopt.optimizer.recipe_text import Document, Keys

__all__ = ["LISTS", "Step", "steps"]

LISTS: dict[Literal["passes", "export"], Kind] = {"passes": "passes", "export": "exporters"}
"""The keys of a recipe that hold such a list, and what kind of thing is in it."""


@dataclass(frozen=True, slots=True)
class Step:
    """One item of a list.

    Attributes:
        path: Of its options.
        name: As written.
        kind: The class of that name.
        instance: Made with the options; None when those are wrong.
    """

    path: Keys
    name: str
    kind: type[Any]
    instance: Any


def steps(document: Document, key: Literal["passes", "export"], base: Path) -> list[Step]:
    """The items of the list ``key`` whose names exist; every mistake becomes a problem of the document.

    Paths in their options are relative to ``base``.
    """
    items = document.data.get(key, [])
    if not isinstance(items, list):
        hint = f"write {key}: [] for none" if items is None else "start each item with '- '"
        document.problems.append(document.problem((key,), f"must be a list, not {shown(items)}", hint))
        return []
    named = [(index, _named(document, key, index, item)) for index, item in enumerate(items)]
    found = [_step(document, key, index, *each, base) for index, each in named if each is not None]
    return [each for each in found if each is not None]


def _named(document: Document, key: Literal["passes", "export"], index: int, item: Any) -> tuple[str, Any] | None:
    """Name and options of one list item, which is ``name`` or ``name: {options}``."""
    if isinstance(item, str):
        return item, {}
    if isinstance(item, dict) and len(item) == 1:
        return next(iter(item.items()))
    path = (key, index)
    if not isinstance(item, dict) or not item:
        what = f"must be a name, or name: {{options}}, not {shown(item) if item else 'nothing'}"
        document.problems.append(document.problem(path, what))
        return None
    name, *others = item
    what = f"has {len(item)} keys, and an item names one thing: {', '.join(item)}"
    hint = f"indent the options of {name} further than its name" if item[name] is None else "give each its own '- '"
    document.problems.append(document.problem((*path, others[0]), what, hint, at_key=True))
    return None


def _step(
    document: Document, key: Literal["passes", "export"], index: int, name: str, options: Any, base: Path
) -> Step | None:
    """The pass or exporter ``name`` with its options; None when there is no such name."""
    path = (key, index, name)
    try:
        kind = loader.load(LISTS[key], name)
    except InputError as error:
        hint = _elsewhere(LISTS[key], name) or error.hint
        document.problems.append(document.problem((key, index), error.message, hint))
        return None
    if options is not None and not isinstance(options, dict):
        what = f"the options of {name} must be a mapping, not {shown(options)}"
        document.problems.append(document.problem(path, what, f"as in {name}: {{option: value}}"))
        return Step(path, name, kind, None)
    return Step(path, name, kind, validated(kind, options or {}, document, path, base=base))


def _elsewhere(kind: Kind, name: str) -> str | None:
    """A hint for a name that exists in another place of a recipe."""
    if kind == "passes" and name in loader.names("exporters"):
        return f"{name} is an exporter: it belongs under export"
    if kind == "exporters" and name in loader.names("passes"):
        return f"{name} is a weight pass: it belongs under passes"
    if name in loader.names("passes.graph"):
        return f"{name} is a graph pass: a recipe does not name those, the export's target does"
    return None
