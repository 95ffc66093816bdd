"""Builds of TensorRT engines from recipe to verdict, on a machine that cannot execute them."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import save_file

from llmopt.evaluation.again import Question, evaluate
from llmopt.optimizer.build import build
from llmopt.optimizer.cli.inspect import command as inspect
from llmopt.optimizer.errors import RecipeError, UnsupportedError
from llmopt.optimizer.manifest import Manifest
from llmopt.optimizer.progress import Silent
from llmopt.optimizer.recipe import Recipe
from llmopt.optimizer.sources import load_model

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

RECIPE = """\
version: 1
model: {model}
passes: {passes}
export: [tensorrt: {{targets: [sm89], capacity: 64, {options}}}]
accept: [{{metric: kl, max: {most}, windows: 2, tokens: 32}}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, llama_of):
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(llama_of(), folder / "model")
    return folder


def recipe_in(place: Path, name: str, **parts: object) -> Recipe:
    written = {"model": "./model", "passes": "[]", "options": "precision: fp16", "most": 0.01} | parts
    path = place / f"{name}.yaml"
    path.write_text(RECIPE.format(**written), encoding="utf-8")
    return Recipe.load(path)


def built(place: Path, name: str, **parts: object) -> Path:
    build(recipe_in(place, name, **parts), place / name, cache=place / "cache", progress=Silent())
    return place / name


@pytest.fixture(scope="module")
def fp16(place):
    return built(place, "fp16")


def test_the_verdict_says_that_a_proxy_was_measured(fp16):
    manifest = Manifest.load(fp16, verify=True)
    assert manifest.verdict.status == "accepted"
    assert manifest.verdict.proxy == "its graph, executed by ONNX Runtime on a CPU"
    assert {"tensorrt-rtx", "onnxruntime"} <= manifest.versions.keys()
    assert manifest.bytes_of(manifest.engines[0]) == (fp16 / "tensorrt/sm89.engine").stat().st_size


def test_what_differs_between_builds_is_in_no_digest(fp16):
    listed = {name for name in Manifest.load(fp16).files if name.startswith("tensorrt/")}
    assert listed == {f"tensorrt/{name}" for name in ("model.onnx", "model.onnx.data", "network.json", "sm89.engine")}
    assert (fp16 / "tensorrt/build.log").is_file()


def test_the_largest_activation_of_every_layer_is_recorded(fp16):
    (record,) = (
        each for each in Manifest.load(fp16).graph_passes["tensorrt/model.onnx"] if each.name == "largest_activations"
    )
    assert set(record.details) == {"layers.0", "layers.1", "layers.2", "outside of the layers"}
    assert all(0 < value < 100 for value in record.details.values())


def test_the_largest_activations_are_those_of_all_chunks_of_a_window(fp16, place):
    manifest = Manifest.load(built(place, "chunks", options="max_chunk: 8"))
    whole, chunked = (
        next(each for each in found.graph_passes["tensorrt/model.onnx"] if each.name == "largest_activations")
        for found in (Manifest.load(fp16), manifest)
    )
    # Rounded to four digits; sums in another order.
    assert chunked.details == pytest.approx(whole.details, rel=1e-3)


def test_bfloat16_is_measured_in_float32_and_says_so(place):
    manifest = Manifest.load(built(place, "bf16", options="precision: bf16"))
    assert manifest.verdict.proxy.endswith("in float32, for want of kernels for bfloat16")
    assert manifest.engines[0].kv_dtype == "bfloat16"
    # Weights lost 16 of their 24 bits: the divergence is there, and as small as that.
    assert 1e-8 < manifest.measurements[0].value < 0.01


def test_a_build_can_be_measured_again(fp16, place):
    question = Question(source=str(place / "model"), threads=1)
    again = evaluate(fp16, question, Silent())
    assert again.measurements == Manifest.load(fp16).measurements


def test_inspect_shows_files_profiles_bindings_and_layers(fp16):
    shown = CliRunner().invoke(inspect, [str(fp16)], terminal_width=200).output
    for part in ("sm89: tensorrt/sm89.engine", "prefill", "decode", "input_ids", "KV_CACHE_UPDATE", "on a CPU"):
        assert part in shown
    every = CliRunner().invoke(inspect, [str(fp16), "--layers"], terminal_width=200).output
    assert "model.layers.2.mlp.down_proj.output" in every


def test_float16_is_refused_where_activations_come_near_its_end(place, llama_of):
    model = load_model(str(llama_of()), cache=place / "cache")
    weights = {name: weight.dense() for name, weight in model.weights.items()}
    # Two linears behind one another whose product stays what it was, and whose middle is large.
    large = {
        "model.layers.1.mlp.up_proj.weight": weights["model.layers.1.mlp.up_proj.weight"] * 3e4,
        "model.layers.1.mlp.down_proj.weight": weights["model.layers.1.mlp.down_proj.weight"] / 3e4,
    }
    shutil.copytree(llama_of(), place / "large")
    save_file({**weights, **large}, place / "large/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UnsupportedError, match=r"layers\.1 has an activation of .*, and float16 ends at 65,504"
    ) as caught:
        built(place, "too-large", model="./large")
    assert "precision: bf16" in caught.value.hint
    assert not (place / "too-large").exists()
    built(place, "large-bf16", model="./large", options="precision: bf16")


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("[round_to_nearest: {scheme: W8A8}]", "no scales of int8 inputs that are found while it runs"),
        ("[gptq: {scheme: W4A16_ASYM}]", "no zero points"),
        ("[round_to_nearest: {scheme: FP8_DYNAMIC}]", "no scales of FP8 inputs"),
        ("[rotate: {}, kv_cache: {}]", "an int8 cache"),
    ],
)
def test_what_tensorrt_cannot_run_is_refused_when_the_recipe_is_read(place, passes, message):
    with pytest.raises(RecipeError) as caught:
        recipe_in(place, "refused", passes=passes)
    assert message in caught.value.problems[0].what
    assert caught.value.problems[0].path.startswith("passes.")
