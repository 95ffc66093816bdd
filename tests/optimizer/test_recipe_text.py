"""YAML as plain data with lines: what counts as what, where it is, and all mistakes of a text at once."""

import math
import textwrap

import pytest

from llmopt.optimizer.recipe_text import Document, parse, scalar_of


def read(text: str) -> Document:
    return parse(textwrap.dedent(text), "r.yaml")


def messages(text: str) -> list[str]:
    return [str(problem) for problem in read(text).problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("~", None),
        ("null", None),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("12", 12),
        ("-3", -3),
        ("012", 12),
        ("0x1F", 31),
        ("0o17", 15),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("1:20", "1:20"),
        ("2026-11-23", "2026-11-23"),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("3%", "3%"),
        ("1.2.3", "1.2.3"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_unquoted_values_follow_the_core_schema_of_yaml_1_2(text: str, value: object) -> None:
    document = parse(f"key: {text}", "r.yaml")
    assert document.data == {"key": value}
    assert type(document.data["key"]) is type(value)
    assert scalar_of(text) == value
    assert not document.problems


def test_nan_is_a_number() -> None:
    assert math.isnan(scalar_of(".nan"))


@pytest.mark.parametrize("text", ["'12'", '"12"', "!!str 12"])
def test_quoted_numbers_are_text(text: str) -> None:
    assert parse(f"key: {text}", "r.yaml").data == {"key": "12"}


def test_every_value_and_key_knows_its_line() -> None:
    document = read(
        """\
        # a comment
        one: 1
        list:
          - first
          -
          - {flow: 2,
             next: 3}
          - nested:
              deep: x
        empty:
        block: |
          text
        """
    )
    lines = {path: place.line for path, place in document.places.items()}
    assert lines[("one",)] == 2
    assert lines[("list",)] == 3
    assert lines[("list", 0)] == 4
    assert lines[("list", 2, "flow")] == 6
    assert lines[("list", 2, "next")] == 7
    assert lines[("list", 3, "nested")] == 8
    assert lines[("list", 3, "nested", "deep")] == 9
    assert lines[("empty",)] == 10
    assert document.keys[("block",)].line == 11
    assert document.data["list"][1] is None
    assert document.data["block"] == "text\n"


def test_a_missing_path_is_placed_at_what_is_around_it() -> None:
    document = read("a:\n  b:\n    c: 1\n")
    assert document.problem(("a", "b", "x", "y"), "is missing").line == 2


def test_aliases_are_copies_whose_lines_are_those_of_the_anchor() -> None:
    document = read("a: &x\n  b: 1\nc: *x\n")
    assert document.data == {"a": {"b": 1}, "c": {"b": 1}}
    assert document.places[("c", "b")].line == 2
    assert document.data["a"] is not document.data["c"]


def test_an_alias_means_the_last_anchor_of_its_name_before_it() -> None:
    assert parse("a: &x 1\nb: *x\nc: &x 2\nd: *x\n", "r.yaml").data == {"a": 1, "b": 1, "c": 2, "d": 2}


def test_merge_keys_give_way_to_keys_that_are_written_and_to_earlier_merges() -> None:
    document = read(
        """\
        a: &a {x: 1, y: 1}
        b: &b {<<: *a, y: 2, z: 2}
        c:
          z: 3
          <<: [*b, *a]
        """
    )
    assert document.data["c"] == {"z": 3, "x": 1, "y": 2}
    assert document.places[("c", "z")].line == 4
    assert document.places[("c", "y")].line == 2
    assert not document.problems


def test_all_mistakes_of_a_text_are_found_at_once() -> None:
    assert messages(
        """\
        a: 1
        a: 2
        3: x
        ? [1, 2]
        : y
        t: !special 1
        s: !!set {p, q}
        <<: 5
        """
    ) == [
        "r.yaml:2: a: the key is given twice, first on line 1  hint: remove one",
        "r.yaml:3: the key 3 is not text  hint: keys are names, as in scheme: W8A8",
        "r.yaml:4: a list or mapping as a key is not possible  hint: keys are names, as in scheme: W8A8",
        "r.yaml:6: t: has the tag !special, which recipes do not know  hint: remove the tag",
        "r.yaml:7: s: has the tag !!set, which recipes do not know  hint: remove the tag",
        "r.yaml:8: << takes a mapping, or a list of mappings  hint: as in <<: *anchor",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\n\tb: 2", "r.yaml:2: not valid YAML: a tab cannot start a value or indent a line  hint: indent with"),
        ("a: b: c", "r.yaml:1: not valid YAML: a ': ' where no key can be"),
        ("a:\n  b: *name", "r.yaml:2: not valid YAML: *name is an alias, and nothing is marked &name"),
        ("a: @x", "r.yaml:1: not valid YAML: a value cannot start with @  hint: put it in quotes"),
        ("a: [1,\n\n  2\nb: 3", "r.yaml:4: not valid YAML: the bracket opened on line 1 is not closed properly"),
        ("a: {b: 1", "r.yaml:1: not valid YAML: the bracket opened on line 1 is not closed properly"),
        ("a: 'x\n\n", "the quote opened on line 1 is not closed"),
        (r'a: "\q"', r"r.yaml:1: not valid YAML: unknown escape \q in double quotes"),
        ("a: 1\nb\nc: 2", "r.yaml:2: not valid YAML: a line without 'key: value'"),
        ("p:\n  - a: 1\n   b: 2", "r.yaml:3: not valid YAML"),
        ("a: 1\n---\nb: 2", "r.yaml:2: a recipe is one document  hint: remove the line ---"),
        ("a: 1\nb: \x00", "r.yaml:2: not valid YAML: the character U+0000 is not allowed"),
        ("%YAML 1.9\n---\na: 1", "r.yaml:1: not valid YAML"),
        ("[" * 1500, "r.yaml:1: is nested too deeply"),
        ("{a: " * 80 + "}" * 80, "is nested too deeply"),
        ("a: &a [*a]", "r.yaml:1: a.0: contains itself through an alias"),
    ],
)
def test_a_syntax_error_is_told_with_its_line_and_in_plain_words(text: str, message: str) -> None:
    document = parse(text, "r.yaml")
    assert len(document.problems) == 1
    assert message in str(document.problems[0])


def test_a_text_that_unfolds_into_millions_of_values_is_refused() -> None:
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10) if i else '1'}]" for i in range(9)]
    document = parse("\n".join(levels), "r.yaml")
    assert len(document.problems) == 1
    assert "aliases" in document.problems[0].what


def test_a_mapping_that_merges_itself_ends() -> None:
    assert parse("a: &a {<<: [*a, *a], x: 1}", "r.yaml").data == {"a": {"x": 1}}


def test_a_byte_order_mark_and_text_in_any_script_are_fine() -> None:
    assert parse("\ufeffmodél: 模型/ü\n", "r.yaml").data == {"modél": "模型/ü"}


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_a_text_without_a_value_is_none(text: str) -> None:
    assert parse(text, "r.yaml").data is None


def test_a_line_can_be_given_for_texts_that_are_no_file() -> None:
    assert parse("a: [", "--set", line=7).problems[0].line == 7
    assert parse("\n\na: 1", "--set", line=7).places[("a",)].line == 7
