"""The genai flavor in its real loader: onnxruntime-genai continues prompts as our own execution does."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
import torch

from llmopt.calibration.reference import Reference
from llmopt.exporters.onnx.exporter import Onnx
from llmopt.optimizer.build import build
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.manifest import Manifest
from llmopt.optimizer.model import Model
from llmopt.optimizer.progress import Silent
from llmopt.optimizer.recipe import Recipe
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.tokens import Tokens
from llmopt.passes.kv_cache import KvCache
from llmopt.passes.round_to_nearest import RoundToNearest
from llmopt.runtime.build import open_build

CAPACITY, COUNT, END = 64, 12, 2
PROMPTS = ([5, 17, 99, 200, 33, 4], [7, 8, 250], [301, 12, 44, 45, 46, 47, 48, 49, 50])


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[..., Path]:
    def export(model: Model) -> Path:
        exporter = Onnx(flavor="genai", capacity=CAPACITY)
        exporter.check(model)
        exporter.export(model, tmp_path / "build", PassContext(verify="none"))
        return tmp_path / "build" / "genai"

    return export


def generated(folder: Path, prompts: Sequence[Sequence[int]], count: int = COUNT) -> list[list[int]]:
    """What genai continues each prompt with, greedily, all in one batch; without its end of text."""
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    width = max(map(len, prompts))
    parameters.set_search_options(max_length=width + count, batch_size=len(prompts), do_sample=False)
    generator = og.Generator(model, parameters)
    padded = np.array([[*prompt, *[END] * (width - len(prompt))] for prompt in prompts], np.int32)
    generator.append_tokens(padded if len(prompts) > 1 else padded[0])
    while not generator.is_done():
        generator.generate_next_token()
    # In a batch, what is behind a shorter prompt begins behind its padding.
    found = [list(map(int, generator.get_sequence(row)))[width:] for row in range(len(prompts))]
    return [_to_end(each) for each in found]


def _to_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(END)] if END in ids else ids


def greedy(model: Model, prompt: Sequence[int], count: int = COUNT) -> list[int]:
    """The same by the reference, all tokens again for each new one."""
    reference, ids = Reference(model, threads=1), list(prompt)
    for _ in range(count):
        ids.append(int(reference.logits(torch.tensor([ids]))[0, -1].argmax()))
    return _to_end(ids[len(prompt) :])


def test_every_family_continues_a_prompt_as_the_reference_does(family_name, family_of, folder_of, tmp_path) -> None:
    model = load_model(str(family_of(family_name)), cache=tmp_path / "cache")
    assert generated(folder_of(model), PROMPTS[:1]) == [greedy(model, PROMPTS[0])]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3", "falcon"])
def test_prompts_of_different_lengths_share_a_batch(name: str, family_of, folder_of, tmp_path: Path) -> None:
    model = load_model(str(family_of(name)), cache=tmp_path / "cache")
    folder = folder_of(model)
    alone = [generated(folder, [prompt])[0] for prompt in PROMPTS]
    together = generated(folder, PROMPTS)
    for first, second in zip(alone, together, strict=True):
        length = min(len(first), len(second))
        assert length >= COUNT - max(map(len, PROMPTS)) + min(map(len, PROMPTS))
        assert first[:length] == second[:length]


@pytest.mark.parametrize(
    "options",
    [{"scheme": "W8A8"}, {"scheme": "W4A16", "group_size": 16}, {"scheme": "W8A16"}, {"scheme": "FP8_DYNAMIC"}],
    ids=lambda options: options["scheme"],
)
@pytest.mark.parametrize("cache", ["float", "int8"])
def test_quantized_models_compute_what_our_engine_does(options, cache, tiny_llama, folder_of, tmp_path: Path) -> None:
    tokens = Tokens(name="it", ids=torch.tensor([list(range(3, 60))]), digest="0")
    context = PassContext(calibration=lambda: tokens)
    model = RoundToNearest(**options).run(load_model(str(tiny_llama), cache=tmp_path), context)
    if cache == "int8":
        model = KvCache().run(model, context)
    folder = folder_of(model)
    found = generated(folder, PROMPTS[:1])[0]
    session = _own_engine(model, tmp_path / "own")
    assert found == session(PROMPTS[0], len(found))


def _own_engine(model: Model, directory: Path) -> Callable[[Sequence[int], int], list[int]]:
    """Our engine's greedy continuation: the same kernels behind another interface."""
    from llmopt.runtime.backends.onnxruntime import open_backend

    engine, _ = Onnx(capacity=CAPACITY).export(model, directory, PassContext(verify="none"))

    def continued(prompt: Sequence[int], count: int) -> list[int]:
        backend = open_backend(directory, engine, slots=1, capacity=CAPACITY, threads=1)
        logits = backend.prefill(0, np.array(prompt), 0, np.array([len(prompt) - 1]))
        ids: list[int] = []
        while len(ids) < count:
            ids.append(int(logits[-1].argmax()))
            logits = backend.decode(np.array(ids[-1:]), np.array([len(prompt) + len(ids) - 1]))
        return ids

    return continued


