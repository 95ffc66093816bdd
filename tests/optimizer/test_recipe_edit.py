"""``--set`` and ``${ENVIRONMENT}``: what they change, and where their mistakes are reported."""

from pathlib import Path

import pytest

from llmopt.optimizer.errors import RecipeError
from llmopt.optimizer.recipe import Recipe
from llmopt.optimizer.recipe_edit import override, substitute
from llmopt.optimizer.recipe_text import Document, parse

RECIPE = """\
version: 1
model: ./model
passes:
  - round_to_nearest:
      scheme: W4A16
      group_size: 32
export: [onnx]
"""


def edited(text: str, *assignments: str, environment: dict[str, str] | None = None) -> Document:
    document = parse(text, "r.yaml")
    override(document, assignments)
    substitute(document, environment or {})
    return document


def mistakes(tmp_path: Path, text: str, *assignments: str) -> list[str]:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, assignments)
    return [str(problem).replace(f"{tmp_path}/", "") for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("seed=3", ("seed",), 3),
        ("seed=", ("seed",), None),
        ("model='3'", ("model",), "3"),
        ("model=a=b", ("model",), "a=b"),
        ("model=pypi:x==1/y.gguf", ("model",), "pypi:x==1/y.gguf"),
        ("strict=true", ("strict",), True),
        ("passes=[]", ("passes",), []),
        ("resources.threads=2", ("resources", "threads"), 2),
        ("resources={threads: 2}", ("resources",), {"threads": 2}),
        ("passes.0.round_to_nearest.group_size=64", ("passes", 0, "round_to_nearest", "group_size"), 64),
        ("passes.0=rotate", ("passes", 0), "rotate"),
        ("export.0.onnx.target=cpu", ("export", 0, "onnx", "target"), "cpu"),
    ],
)
def test_a_value_is_set_as_yaml(assignment: str, path: tuple[str | int, ...], value: object) -> None:
    document = edited(RECIPE, assignment)
    found = document.data
    for part in path:
        found = found[part]
    assert found == value
    assert not document.problems
    assert str(document.problem(path, "x")).startswith("--set:1: ")


def test_the_last_assignment_wins_and_carries_its_number() -> None:
    document = edited(RECIPE, "seed=1", "seed=2")
    assert document.data["seed"] == 2
    assert document.places[("seed",)].line == 2


def test_a_copy_made_by_an_alias_is_set_alone() -> None:
    document = edited("a: &x {b: 1}\nc: *x\n", "c.b=2")
    assert document.data == {"a": {"b": 1}, "c": {"b": 2}}


def test_values_are_set_in_an_empty_recipe_too() -> None:
    assert edited("", "model=x").data == {"model": "x"}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "--set:1: 'seed' is not PATH=VALUE  hint: as in passes.0.round_to_nearest.group_size=64"),
        ("=3", "--set:1: '=3' is not PATH=VALUE"),
        ("a..b=3", "--set:1: 'a..b=3' is not PATH=VALUE"),
        (
            "passes.1.x=3",
            "--set:1: passes.1.x: passes is a list of 1, and '1' is no position in it  hint: positions are",
        ),
        ("passes.-1=3", "--set:1: passes.-1: passes is a list of 1, and '-1' is no position in it"),
        ("passes.²=3", "--set:1: passes.²: passes is a list of 1, and '²' is no position in it"),
        ("passes.round_to_nearest.group_size=3", "--set:1: passes.round_to_nearest.group_size: passes is a list of 1"),
        ("model.path=3", "--set:1: model.path: model is './model', which has nothing called 'path' in it"),
        ("export.0.onxx.target=cpu", "--set:1: export.0.onxx.target: export.0 is 'onnx', which has nothing called"),
        ("seed=[1", "--set:1: seed: not valid YAML: the bracket opened on line 1 is not closed properly"),
        ("seed={a: 1, a: 2}", "--set:1: seed: the key is given twice, first on line 1"),
        ("seed=x", "--set:1: seed: must be a whole number, not the text 'x'"),
        ("sede=3", "--set:1: sede: unknown option 'sede'  hint: did you mean 'seed'?"),
        ("passes.0.round_to_nearest.gruop=3", "--set:1: passes.0.round_to_nearest.gruop: unknown option 'gruop'"),
        ("passes.0.round_to_nearest.scheme=W9", "--set:1: passes.0.round_to_nearest.scheme: unknown scheme 'W9'"),
        ("passes.0.gptq={}", "--set:1: passes.0.gptq: has 2 keys, and an item names one thing: round_to_nearest, gptq"),
        ("export.0=coreml", "--set:1: export.0: no exporter named 'coreml'"),
        ("accept=[{metric: kl, max: x}]", "--set:1: accept.0.max: must be a number, not the text 'x'"),
        ("model=${NOWHERE_TO_BE_FOUND}", "--set:1: model: the environment variable NOWHERE_TO_BE_FOUND is not set"),
    ],
)
def test_a_mistake_in_an_assignment_is_reported_as_set(tmp_path: Path, assignment: str, message: str) -> None:
    (found,) = mistakes(tmp_path, RECIPE, assignment)
    assert found.startswith(message)


