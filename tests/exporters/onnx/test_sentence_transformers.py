"""Engines of encoders in their other loader: sentence-transformers makes the same vectors with its ONNX backend.

It needs an older transformers, so it is installed in an environment of its own, which takes minutes; these tests run
only when asked for: ``LLMOPT_SENTENCE_TRANSFORMERS=1 pytest -m sentence_transformers``. The environment is kept in
``out/bench/loaders/sentence_transformers``.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from llmopt.benchmarks.loaders.programs import SENTENCE_TRANSFORMERS
from llmopt.benchmarks.peer import installed, run_script
from llmopt.optimizer.build import build
from llmopt.optimizer.progress import Silent
from llmopt.optimizer.recipe import Recipe
from llmopt.runtime.encoder import Encoder

pytestmark = [
    pytest.mark.sentence_transformers,
    pytest.mark.skipif(
        os.environ.get("LLMOPT_SENTENCE_TRANSFORMERS") != "1",
        reason="installs sentence-transformers: LLMOPT_SENTENCE_TRANSFORMERS=1",
    ),
]

TEXTS = ["The river comes down.", "Rome", "A fox, a clock, and an old newspaper.", "The first town are millers."]


@pytest.fixture(scope="session")
def python() -> Path:
    folder = Path("out/bench/loaders")
    folder.mkdir(parents=True, exist_ok=True)
    return installed(SENTENCE_TRANSFORMERS, folder / "sentence_transformers")


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet", "modernbert"])
@pytest.mark.parametrize("pooling", ["pooling_mode_mean_tokens", "pooling_mode_cls_token"])
def test_its_vectors_are_ours(name: str, pooling: str, python: Path, encoder_of, tmp_path: Path) -> None:
    source = encoder_of(name, num_hidden_layers=1, pooling=pooling)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    gate = "{metric: cosine, min: 0.9, data: texts.txt, windows: 4, tokens: 30}"
    lines = ["version: 1", f"model: {source}", "passes: []", "export: [onnx]", f"accept: [{gate}]"]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines), encoding="utf-8")
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    build(recipe, tmp_path / "it", cache=tmp_path / "cache", progress=Silent())
    given = {"path": str(tmp_path / "it/engine"), "texts": TEXTS}
    run_script(python, SENTENCE_TRANSFORMERS, given, output=tmp_path / "vectors.npy", threads=1)
    ours = Encoder(tmp_path / "it", threads=1).encode(TEXTS)
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), ours, rtol=0, atol=1e-5)
