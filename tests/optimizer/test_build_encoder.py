"""Builds of encoders from recipe to vectors, and recipes that do not fit them."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmopt.evaluation.again import Question, evaluate
from llmopt.evaluation.speed import Plan, measure_speed
from llmopt.optimizer.build import build
from llmopt.optimizer.cli.inspect import command as inspect
from llmopt.optimizer.errors import InputError, LlmoptError, RejectedError
from llmopt.optimizer.manifest import Manifest
from llmopt.optimizer.progress import Silent
from llmopt.optimizer.recipe import Recipe
from llmopt.runtime.build import open_build
from llmopt.runtime.encoder import Encoder

NOUNS, PLACES = ("clock", "train", "school"), ("first", "second", "third", "old")
LINES = [f"The {noun} of the {place} town stopped." for noun in NOUNS for place in PLACES]

RECIPE = """\
version: 1
model: {model}
passes: {passes}
export: [{export}]
accept: {accept}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, encoder_of):
    """A folder with a model, with the files of sentence-transformers, and texts."""
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(encoder_of("bert", num_hidden_layers=1, pooling="pooling_mode_mean_tokens"), folder / "model")
    (folder / "texts.txt").write_text("\n".join(LINES), encoding="utf-8")
    return folder


def recipe_in(place: Path, name: str, **parts: str) -> Recipe:
    written = {"model": "./model", "passes": "[]", "export": "onnx", "accept": "[]"} | parts
    path = place / f"{name}.yaml"
    path.write_text(RECIPE.format(**written), encoding="utf-8")
    return Recipe.load(path)


def cosine(metric: str = "cosine", least: float = 0.9, lines: int = 12) -> str:
    return f"{{metric: {metric}, min: {least}, data: texts.txt, windows: {lines}, tokens: 30}}"


@pytest.fixture(scope="module")
def built(place):
    """An accepted W8A8 build."""
    gates = f"[{cosine()}, {cosine('min_cosine', 0.8)}]"
    recipe = recipe_in(place, "int8", passes="[round_to_nearest: {scheme: W8A8}]", accept=gates)
    build(recipe, place / "int8", cache=place / "cache", progress=Silent())
    return place / "int8"


def test_the_manifest_says_what_was_built_and_lost(built):
    manifest = Manifest.load(built, verify=True)
    assert manifest.architecture == "bert"
    assert not manifest.engines
    (engine,) = manifest.encoders
    assert (engine.pooling, engine.normalize, engine.capacity) == ("mean", True, 64)
    assert [layer.scheme for layer in manifest.layers] == ["W8A8"] * 6
    assert manifest.sizes.keys() == {"embedding", "attention", "mlp", "other"}
    mean, smallest = manifest.measurements
    assert 0.9 < smallest.value < mean.value < 1
    assert [result.passed for result in manifest.verdict.gates] == [True, True]
    (record,) = [record for record in manifest.graph_passes["engine/model.onnx"] if record.name == "verify_lowering"]
    assert record.details["layers.0"]["all"] < 1e-5


def test_a_build_is_inspected(built):
    shown = CliRunner().invoke(inspect, [str(built)]).output
    assert "texts up to 64 tokens" in shown
    assert "vectors  64 columns, pooled by mean, of length 1" in shown
    assert "fuse_self_attention" in shown
    assert "min_cosine" in (built / "report.html").read_text("utf-8")


def test_a_build_is_measured_again(built, place):
    result = evaluate(built, Question(data=(place / "texts.txt",), source=str(place / "model")), Silent())
    assert result.verdict.status == "accepted"
    then = Manifest.load(built).measurements
    assert [each.value for each in result.measurements] == pytest.approx([each.value for each in then], abs=1e-6)
    with pytest.raises(InputError, match="writes no text to be measured on"):
        evaluate(built, Question(source=str(place / "model")), Silent())