def test_a_mistake_beside_an_assignment_keeps_its_line(tmp_path: Path) -> None:
    found = mistakes(tmp_path, RECIPE.replace("32", "'32'"), "passes.0.round_to_nearest.scheme=W9", "strict=maybe")
    assert [each.split(": ")[0] for each in found] == ["r.yaml:6", "--set:1", "--set:2"]


def test_what_an_assignment_replaces_leaves_no_lines_behind(tmp_path: Path) -> None:
    (found,) = mistakes(tmp_path, RECIPE, "passes.0.round_to_nearest={group_size: 32}")
    assert found.startswith("--set:1: passes.0.round_to_nearest.scheme: is missing")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${NAME}", "value"),
        ("a/${NAME}/b/${NAME}", "a/value/b/value"),
        ("${NONE:-other}", "other"),
        ("${NONE:-}", ""),
        ("${EMPTY:-other}", "other"),
        ("${EMPTY}", ""),
        ("${NAME:-other}", "value"),
        ("$${NAME}", "${NAME}"),
        ("$NAME", "$NAME"),
        ("$$", "$$"),
        ("re:down$", "re:down$"),
        ("${NONE:-a:b/c=d}", "a:b/c=d"),
        ("${TRICK}", "${NAME}"),
    ],
)
def test_environment_variables_are_filled_in(text: str, value: str) -> None:
    environment = {"NAME": "value", "EMPTY": "", "TRICK": "${NAME}"}
    document = edited(f"key: ['{text}']", environment=environment)
    assert document.data == {"key": [value]}
    assert not document.problems


def test_an_unquoted_reference_takes_the_type_it_would_have_had() -> None:
    text = "a: ${N}\nb: '${N}'\nc: ${N}${N}\nd: ${X:-2.5}\ne: ${Y:-true}\nf: ${E}\n"
    document = edited(text, environment={"N": "4", "E": ""})
    assert document.data == {"a": 4, "b": "4", "c": "44", "d": 2.5, "e": True, "f": ""}


def test_keys_are_left_alone() -> None:
    assert edited("${N}: 1", environment={"N": "x"}).data == {"${N}": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("${NONE}", "r.yaml:2: b: the environment variable NONE is not set  hint: export NONE=..., or write ${NONE:-"),
        ("${1A}", "r.yaml:2: b: '${1A}' has a ${ that is no reference  hint: ${NAME} or ${NAME:-default}; a plain"),
        ("${OPEN", "r.yaml:2: b: '${OPEN' has a ${ that is no reference"),
        ("${}", "r.yaml:2: b: '${}' has a ${ that is no reference"),
        ("${A:+b}", "r.yaml:2: b: '${A:+b}' has a ${ that is no reference"),
    ],
)
def test_a_reference_that_leads_nowhere_is_reported_at_its_line(text: str, message: str) -> None:
    document = edited(f"a: 1\nb: '{text}'")
    assert len(document.problems) == 1
    assert str(document.problems[0]).startswith(message)


def test_the_process_environment_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPT_TEST_THREADS", "3")
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE + "resources:\n  threads: ${LLMOPT_TEST_THREADS}\n")
    assert Recipe.load(path).resources.threads == 3