def test_its_config_has_what_genai_knows_and_the_models_own_numbers(tiny_llama: Path, folder_of, tmp_path) -> None:
    folder = folder_of(load_model(str(tiny_llama), cache=tmp_path))
    config = json.loads((folder / "genai_config.json").read_text())
    model = config["model"]
    assert (model["context_length"], model["vocab_size"], model["eos_token_id"]) == (CAPACITY, 512, END)
    decoder = model["decoder"]
    assert (decoder["head_size"], decoder["num_key_value_heads"], decoder["num_hidden_layers"]) == (16, 2, 3)
    assert config["search"]["past_present_share_buffer"] is True
    tokenizer = og.Tokenizer(og.Model(str(folder)))
    assert tokenizer.decode(tokenizer.encode("The capital of France")) == "The capital of France"


@pytest.fixture
def make(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Manifest]:
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "cache"))

    def run(export: list[dict[str, Any]]) -> Manifest:
        settings = {
            "version": 1, "model": str(tiny_llama), "export": export,
            "passes": [{"round_to_nearest": {"scheme": "W4A16", "group_size": 32}}],
            "accept": [{"metric": "kl", "max": 10, "windows": 2, "tokens": 32}],
        }  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
        recipe = Recipe.load(tmp_path / "recipe.yaml")
        return build(recipe, tmp_path / "it", cache=tmp_path / "cache", progress=Silent(), force=True)

    return run


def test_one_build_may_have_both_flavors(make, tmp_path: Path) -> None:
    manifest = make([{"onnx": {"target": "cpu"}}, {"onnx": {"flavor": "genai"}}])
    assert [engine.path for engine in manifest.engines] == ["engine/model.onnx"]
    (entry,) = manifest.checkpoints
    assert (entry.path, entry.format) == ("genai", "genai")
    assert {"genai/model.onnx", "genai/model.onnx.data", "genai/genai_config.json"} <= manifest.files.keys()
    assert "genai" in manifest.graph_passes


def test_a_build_with_genai_alone_is_judged_and_not_served(make, tmp_path: Path) -> None:
    manifest = make([{"onnx": {"flavor": "genai"}}])
    assert manifest.verdict.status == "accepted"
    with pytest.raises(InputError, match="no engine"):
        open_build(tmp_path / "it", slots=1)


@pytest.mark.real_model
def test_smollm2_is_continued_as_our_engine_does(smollm2: Model, tmp_path: Path) -> None:
    model = RoundToNearest(scheme="W8A8").run(smollm2, PassContext())
    Onnx(flavor="genai", capacity=CAPACITY).export(model, tmp_path / "build", PassContext(verify="none"))
    ids = og.Tokenizer(og.Model(str(tmp_path / "build/genai"))).encode("The capital of France is")
    found = generated(tmp_path / "build/genai", [list(map(int, ids))], 16)[0]
    assert found == _own_engine(model, tmp_path / "own")(list(map(int, ids)), len(found))