def test_other_texts_than_the_gates_can_be_measured(built, place, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("\n".join(LINES[::-1]), encoding="utf-8")
    question = Question(data=(other,), windows=5, tokens=20, source=str(place / "model"))
    result = evaluate(built, question, Silent())
    assert [(each.metric, each.data) for each in result.measurements] == [
        ("cosine", str(other)),
        ("min_cosine", str(other)),
    ]
    assert len(result.not_judged) == 2


def test_its_speed_is_measured_in_texts(built):
    speed = measure_speed(built, Plan(prompts=((1, 8), (4, 16)), batches=(), repeats=1))
    assert [(rate.kind, rate.sequences, rate.tokens) for rate in speed.rates] == [("encode", 1, 8), ("encode", 4, 16)]
    assert all(rate.rate == pytest.approx(rate.sequences / rate.latency) for rate in speed.rates)
    with pytest.raises(InputError, match="which decodes nothing"):
        measure_speed(built, Plan())


def test_what_continues_text_refuses_it(built):
    with pytest.raises(InputError, match="is a build of an encoder") as error:
        open_build(built)
    assert "Encoder" in error.value.hint


def test_a_gate_that_is_missed_leaves_the_build_rejected(place):
    recipe = recipe_in(
        place, "strict", passes="[round_to_nearest: {scheme: W8A8}]", accept=f"[{cosine('min_cosine', 0.99999)}]"
    )
    assert build(recipe, place / "strict", cache=place / "cache", progress=Silent()).verdict.status == "rejected"
    with pytest.raises(RejectedError, match="min_cosine is 0"):
        Encoder(place / "strict")
    assert Encoder(place / "strict", force=True, threads=1).encode("Rome").shape == (1, 64)


@pytest.mark.parametrize(
    ("parts", "code", "said"),
    [
        ({}, 2, "names no text to measure it on"),
        ({"accept": "[{metric: kl, max: 1}]"}, 2, "accept.0: kl is no metric of a model like ./model, which is a enc"),
        ({"passes": "[rotate: {}]"}, 5, "passes.0.rotate is for decoders, and ./model is an encoder"),
        ({"passes": "[gptq: {scheme: W4A16, group_size: 32}]"}, 5, "passes.0.gptq is for decoders"),
        ({"passes": "[round_to_nearest: {scheme: W8A16}, kv_cache: {}]"}, 5, "passes.1.kv_cache is for decoders"),
        ({"export": "checkpoint: {format: compressed-tensors}"}, 5, "export.0.checkpoint is for decoders"),
        ({"export": "onnx: {kernels: llmopt}"}, 5, "kernels: llmopt is for decoders"),
        ({"passes": "[round_to_nearest: {scheme: FP8}]"}, 5, "input scales that are known in advance"),
        ({"passes": "[round_to_nearest: {scheme: W8A16, head: W8A16}]"}, 3, "head is given, but an encoder has none"),
        ({"export": "onnx: {pooling: cls}"}, 2, "the recipe asks for pooling: cls with normalize"),
        ({"export": "onnx: {capacity: 20}"}, 2, "windows of 30 tokens, the engine takes 20"),
        ({"accept": f"[{cosine(lines=13)}]"}, 2, "has 12 lines of text, not 13"),
    ],
    ids=lambda value: "" if isinstance(value, int | dict) else value[:30],
)
def test_a_recipe_that_does_not_fit_is_refused_before_any_work(place, tmp_path, parts, code, said):
    gates = {} if "names no text" in said else {"accept": f"[{cosine()}]"}
    recipe = recipe_in(place, "wrong", **gates | parts)
    with pytest.raises(LlmoptError) as error:
        build(recipe, tmp_path / "build", cache=tmp_path / "cache", progress=Silent())
    assert said in error.value.message
    assert error.value.exit_code == code
    assert not (tmp_path / "cache/passes").exists()


def test_a_decoder_has_no_cosine(place, tiny_llama, tmp_path):
    recipe = recipe_in(place, "llama", model=str(tiny_llama), accept=f"[{cosine()}]")
    with pytest.raises(InputError, match="which is a decoder"):
        build(recipe, tmp_path / "build", cache=tmp_path / "cache", progress=Silent())
