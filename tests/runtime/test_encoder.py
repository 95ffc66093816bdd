"""Vectors of texts out of a build: one text or many, cut or refused, behind a prompt, without the compiler."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmopt.optimizer.build import build
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.progress import Silent
from llmopt.optimizer.recipe import Recipe
from llmopt.runtime.encoder import Encoder

TEXTS = [
    "The river comes down.",
    "Rome",
    "A fox, a clock, and an old newspaper.",
    "The people of the first town are millers.",
]
GATE = "{metric: cosine, min: 0.9, data: texts.txt, windows: 4, tokens: 30}"


def built_from(model: Path, folder: Path, gates: str = GATE) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    lines = ["version: 1", f"model: {model}", "passes: []", "export: [onnx]", f"accept: [{gates}]"]
    (folder / "recipe.yaml").write_text("\n".join(lines), encoding="utf-8")
    build(Recipe.load(folder / "recipe.yaml"), folder / "build", cache=folder / "cache", progress=Silent())
    return folder / "build"


@pytest.fixture(scope="module")
def checkpoint(encoder_of):
    return encoder_of("bert", num_hidden_layers=1, pooling="pooling_mode_mean_tokens")


@pytest.fixture(scope="module")
def built(checkpoint, tmp_path_factory):
    return built_from(checkpoint, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def encoder(built):
    return Encoder(built, threads=1)


def test_a_text_and_a_list_of_one_are_the_same(encoder):
    assert np.array_equal(encoder.encode("a fox"), encoder.encode(["a fox"]))
    assert encoder.encode([]).shape == (0, encoder.dimensions)


def test_vectors_have_length_one(encoder):
    np.testing.assert_allclose(np.linalg.norm(encoder.encode(TEXTS), axis=1), 1, rtol=1e-5)


def test_long_texts_are_cut_or_refused(encoder):
    long = " ".join(3 * TEXTS)
    found = encoder.encode_counted(["short", long])
    assert (found.tokens[1], found.cut) == (64, [1])
    with pytest.raises(InputError, match="tokens, the model takes 64"):
        encoder.encode(["short", long], cut=False)


def test_an_unknown_prompt_is_refused(encoder):
    with pytest.raises(InputError, match="no prompt 'query'") as error:
        encoder.encode("a fox", prompt="query")
    assert error.value.hint == "its prompts: none"


def test_a_build_of_a_decoder_is_refused(tiny_llama, tmp_path):
    directory = built_from(tiny_llama, tmp_path / "llama", gates="{metric: kl, max: 1, windows: 1, tokens: 8}")
    with pytest.raises(InputError, match="is no build of an encoder"):
        Encoder(directory)


def test_no_library_of_the_compiler_is_needed(built):
    code = (
        "import sys; from llmopt.runtime.encoder import Encoder; Encoder(sys.argv[1], threads=1).encode('a');"
        "print([name for name in ('torch', 'transformers', 'onnx', 'onnxscript') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, built], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_prompts_stand_before_texts(checkpoint, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    (model / "config_sentence_transformers.json").write_text(
        '{"prompts": {"query": "find: ", "text": ""}, "default_prompt_name": "query"}', encoding="utf-8"
    )
    encoder = Encoder(built_from(model, tmp_path / "prompts"), threads=1)
    assert np.array_equal(encoder.encode("a fox"), encoder.encode("find: a fox", prompt="text"))
    assert not np.array_equal(encoder.encode("a fox"), encoder.encode("a fox", prompt="text"))
