"""Adapters in a recipe: found relative to it, checked with it, part of what is cached, and named in the manifest."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt.evaluation.again import Question, evaluate
from llmopt.evaluation.bisect import Text, bisect
from llmopt.optimizer.cli.main import main
from llmopt.optimizer.errors import InputError, RecipeError
from llmopt.optimizer.manifest import Manifest
from llmopt.optimizer.progress import Silent
from llmopt.optimizer.recipe import Recipe

MERGE = {"merge_lora": {"adapters": [{"path": "adapters/support"}]}}


@pytest.fixture
def adapter(adapter_of, tiny_llama, tmp_path) -> Path:
    """An adapter beside the recipe."""
    folder = tmp_path / "adapters/support"
    adapter_of(folder, tiny_llama, target_modules=["q_proj", "down_proj"])
    return folder


def problems(recipe: Path) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        Recipe.load(recipe)
    return [str(problem).removeprefix(f"{recipe}:") for problem in raised.value.problems]


def build(recipe: Path, output: Path, capsys) -> tuple[Manifest, str]:
    with pytest.raises(SystemExit) as end:
        main(["build", str(recipe), "-o", str(output)])
    assert not end.value.code
    return Manifest.load(output), capsys.readouterr().err


def test_paths_are_relative_to_the_recipe_and_stay_as_written(recipe_of, adapter) -> None:
    recipe = Recipe.load(recipe_of(passes=[MERGE]))
    assert recipe.resolved()["passes"][0]["merge_lora"]["adapters"] == [{"path": "adapters/support", "weight": 1.0}]
    assert all(file.is_file() for file in recipe.passes[0].instance.files)


def test_a_missing_adapter_is_a_mistake_of_its_line(recipe_of, tmp_path) -> None:
    (found,) = problems(recipe_of(passes=[MERGE]))
    assert found.startswith("1: passes.0.merge_lora.adapters.0.path: there is no adapters/support")
    assert found.endswith(f"hint: paths are relative to {tmp_path.resolve()}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
            "has its weights in adapter_model.bin, a pickle, and loading a pickle runs code from it",
        ),
        (lambda folder: (folder / "adapter_config.json").unlink(), "lacks adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "of the type IA3"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 0}'), "r is 0"),
    ],
    ids=["pickle", "no config", "IA3", "rank 0"],
)
def test_an_adapter_that_cannot_be_used_is_one_too(change, said, recipe_of, adapter) -> None:
    change(adapter)
    (found,) = problems(recipe_of(passes=[MERGE]))
    assert found.startswith("1: passes.0.merge_lora.adapters.0.path: ")
    assert said in found
    assert "  hint: " in found


@pytest.mark.parametrize("path", [3, "", None])
def test_what_is_no_path_is_one_too(path, recipe_of) -> None:
    (found,) = problems(recipe_of(passes=[{"merge_lora": {"adapters": [{"path": path}]}}]))
    assert "passes.0.merge_lora.adapters.0.path: must be a path, not" in found


@pytest.mark.parametrize(
    "before",
    [{"round_to_nearest": {"scheme": "W8A8"}}, {"gptq": {"scheme": "W8A8"}}, "kv_cache", {"awq": {"scheme": "W4A16"}}],
)
def test_behind_a_pass_that_leaves_other_weights_it_is_refused(before, recipe_of, adapter) -> None:
    found = problems(recipe_of(passes=[before, MERGE]))
    name = before if isinstance(before, str) else next(iter(before))
    said = f"1: passes.1.merge_lora: {name} before it changes the weights that its adapters were trained on"
    assert f"{said}  hint: put merge_lora in front of {name}" in found


@pytest.mark.parametrize(
    "before", ["dequantize", "rotate", "rescale", "smoothquant", {"awq": {"scheme": "W4A16", "rounds": False}}]
)
def test_behind_passes_that_say_what_they_did_it_is_accepted(before, recipe_of, adapter) -> None:
    assert len(Recipe.load(recipe_of(passes=[before, MERGE])).passes) == 2


def test_an_adapter_for_another_base_stops_the_build_before_any_work(recipe_of, adapter, tmp_path, capsys) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)
    save_file(tensors, path)
    with pytest.raises(SystemExit) as end:
        main(["build", str(recipe_of(passes=[MERGE])), "-o", str(tmp_path / "out")])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "q_proj.lora_A.weight is [4, 32], and" in said
    assert "merge_lora" not in said.partition("error:")[0]


def test_a_build_names_its_adapters_and_follows_their_contents(recipe_of, adapter, tmp_path, capsys) -> None:
    path = adapter / "adapter_model.safetensors"
    recipe = recipe_of(passes=[MERGE, {"round_to_nearest": {"scheme": "W8A16"}}])
    first, _ = build(recipe, tmp_path / "first", capsys)
    assert first.passes[0].notes[0] == "adapters/support: LoRA of rank 4, changes 6 weights"
    tensors = load_file(path)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, path)
    second, _ = build(recipe, tmp_path / "second", capsys)
    assert second.passes[0].details["files"] != first.passes[0].details["files"]
    assert second.files["engine/model.onnx.data"] != first.files["engine/model.onnx.data"]
    save_file(tensors, path)
    third, _ = build(recipe, tmp_path / "third", capsys)
    assert third.files["engine/model.onnx.data"] == first.files["engine/model.onnx.data"]


def test_what_requantizing_a_base_costs_is_shown(recipe_of, adapter, tiny_llama, tmp_path, capsys) -> None:
    checkpoint = recipe_of(
        "base.yaml", passes=[{"round_to_nearest": {"scheme": "W8A8", "head": "none"}}], accept=[],
        export=[{"checkpoint": {"format": "compressed-tensors"}}],
    )  # fmt: skip
    build(checkpoint, tmp_path / "base", capsys)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / file, tmp_path / "base/checkpoint" / file)
    recipe = recipe_of(model=str(tmp_path / "base/checkpoint"), passes=[MERGE])
    manifest, said = build(recipe, tmp_path / "out", capsys)
    assert "6 weights were rounded again by round_to_nearest" in said
    errors = {layer.name: layer.error for layer in manifest.layers}
    assert (
        errors["model.layers.0.self_attn.q_proj"]
        == manifest.passes[0].details["errors"]["model.layers.0.self_attn.q_proj"]
    )
    assert 0 < errors["model.layers.2.mlp.down_proj"] < 0.02
    assert errors["model.layers.0.self_attn.k_proj"] is None
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "out"), "--layers"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "rounded again" in shown
    assert f"{errors['model.layers.0.self_attn.q_proj']:.4f}" in shown
    assert json.loads((tmp_path / "out/manifest.json").read_text())["passes"][0]["details"]["adapter_kept"]


def test_a_build_is_measured_against_the_source_with_its_adapters(recipe_of, adapter, tmp_path, capsys, monkeypatch):
    """In float nothing is lost, however far the adapter is from the base; also when it is measured again."""
    gates = [{"metric": "kl", "max": 1e-4, "windows": 2, "tokens": 16}]
    recipe = recipe_of(passes=[MERGE], accept=gates)
    manifest, _ = build(recipe, tmp_path / "out", capsys)
    unmerged, _ = build(recipe_of("plain.yaml", passes=[], accept=gates), tmp_path / "plain", capsys)
    assert manifest.verdict.status == "accepted"
    digests = [each.measurements[0].data_digest for each in (manifest, unmerged)]
    assert digests[0] != digests[1], "texts are sampled from the model that is wanted"
    monkeypatch.chdir(tmp_path)
    again = evaluate(tmp_path / "out", Question(), Silent())
    assert again.measurements == manifest.measurements
    (adapter / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text() + " ")
    with pytest.raises(InputError, match="the adapters that were merged by merge_lora have changed"):
        evaluate(tmp_path / "out", Question(), Silent())
    monkeypatch.chdir(tmp_path / "adapters")
    with pytest.raises(InputError, match=r"cannot be read: there is no adapters/support") as raised:
        evaluate(tmp_path / "out", Question(), Silent())
    assert "in the folder that the recipe was in" in str(raised.value.hint)


def test_merging_costs_nothing_when_passes_are_measured_one_by_one(recipe_of, adapter, tmp_path) -> None:
    recipe = Recipe.load(recipe_of(passes=[MERGE, "rotate"]))
    found = bisect(
        recipe, Text(windows=2, tokens=16), lambda model: iter(()), cache=tmp_path / "cache", progress=Silent()
    )
    assert [step.name for step in found.steps] == ["source model", "merge_lora", "rotate"]
    assert all(step.kl < 1e-6 for step in found.steps)
