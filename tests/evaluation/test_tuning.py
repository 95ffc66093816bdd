"""A search over a recipe's options: trials that are built, found again, and refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmopt.evaluation import tuning
from llmopt.evaluation.tuning import Search, best_of, check_search, tune
from llmopt.optimizer.errors import InputError, RecipeError
from llmopt.optimizer.progress import Silent
from llmopt.optimizer.recipe import Recipe

GROUPS = "passes.0.round_to_nearest.group_size"
SCHEME = "passes.0.round_to_nearest.scheme"


@pytest.fixture
def search_of(tiny_llama: Path, tmp_path: Path):
    """A search whose ``tune`` has some keys changed."""

    def make(**changes) -> Search:
        constraint = {"metric": "kl", "max": 10, "windows": 2, "tokens": 32}
        settings = {
            "version": 1,
            "model": str(tiny_llama),
            "passes": [{"round_to_nearest": {"scheme": "W4A16", "group_size": 16}}],
            "export": [{"onnx": {"target": "cpu"}}],
            "verify": "none",
            "resources": {"threads": 1},
            "tune": {"search": {GROUPS: [16, 32]}, "constraint": constraint, "trials": 3} | changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(settings))
        found = Recipe.load(path).tune
        assert found is not None
        return Search(path, (), found, tmp_path / "out", tmp_path / "cache")

    return make


def test_a_small_space_is_tried_whole_and_nothing_twice(search_of, monkeypatch: pytest.MonkeyPatch) -> None:
    search = search_of()
    trials = tune(search, Silent())
    assert [each.values[GROUPS] for each in trials] == [16, 32]
    best = best_of(trials, search.tuning)
    assert best is not None
    assert best.values == {GROUPS: 32}
    monkeypatch.setattr(tuning, "build", None)
    assert tune(search, Silent()) == trials


def test_an_unknown_option_is_named_with_the_nearest(search_of) -> None:
    with pytest.raises(RecipeError) as error:
        check_search(search_of(search={GROUPS.replace("group", "gruop"): [16, 32]}))
    assert error.value.problems[0].hint == "did you mean 'group_size'?"


def test_an_option_that_needs_a_value_of_another_is_searched(search_of) -> None:
    search = search_of(search={GROUPS: [16]})
    alone = replace(search, overrides=(f"{SCHEME}=W8A8",))
    with pytest.raises(RecipeError):
        check_search(alone)
    both = alone.tuning.model_copy(update={"search": {GROUPS: (16,), SCHEME: ("W8A8", "W4A16")}})
    check_search(replace(alone, tuning=both))


def test_a_study_of_another_search_is_not_continued(search_of) -> None:
    tune(search_of(search={GROUPS: [32]}), Silent())
    with pytest.raises(InputError, match="holds a study of another recipe or search"):
        tune(search_of(), Silent())


def test_a_recipe_that_makes_no_engine_is_refused(search_of) -> None:
    search = search_of()
    settings = json.loads(search.recipe.read_text())
    search.recipe.write_text(json.dumps(settings | {"export": [{"checkpoint": {}}]}))
    with pytest.raises(InputError, match="exports no engine"):
        tune(search, Silent())
    assert not search.output.exists()
