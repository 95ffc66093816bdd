"""Adapters of the genai flavor in their real loader: with one it says what the merged model says, without what the base
says."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime_genai as og
import pytest
from safetensors.torch import load_file, save_file

from llmopt.exporters.onnx.exporter import Onnx
from llmopt.optimizer.build import build
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import InputError, LlmoptError, RecipeError, UnsupportedError
from llmopt.optimizer.model import Model
from llmopt.optimizer.progress import Silent
from llmopt.optimizer.recipe import Recipe
from llmopt.optimizer.sources import load_model
from llmopt.passes.merge_lora import MergeLora
from llmopt.passes.rescale import Rescale
from llmopt.passes.rotate import Rotate
from llmopt.passes.round_to_nearest import RoundToNearest

CAPACITY, COUNT = 64, 12
PROMPT = [5, 17, 99, 200, 33, 4]


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[..., Path]:
    """Exports a model with adapters of the folders given, each under its folder's name."""
    made = iter(range(100))

    def export(model: Model, *adapters: Path, verify: str = "none") -> Path:
        options = [{"path": str(path), "name": path.name} for path in adapters]
        exporter = Onnx(flavor="genai", capacity=CAPACITY, adapters=options)
        exporter.check(model)
        directory = tmp_path / f"build-{next(made)}"
        exporter.export(model, directory, PassContext(verify=verify))
        return directory / "genai"

    return export


