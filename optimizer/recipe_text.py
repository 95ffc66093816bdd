"""A recipe's text as plain data that remembers the line of every key and value.

YAML 1.2 is read as a tree of nodes instead of through a loader, because a loader stops at the first mistake and
forgets where values stood.
"""

import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from llmopt.optimizer.errors import Problem
from llmopt.optimizer.recipe_syntax import explain_syntax

__all__ = ["Document", "Keys", "Place", "dotted", "parse", "scalar_of"]

Keys = tuple[str | int, ...]
"""Keys and list positions from the top of a recipe to a value."""

_TAG = "tag:yaml.org,2002:"
_CORE_TAGS = {_TAG + name for name in ("null", "bool", "int", "float", "timestamp", "value", "merge")}
_MAX_VALUES = 20_000
_MAX_DEPTH = 64

# The core schema of YAML 1.2, section 10.3.2. What ruamel knows beyond it (1_000, 0b1, dates) stays text here.
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INT = re.compile(r"[-+]?[0-9]{1,40}|0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SURROGATE = re.compile("[\ud800-\udfff]")
_INF_NAN = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True, slots=True)
class Place:
    """Where something is written."""

    file: str
    line: int


@dataclass(slots=True)
class Document:
    """Plain data (dict, list, str, int, float, bool, None) and where its parts are written.

    Attributes:
        data: The value; None for an empty text.
        places: Of the values, by path: the line of a scalar; for a list or mapping the line of its key.
        keys: Of the mapping keys, by the path of their value.
        unquoted: Paths of the scalars written without quotes.
        problems: What is wrong with the text itself.
    """

    data: Any
    places: dict[Keys, Place]
    keys: dict[Keys, Place] = field(default_factory=dict)
    unquoted: set[Keys] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    def problem(self, path: Keys, what: str, hint: str | None = None, *, at_key: bool = False) -> Problem:
        """A mistake at ``path``, or at the nearest thing around it that exists, with its file and line."""
        place = self.keys.get(path) if at_key else None
        around = path
        while place is None:
            place = self.places.get(around)
            around = around[:-1]
        return Problem(place.file, place.line, dotted(path), what, hint)

    def graft(self, path: Keys, other: "Document") -> None:
        """Take over the places of ``other``, whose data the caller puts at ``path``."""
        depth = len(path)
        self.places = {each: place for each, place in self.places.items() if each[:depth] != path}
        self.keys = {each: place for each, place in self.keys.items() if each[:depth] != path}
        self.unquoted = {each for each in self.unquoted if each[:depth] != path}
        self.places |= {path + below: place for below, place in other.places.items()}
        self.keys |= {path: other.places[()]} | {path + below: place for below, place in other.keys.items()}
        self.unquoted |= {path + below for below in other.unquoted}


def dotted(path: Keys) -> str:
    """``passes.0.gptq``, as in messages and in ``--set``."""
    return ".".join(str(part) for part in path)


def parse(text: str, file: str, *, line: int | None = None) -> Document:
    """Read one YAML document. Mistakes are in the result's ``problems``; a syntax error leaves its data None.

    Args:
        text: The document.
        file: Its name in messages.
        line: Report this line instead of the text's own: for a text that is no file.
    """
    start = Place(file, line or 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ReusedAnchorWarning
            )  # YAML allows it: an alias means the last one before it
            node = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        is_about_its_start = "could not find expected ':'" in (error.problem or "")
        mark = error.context_mark if is_about_its_start else error.problem_mark
        problem = Problem(file, line or (mark.line + 1 if mark else 1), "", *explain_syntax(error))
        return Document(None, {(): start}, problems=[problem])
    except ReaderError as error:
        at = line or text.count("\n", 0, error.position) + 1
        what = f"not valid YAML: the character U+{ord(text[error.position]):04X} is not allowed"
        return Document(None, {(): start}, problems=[Problem(file, at, "", what)])
    except RecursionError:
        return Document(None, {(): start}, problems=[Problem(file, start.line, "", "is nested too deeply")])
    except AssertionError as error:  # how ruamel refuses a %YAML directive
        return Document(None, {(): start}, problems=[Problem(file, start.line, "", f"not valid YAML: {error}")])
    reader = _Reader(file, line)
    data = None if node is None else reader.read(node, (), start)
    places = {**reader.places, (): start}
    return Document(data, places, keys=reader.keys, unquoted=reader.unquoted, problems=reader.problems)


