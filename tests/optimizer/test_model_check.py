"""A model that does not fit its recipe is told before any tensor is read."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import LlmoptError, PassError, UnsupportedError
from llmopt.optimizer.model import DenseWeight, Model
from llmopt.optimizer.model_check import check_model
from llmopt.optimizer.recipe import Recipe
from llmopt.optimizer.sources import load_model
from llmopt.passes.round_to_nearest import RoundToNearest


@pytest.fixture
def recipe_of(tmp_path: Path):
    """A recipe with one rounding pass and one engine."""

    def recipe(source: Path, capacity: int = 64, **options: object) -> Recipe:
        settings = {
            "version": 1, "model": str(source), "passes": [{"round_to_nearest": options}],
            "export": [{"onnx": {"capacity": capacity}}],
        }  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
        return Recipe.load(tmp_path / "recipe.yaml")

    return recipe


def unread(model: Model) -> Model:
    """The model with weights that cannot be read."""

    def load():
        raise AssertionError("a tensor was read")

    return replace(
        model, weights={name: DenseWeight(each.shape, each.dtype, load) for name, each in model.weights.items()}
    )


def test_what_fits_is_accepted(recipe_of, tiny_llama: Path, tmp_path: Path) -> None:
    check_model(recipe_of(tiny_llama, scheme="W8A8"), unread(load_model(str(tiny_llama), cache=tmp_path)))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"scheme": "W4A16", "group_size": 48}, PassError, "48"),
        ({"scheme": "W8A8", "capacity": 1000}, UnsupportedError, "capacity 1000"),
    ],
)
def test_the_first_pass_and_the_exporter_are_asked(
    recipe_of, tiny_llama: Path, tmp_path: Path, options: dict, error: type[LlmoptError], said: str
) -> None:
    model = unread(load_model(str(tiny_llama), cache=tmp_path))
    with pytest.raises(error, match=said):
        check_model(recipe_of(tiny_llama, **options), model)


SEARCH = {"candidates": ["W4A16", {"scheme": "W4A16", "group_size": 16}], "method": "gptq"}


@pytest.mark.parametrize(
    ("later", "said"),
    [
        ({"round_to_nearest": {"scheme": "W4A16", "group_size": 48}}, "not a multiple of group_size=48"),
        ({"gptq": {"scheme": "W8A8", "overrides": [{"match": "head", "scheme": "none"}]}}, "matches no linear"),
        ({"awq": {"scheme": "W8A8", "experts": "W8A16"}}, "has no mixtures of experts"),
        ({"rotate": {"online": {"down_proj": 48}}}, r"not a multiple of online\.down_proj=48"),
        ({"auto_bits": {**SEARCH, "budget": {"bits": 9}}}, "group_size=128"),
        ({"auto_bits": {**SEARCH, "budget": {"bits": 3}, "candidates": ["W8A16", "W8A8"]}}, "bits cannot be reached"),
        (
            {"auto_bits": {**SEARCH, "budget": {"milliseconds": 3}, "candidates": ["W8A16", "FP8_DYNAMIC"]}},
            "FP8_DYNAMIC has no kernel on a CPU whose time",
        ),
    ],
)
def test_passes_behind_the_first_are_asked_too(tiny_llama: Path, tmp_path: Path, later: dict, said: str) -> None:
    settings = {"version": 1, "model": str(tiny_llama), "passes": ["rescale", later], "export": [{"onnx": {}}]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    model = unread(load_model(str(tiny_llama), cache=tmp_path))
    with pytest.raises(PassError, match=said):
        check_model(Recipe.load(tmp_path / "recipe.yaml"), model)


def test_a_pass_is_not_refused_for_what_the_one_before_it_changes(llama_of, tmp_path: Path) -> None:
    source = llama_of(tie_word_embeddings=True)
    passes = ["rotate", {"round_to_nearest": {"scheme": "W8A8", "embedding": "W8A16"}}]
    settings = {"version": 1, "model": str(source), "passes": passes, "export": [{"onnx": {"capacity": 64}}]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    model = unread(load_model(str(source), cache=tmp_path))
    assert model.is_tied
    check_model(Recipe.load(tmp_path / "recipe.yaml"), model)


def test_experts_get_no_scheme_that_no_kernel_runs(recipe_of, family_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = family_of("mixtral")
    overrides = [{"match": "re:.*experts.*", "scheme": "W8A8"}]
    model = unread(load_model(str(source), cache=tmp_path))
    with pytest.raises(UnsupportedError, match="is an expert"):
        check_model(recipe_of(source, scheme="W8A8", overrides=overrides), model)


def test_every_candidate_of_a_search_has_to_be_written(recipe_of, llama_of, tmp_path: Path) -> None:
    source = llama_of(hidden_size=128, head_dim=32)  # of whose linears some have 64 rows: no whole block of 128
    model = unread(load_model(str(source), cache=tmp_path))
    search = {"budget": {"bits": 8.5}, "candidates": ["FP8_DYNAMIC", "FP8_BLOCK"], "method": "round_to_nearest"}
    settings = {"version": 1, "model": str(source), "passes": [{"auto_bits": search}], "export": [{"checkpoint": {}}]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedError, match=r"candidates\.1: .*k_proj: compressed-tensors takes whole blocks"):
        check_model(Recipe.load(tmp_path / "recipe.yaml"), model)


def test_what_is_quantized_already_has_to_be_written_as_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    quantized = RoundToNearest(scheme="W8A8", head="none").run(
        load_model(str(tiny_llama), cache=tmp_path), PassContext()
    )
    settings = {"version": 1, "model": str(tiny_llama), "export": [{"checkpoint": {"format": "gptq"}}]}
    for passes, refused in (([], True), ([{"dequantize": {}}], False)):
        (tmp_path / "recipe.yaml").write_text(json.dumps({**settings, "passes": passes}))
        recipe = Recipe.load(tmp_path / "recipe.yaml")
        if refused:
            with pytest.raises(UnsupportedError, match="q_proj is quantized to W8A8 in the model: GPTQ"):
                check_model(recipe, quantized)
        else:
            check_model(recipe, quantized)
