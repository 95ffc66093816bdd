"""Words for YAML's syntax errors: the parser's own name tokens and productions, people made a typing mistake."""

import re

from ruamel.yaml.error import MarkedYAMLError

__all__ = ["explain_syntax"]


_SYNTAX_ERRORS: list[tuple[str, str, str | None]] = [
    (r"found character '\\t'", "not valid YAML: a tab cannot start a value or indent a line", "indent with spaces"),
    (
        "mapping values are not allowed",
        "not valid YAML: a ': ' where no key can be",
        "align keys under each other, and put text that contains ': ' in quotes",
    ),
    (
        r"found undefined alias '(.*)'",
        "not valid YAML: *{0} is an alias, and nothing is marked &{0}",
        "put text that begins with * in quotes",
    ),
    (
        r"found character '(.)' that cannot start",
        "not valid YAML: a value cannot start with {0}",
        "put it in quotes",
    ),
    (r"flow (sequence|mapping).*but got", "not valid YAML: the bracket{opened} is not closed properly", None),
    ("quoted scalar: found unexpected", "not valid YAML: the quote{opened} is not closed", None),
    (
        "quoted scalar: found unknown escape character '(.*)'",
        "not valid YAML: unknown escape \\{0} in double quotes",
        "use single quotes, in which a backslash is itself",
    ),
    ("could not find expected ':'", "not valid YAML: a line without 'key: value'", None),
    (
        "block (mapping|collection).*expected <block end>",
        "not valid YAML: this line is not aligned with the ones before it",
        "items of one list, and keys of one mapping, start in the same column",
    ),
    ("another document", "a recipe is one document", "remove the line ---"),
]


def explain_syntax(error: MarkedYAMLError) -> tuple[str, str | None]:
    """What is wrong, and a hint where there is one; errors not in the table keep the parser's words."""
    text = f"{error.context or ''}: {error.problem or ''}"
    opened = f" opened on line {error.context_mark.line + 1}" if error.context_mark else ""
    for pattern, what, hint in _SYNTAX_ERRORS:
        if found := re.search(pattern, text):
            return what.format(*found.groups(), opened=opened), hint
    return f"not valid YAML: {error.problem or error.context}", None