def scalar_of(text: str) -> Any:
    """What ``text`` is when written without quotes: a number, a boolean or None, else ``text`` itself."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return float(text.replace(".", "")) if _INF_NAN.fullmatch(text) else text


class _Reader:
    """Turns nodes into data, noting places and every mistake on the way."""

    def __init__(self, file: str, line: int | None) -> None:
        self.file = file
        self.line = line
        self.places: dict[Keys, Place] = {}
        self.keys: dict[Keys, Place] = {}
        self.unquoted: set[Keys] = set()
        self.problems: list[Problem] = []
        self._around: list[Node] = []
        self._overflowed = False

    def read(self, node: Node, path: Keys, key: Place) -> Any:
        """The data of ``node``. Its place is its own when it is a scalar that is not empty, else ``key``."""
        is_written = isinstance(node, ScalarNode) and bool(node.value or node.style)
        self.places[path] = self._place(node) if is_written else key
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        if any(node is each for each in self._around):
            self._complain(path, "contains itself through an alias")
            return None
        if len(self._around) >= _MAX_DEPTH:
            self._complain(path, "is nested too deeply")
            return None
        if len(self.places) > _MAX_VALUES:
            if not self._overflowed:
                self._complain((), f"has more than {_MAX_VALUES:,} values once its aliases are filled in")
            self._overflowed = True
            return None
        self._around.append(node)
        data: Any = self._sequence(node, path) if isinstance(node, SequenceNode) else self._mapping(node, path)
        self._around.pop()
        return data

    def _sequence(self, node: SequenceNode, path: Keys) -> list[Any]:
        return [self.read(item, (*path, index), self._place(item)) for index, item in enumerate(node.value)]

    def _mapping(self, node: Node, path: Keys) -> dict[str, Any]:
        if str(node.tag) != f"{_TAG}map":
            self._complain(path, f"has the tag {_shown_tag(node)}, which recipes do not know", "remove the tag")
        data: dict[str, Any] = {}
        for key_node, value in node.value:
            if _is_merge(key_node):
                continue
            place = self._place(key_node)
            key = self._key(key_node, path)
            if key is None:
                continue
            if key in data:
                first = self.keys[*path, key].line
                what = f"the key is given twice, first on line {first}"
                self.problems.append(Problem(place.file, place.line, dotted((*path, key)), what, "remove one"))
                continue
            self.keys[*path, key] = place
            data[key] = self.read(value, (*path, key), place)
        for key_node, value in self._inherited(node, path, seen=[node]):
            if (key := self._key(key_node, path)) is not None and key not in data:
                self.keys[*path, key] = self._place(key_node)
                data[key] = self.read(value, (*path, key), self._place(key_node))
        return data

    def _inherited(self, node: Node, path: Keys, seen: list[Node]) -> Iterator[tuple[Node, Node]]:
        """The entries that ``<<`` brings into a mapping, those that win first; each source counts once."""
        for key_node, value in node.value:
            if not _is_merge(key_node):
                continue
            for source in value.value if isinstance(value, SequenceNode) else [value]:
                if not isinstance(source, MappingNode):
                    place = self._place(key_node)
                    what = "<< takes a mapping, or a list of mappings"
                    self.problems.append(Problem(place.file, place.line, dotted(path), what, "as in <<: *anchor"))
                elif all(source is not each for each in seen):
                    seen.append(source)
                    yield from (pair for pair in source.value if not _is_merge(pair[0]))
                    yield from self._inherited(source, path, seen)

    def _key(self, node: Node, path: Keys) -> str | None:
        """The text of a key; None, with a problem noted, when it is something else."""
        value = self._value_of(node) if isinstance(node, ScalarNode) else node
        if isinstance(value, str) and not _SURROGATE.search(value):
            return value
        place = self._place(node)
        what = "a list or mapping as a key is not possible"
        if isinstance(node, ScalarNode):
            what = f"the key {node.value or '(nothing)'} is not text".encode("utf-8", "backslashreplace").decode()
        self.problems.append(Problem(place.file, place.line, dotted(path), what, "keys are names, as in scheme: W8A8"))
        return None

    def _scalar(self, node: ScalarNode, path: Keys) -> Any:
        if str(node.tag) != f"{_TAG}str" and str(node.tag) not in _CORE_TAGS:
            self._complain(path, f"has the tag {_shown_tag(node)}, which recipes do not know", "remove the tag")
            return node.value
        if _SURROGATE.search(node.value):
            self._complain(path, "is not valid Unicode text")
            return _SURROGATE.sub("\ufffd", node.value)
        if not node.style:
            self.unquoted.add(path)
        return self._value_of(node)

    def _value_of(self, node: ScalarNode) -> Any:
        return node.value if str(node.tag) == f"{_TAG}str" else scalar_of(node.value)

    def _place(self, node: Node) -> Place:
        return Place(self.file, self.line or node.start_mark.line + 1)

    def _complain(self, path: Keys, what: str, hint: str | None = None) -> None:
        place = self.places[path]
        self.problems.append(Problem(place.file, place.line, dotted(path), what, hint))


def _is_merge(key: Node) -> bool:
    return isinstance(key, ScalarNode) and str(key.tag) == f"{_TAG}merge"


def _shown_tag(node: Node) -> str:
    return str(node.tag).replace(_TAG, "!!")
