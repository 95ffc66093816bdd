"""Cosine similarity of vectors, and what is measured of an encoder's engine."""

import numpy as np
import pytest
import torch

from llmopt.evaluation.vectors import cosines, measure_vectors
from llmopt.exporters.onnx.exporter import Onnx
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.tokens import Tokens
from llmopt.runtime.backends.encoder import open_encoder_backend


def test_a_cosine_is_that_of_each_pair_of_rows():
    first = np.array([[1, 0], [3, 4], [1, 1], [0, 0]], np.float32)
    second = np.array([[2, 0], [4, 3], [-1, -1], [1, 0]], np.float32)
    np.testing.assert_allclose(cosines(first, second), [1, 24 / 25, -1, 0], atol=1e-7)


@pytest.fixture
def measured(encoder_of, tmp_path):
    """A model, and the engine of the same or of a changed one."""
    model = load_model(str(encoder_of("bert", num_hidden_layers=1)), cache=tmp_path / "cache")

    def make(change=lambda model: model):
        engine, _ = Onnx(normalize=True).export(change(model), tmp_path / "build", PassContext(verify="none"))
        return model, open_encoder_backend(tmp_path / "build", engine, threads=1)

    return make


@pytest.fixture
def texts():
    ids = torch.randint(3, 512, (9, 12), generator=torch.Generator().manual_seed(0))
    return Tokens(name="texts.txt", ids=ids, digest="5" * 64, lengths=torch.arange(9) + 4)


def test_the_same_model_gives_the_same_vectors(measured, texts):
    seen = []
    model, backend = measured()
    mean, smallest = measure_vectors(model, backend, [texts], progress=lambda *step: seen.append(step))
    assert (mean.metric, smallest.metric) == ("cosine", "min_cosine")
    assert 1 - 1e-6 < smallest.value <= mean.value <= 1
    assert (mean.data, mean.data_digest, mean.tokens) == ("texts.txt", "5" * 64, 72)
    assert seen[-1] == (18, 18)


def test_another_model_is_told_apart(measured, texts):
    def change(model):
        name = "encoder.layer.0.output.LayerNorm.weight"
        shuffled = model.weights[name].load().flip(0)
        return model.with_weights({name: type(model.weights[name]).of(shuffled)})

    mean, smallest = measure_vectors(*measured(change), [texts])
    assert smallest.value < mean.value < 0.999


def test_without_a_text_there_is_nothing_to_measure(measured):
    with pytest.raises(InputError, match="nothing to measure on"):
        measure_vectors(*measured(), [])