def generated(folder: Path, *names: str) -> list[list[int]]:
    """What genai continues the prompt with, greedily, with each of these adapters; the empty name is none."""
    model = og.Model(str(folder))
    adapters = og.Adapters(model)
    for name in {*names} - {""}:
        adapters.load(str(folder / "adapters" / f"{name}.onnx_adapter"), name)
    found = []
    for name in names:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(PROMPT) + COUNT, do_sample=False)
        generator = og.Generator(model, parameters)
        if name:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(np.array(PROMPT, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        found.append([int(token) for token in generator.get_sequence(0)][len(PROMPT) :])
    return found


def merged(model: Model, adapter: Path) -> Model:
    return MergeLora(adapters=[{"path": str(adapter)}]).run(model, PassContext())


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]}),
        ("llama", {"target_modules": ["k_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"k_proj": 2}}),
        ("qwen2", {"target_modules": ["q_proj", "k_proj", "v_proj"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("gpt_neox", {"target_modules": ["query_key_value", "dense"]}),
        ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
        ("qwen3", {"target_modules": ["q_proj", "down_proj"]}),
        ("qwen3_moe", {"target_modules": ["q_proj", "gate"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value["target_modules"][:2]),
)
def test_it_says_what_the_merged_model_says(family, settings, family_of, adapter_of, folder_of, tmp_path) -> None:
    adapter_of(tmp_path / "support", family_of(family), **settings)
    model = load_model(str(family_of(family)), cache=tmp_path / "cache")
    plain, adapted = generated(folder_of(model, tmp_path / "support", verify="quick"), "", "support")
    (expected,) = generated(folder_of(merged(model, tmp_path / "support")), "")
    assert plain == generated(folder_of(model), "")[0]
    assert adapted == expected != plain


@pytest.mark.parametrize(
    ("family", "passes"),
    [("llama", [Rescale(), Rotate(online={"down_proj": 16})]), ("gpt2", [Rotate()])],
    ids=["scaled and turned", "norms with biases"],
)
def test_it_follows_a_base_that_passes_changed(family, passes, family_of, adapter_of, folder_of, tmp_path) -> None:
    adapter_of(tmp_path / "support", family_of(family), target_modules="all-linear")
    model = load_model(str(family_of(family)), cache=tmp_path / "cache")
    behind = model
    for each in passes:
        behind = each.run(behind, PassContext())
    folder = folder_of(behind, tmp_path / "support")
    inputs = onnx.load(folder / "model.onnx", load_external_data=False).graph.input
    assert any(value.name.endswith(".lora_B.bias") for value in inputs) == (family == "gpt2")
    plain, adapted = generated(folder, "", "support")
    assert plain == generated(folder_of(model), "")[0]
    assert adapted == generated(folder_of(merged(model, tmp_path / "support")), "")[0] != plain


@pytest.mark.parametrize("options", [{"scheme": "W8A8"}, {"scheme": "W4A16", "group_size": 16}], ids=str)
def test_a_quantized_base_is_the_same_without_one(options, tiny_llama, adapter_of, folder_of, tmp_path) -> None:
    adapter_of(tmp_path / "support", tiny_llama, target_modules="all-linear")
    model = RoundToNearest(**options).run(load_model(str(tiny_llama), cache=tmp_path / "cache"), PassContext())
    plain, adapted = generated(folder_of(model, tmp_path / "support", verify="quick"), "", "support")
    assert plain == generated(folder_of(model), "")[0]
    assert adapted != plain


def test_several_adapters_share_a_graph_and_need_not_change_the_same(tiny_llama, adapter_of, folder_of, tmp_path):
    folders = [tmp_path / "support", tmp_path / "french"]
    adapter_of(folders[0], tiny_llama, target_modules=["q_proj", "v_proj"], r=8)
    adapter_of(folders[1], tiny_llama, target_modules=["q_proj", "down_proj"], r=2, seed=1)
    model = load_model(str(tiny_llama), cache=tmp_path / "cache")
    found = generated(folder_of(model, *folders), "support", "french", "", "support")
    expected = [generated(folder_of(each), "")[0] for each in (*(merged(model, path) for path in folders), model)]
    assert found == [*expected, expected[0]]
    assert len({tuple(each) for each in expected}) == 3


def test_two_exports_write_the_same_bytes(tiny_llama, adapter_of, folder_of, tmp_path) -> None:
    adapter_of(tmp_path / "support", tiny_llama, target_modules=["q_proj", "v_proj"])
    model = load_model(str(tiny_llama), cache=tmp_path / "cache")
    files = [folder_of(model, tmp_path / "support") / "adapters/support.onnx_adapter" for _ in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def refusal(options: dict[str, Any], model: Model) -> LlmoptError:
    with pytest.raises(LlmoptError) as raised:
        Onnx(**options).check(model)
    assert raised.value.hint
    return raised.value


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "has DoRA, or biases or weights that were trained"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
            "has DoRA, or biases or weights that were trained",
        ),
        ({"target_modules": ["embed_tokens"]}, "changes model.embed_tokens.weight, which is no linear of its own"),
    ],
    ids=["DoRA", "saved whole", "a table"],
)
def test_what_is_no_product_for_a_linear_is_refused(settings, said, tiny_llama, adapter_of, tmp_path) -> None:
    adapter_of(tmp_path / "support", tiny_llama, **settings)
    adapters = [{"path": str(tmp_path / "support"), "name": "support"}]
    found = refusal({"flavor": "genai", "adapters": adapters}, load_model(str(tiny_llama), cache=tmp_path / "cache"))
    assert isinstance(found, UnsupportedError)
    assert said in found.message
    assert "merge_lora merges it" in str(found.hint)


def test_another_flavor_has_no_adapters(tiny_llama, adapter_of, tmp_path) -> None:
    adapter_of(tmp_path / "support", tiny_llama, target_modules=["q_proj"])
    adapters = [{"path": str(tmp_path / "support"), "name": "support"}]
    found = refusal({"adapters": adapters}, load_model(str(tiny_llama), cache=tmp_path / "cache"))
    assert "adapters are files for onnxruntime-genai, and the flavor is llmopt" in found.message


def test_an_adapter_for_another_base_is_refused(tiny_llama, llama_of, adapter_of, tmp_path) -> None:
    adapter_of(tmp_path / "support", llama_of(hidden_size=32), target_modules=["q_proj"])
    adapters = [{"path": str(tmp_path / "support"), "name": "support"}]
    found = refusal({"flavor": "genai", "adapters": adapters}, load_model(str(tiny_llama), cache=tmp_path / "cache"))
    assert isinstance(found, InputError)
    assert "q_proj.lora_A.weight is [4, 32]" in found.message


def test_values_that_are_not_finite_end_the_export(tiny_llama, adapter_of, folder_of, tmp_path) -> None:
    adapter_of(tmp_path / "support", tiny_llama, target_modules=["q_proj"])
    path = tmp_path / "support/adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"not finite"):
        folder_of(load_model(str(tiny_llama), cache=tmp_path / "cache"), tmp_path / "support")


@pytest.fixture
def recipe_with(tiny_llama, adapter_of, tmp_path) -> Callable[[Sequence[dict[str, str]]], Path]:
    """Writes a recipe beside the adapter ``adapters/support``."""
    adapter_of(tmp_path / "adapters/support", tiny_llama, target_modules=["q_proj"])

    def write(adapters: Sequence[dict[str, str]]) -> Path:
        export = [{"onnx": {"flavor": "genai", "capacity": CAPACITY, "adapters": adapters}}]
        gates = [{"metric": "kl", "max": 10, "windows": 2, "tokens": 16}]
        settings = {"version": 1, "model": str(tiny_llama), "passes": [], "export": export, "accept": gates}
        (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
        return tmp_path / "recipe.yaml"

    return write


def test_a_build_has_its_adapters_and_names_them(recipe_with, tmp_path) -> None:
    recipe = Recipe.load(recipe_with([{"path": "adapters/support", "name": "support"}]))
    manifest = build(recipe, tmp_path / "it", cache=tmp_path / "cache", progress=Silent())
    assert "genai/adapters/support.onnx_adapter" in manifest.files
    (record,) = [each for each in manifest.graph_passes["genai"] if each.name == "write_adapters"]
    entry = record.details["support"]
    assert (entry["path"], entry["linears"], len(entry["files"])) == ("adapters/support", 3, 2)
    assert generated(tmp_path / "it/genai", "support")


@pytest.mark.parametrize(
    ("adapters", "said"),
    [
        ([{"path": "adapters/french", "name": "a"}], "there is no adapters/french"),
        ([{"path": "adapters", "name": "a"}], "lacks adapter_config.json"),
        ([{"path": "adapters/support", "name": "../a"}], "name"),
        ([{"path": "adapters/support", "name": "a"}] * 2, "two adapters have the name a"),
        ([{"path": "adapters/support"}], "name"),
    ],
    ids=["missing", "no adapter", "a path as name", "twice", "no name"],
)
def test_mistakes_are_found_in_the_recipe(adapters, said, recipe_with) -> None:
    with pytest.raises(RecipeError) as raised:
        Recipe.load(recipe_with(adapters))
    (problem,) = raised.value.problems
    assert "export.0.onnx.adapters" in str(problem)
    assert said in str(problem)
