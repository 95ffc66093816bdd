import pytest

from llmopt.benchmarks.quantizers.peers import PEERS
from llmopt.benchmarks.quantizers.rows import OURS, ROWS, Row, available, chosen
from llmopt.benchmarks.quantizers.run_passes import recipe_of
from llmopt.optimizer.errors import InputError


def test_every_row_of_ours_is_a_recipe_that_its_passes_accept() -> None:
    for row in available(ROWS):
        steps = recipe_of("model", row.passes, threads=1).passes
        assert [step.name for step in steps] == [name for step in row.passes for name in step]


def test_every_other_program_is_known_and_told_something_else_in_each_row() -> None:
    others = [row for row in ROWS if row.program != OURS]
    assert {row.program for row in others} == set(PEERS)
    assert len({(row.program, *sorted(row.options.items())) for row in others}) == len(others)


def test_a_row_whose_pass_does_not_exist_is_not_listed() -> None:
    missing = Row("a", "no_such_pass", "W4A16", passes=[{"no_such_pass": {}}])
    there = Row("b", "round_to_nearest", "W4A16", passes=[{"round_to_nearest": {"scheme": "W4A16"}}])
    assert available([missing, there]) == [there]


def test_rows_are_chosen_by_their_names_or_by_their_program() -> None:
    assert chosen(ROWS, []) == list(ROWS)
    assert [row.name for row in chosen(ROWS, ["rtn-w4", "float"])] == ["float", "rtn-w4"]
    assert {row.program for row in chosen(ROWS, ["nncf"])} == {"nncf"}
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_a_misspelt_row_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(InputError, match="gptq-w5") as caught:
        chosen(ROWS, ["gptq-w5"])
    assert "gptq-w4" in str(caught.value.hint)
