"""The recipe of all-MiniLM-L6-v2, built as a user would, against the model in torch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from llmopt.evaluation.vectors import cosines
from llmopt.exporters.onnx.exporter import Onnx
from llmopt.optimizer.build import build
from llmopt.optimizer.cache import cache_root
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.progress import Silent
from llmopt.optimizer.recipe import Recipe
from llmopt.optimizer.sources import load_model, locate
from llmopt.runtime.backends.encoder import open_encoder_backend
from llmopt.runtime.encoder import Encoder

pytestmark = pytest.mark.real_model

RECIPES = Path(__file__).parents[2] / "recipes"
TEXTS = (RECIPES / "texts/sentences.txt").read_text("utf-8").splitlines()


@pytest.fixture(scope="module")
def expected(minilm_spec):
    """What transformers and plain mean pooling make of ``TEXTS``, one by one: float32 ``[n, 384]``, of length 1."""
    directory = locate(minilm_spec, cache=cache_root())
    network = AutoModel.from_pretrained(directory, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    vectors = []
    for text in TEXTS:
        with torch.no_grad():
            mean = network(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        vectors.append((mean / mean.norm()).numpy())
    return np.stack(vectors)


def test_the_float_engine_is_transformers(minilm_spec, expected, tmp_path):
    model = load_model(minilm_spec, cache=cache_root())
    engine, _ = Onnx().export(model, tmp_path, PassContext(verify="none"))
    assert (engine.capacity, engine.pooling, engine.normalize, engine.hidden_size) == (256, "mean", True, 384)
    backend = open_encoder_backend(tmp_path, engine, threads=2)
    tokenizer = AutoTokenizer.from_pretrained(model.source.tokenizer_dir)
    found = backend.vectors([tokenizer(text).input_ids for text in TEXTS])
    assert np.abs(found - expected).max() < 1e-6  # sums of 1,536 products in float32, on numbers below 0.3


def test_the_recipe_keeps_its_promise(expected, tmp_path):
    recipe = Recipe.load(RECIPES / "all-minilm-l6-v2-int8.yaml")
    manifest = build(recipe, tmp_path / "build", cache=cache_root(), progress=Silent())
    assert manifest.verdict.status == "accepted"
    assert sum(layer.scheme == "W8A8" for layer in manifest.layers) == 33
    similarity = cosines(expected, Encoder(tmp_path / "build", threads=2).encode(TEXTS))
    assert similarity.min() > 0.995
    measured = {each.metric: each.value for each in manifest.measurements}
    # Torch's batches and ours are padded differently: an activation on the border may round the other way.
    assert abs(similarity.mean() - measured["cosine"]) < 1e-4
