"""Options in words, for help and documentation."""

import pytest

from llmopt.optimizer.options import options_of


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "exclusiveMinimum": 0}, "integer > 0"),
        ({"type": "integer", "exclusiveMinimum": 0, "minimum": 2}, "integer >= 2"),
        ({"type": "number", "minimum": 0, "maximum": 1.0}, "number from 0 to 1"),
        ({"type": "integer", "minimum": 0, "maximum": 2**63 - 1}, "integer >= 0"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "text"),
        ({"enum": ["a", "b"]}, "a, b"),
        ({"type": "array", "items": {"$ref": "#/$defs/QuantSpec"}}, "list of quant spec"),
        ({}, "any value"),
    ],
)
def test_types_are_put_in_words(schema: dict[str, object], words: str) -> None:
    (option,) = options_of({"properties": {"x": schema}})
    assert option.takes == words


@pytest.mark.parametrize(
    ("default", "words"),
    [(None, "not set"), (True, "true"), ([], "empty"), (2.0, "2"), ({"a": None}, "not set"), ("W8A8", "W8A8")],
)
def test_defaults_are_written_as_in_a_recipe(default: object, words: str) -> None:
    (option,) = options_of({"properties": {"x": {"default": default}}})
    assert option.default == words


def test_what_has_no_default_is_required() -> None:
    (option,) = options_of({"properties": {"x": {}}, "required": ["x"]})
    assert option.default == "required"
