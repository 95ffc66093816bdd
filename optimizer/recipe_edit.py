"""What changes a recipe after it is read and before it is checked: ``--set PATH=VALUE`` and ``${ENVIRONMENT}``."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmopt.optimizer.errors import Problem
from llmopt.optimizer.loader import nearest
from llmopt.optimizer.recipe_text import Document, Keys, dotted, parse, scalar_of

__all__ = ["override", "substitute"]

_SET = "--set"

_REFERENCE = re.compile(r"\$\$\{|\$\{(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<default>:-[^}]*)?\})?")


def override(document: Document, assignments: Sequence[str]) -> None:
    """Apply ``passes.0.gptq.group_size=64``: a path and a YAML value; later ones win.

    Mappings on the way are created, list items are not. Mistakes go to the document's problems, and what was set is
    placed in a file called ``--set``, whose line is the position among the assignments.
    """
    for number, assignment in enumerate(assignments, start=1):
        text, equals, value = assignment.partition("=")
        path = tuple(text.strip().split("."))
        if not equals or not all(path):
            what = f"{assignment!r} is not PATH=VALUE"
            document.problems.append(Problem(_SET, number, "", what, "as in passes.0.round_to_nearest.group_size=64"))
            continue
        parsed = parse(value, _SET, line=number)
        if parsed.problems:
            document.problems += [Problem(_SET, number, text, each.what, each.hint) for each in parsed.problems]
            continue
        try:
            place = _assign(document, path, parsed.data)
        except _BadPathError as error:
            document.problems.append(Problem(_SET, number, text, error.what, error.hint))
        else:
            document.graft(place, parsed)


class _BadPathError(Exception):
    """A path that leads nowhere."""

    def __init__(self, what: str, hint: str | None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


def _assign(document: Document, path: tuple[str, ...], value: Any) -> Keys:
    """Put ``value`` where ``path`` leads, and return the path with its list positions as integers."""
    if not isinstance(document.data, dict):
        document.data = {}
    current: Any = document.data
    walked: Keys = ()
    for part, following in zip(path, (*path[1:], None), strict=True):
        key: Any = _position(part, current, walked) if isinstance(current, list) else part
        walked = (*walked, key)
        if following is None:
            current[key] = value
        else:
            current[key] = _opened(current[key] if isinstance(current, list) else current.get(key), following, walked)
            current = current[key]
    return walked


def _position(part: str, items: list[Any], walked: Keys) -> int:
    if part.isascii() and part.isdigit() and int(part) < len(items):
        return int(part)
    count = len(items)
    what = f"{dotted(walked)} is a list of {count}, and {part!r} is no position in it"
    raise _BadPathError(what, f"positions are 0 to {count - 1}" if count else "--set cannot add list items")


def _opened(value: Any, following: str, walked: Keys) -> Any:
    """The list or mapping to walk on in; made where the recipe has none yet."""
    if isinstance(value, dict | list):
        return value
    if value is None:
        return {}
    if value == following:  # "- round_to_nearest" in a list stands for "- round_to_nearest: {}"
        return {value: {}}
    hint = nearest(following, [value]) if isinstance(value, str) else None
    raise _BadPathError(f"{dotted(walked)} is {value!r}, which has nothing called {following!r} in it", hint)


def substitute(document: Document, environment: Mapping[str, str]) -> None:
    """Replace ``${NAME}`` and ``${NAME:-default}`` in every string; ``$${`` stands for a plain ``${``.

    As in a shell, the default also counts when NAME is empty. A value written without quotes that is one reference
    and nothing else takes the type it would have had in its place, so ``threads: ${THREADS:-2}`` is a number.
    """
    document.data = _substituted(document, document.data, (), environment)


def _substituted(document: Document, value: Any, path: Keys, environment: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _substituted(document, each, (*path, key), environment) for key, each in value.items()}
    if isinstance(value, list):
        return [_substituted(document, each, (*path, index), environment) for index, each in enumerate(value)]
    if not isinstance(value, str) or "${" not in value:
        return value

    def replacement(found: re.Match[str]) -> str:
        if found[0] == "$${":
            return "${"
        name, default = found["name"], found["default"]
        if name is None:
            hint = "${NAME} or ${NAME:-default}; a plain ${ is written $${"
            document.problems.append(document.problem(path, f"{value!r} has a ${{ that is no reference", hint))
            return found[0]
        if environment.get(name) or (name in environment and default is None):
            return environment[name]
        if default is None:
            hint = f"export {name}=..., or write ${{{name}:-default}}"
            document.problems.append(document.problem(path, f"the environment variable {name} is not set", hint))
            return found[0]
        return str(default)[2:]

    text = _REFERENCE.sub(replacement, value)
    whole = _REFERENCE.fullmatch(value)
    if whole and whole["name"] and path in document.unquoted and text:
        return scalar_of(text)
    return text
