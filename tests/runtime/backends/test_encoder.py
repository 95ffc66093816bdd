"""The executor of encoders: batches by length, padding, and what it refuses."""

import numpy as np
import pytest

from llmopt.exporters.onnx.exporter import Onnx
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.sources import load_model
from llmopt.runtime.backends.base import ExecutionError
from llmopt.runtime.backends.encoder import open_encoder_backend


@pytest.fixture(scope="module")
def built(encoder_of, tmp_path_factory):
    """A build directory and its engine's description."""
    directory = tmp_path_factory.mktemp("build")
    model = load_model(str(encoder_of("bert", num_hidden_layers=1)), cache=directory / "cache")
    return directory, Onnx().export(model, directory, PassContext(verify="none"))[0]


@pytest.fixture
def backend(built):
    directory, engine = built
    return open_encoder_backend(directory, engine, threads=1)


@pytest.fixture
def texts():
    generator = np.random.default_rng(0)
    return [generator.integers(3, 512, length).tolist() for length in (5, 1, 40, 12, 12, 3, 64)]


def calls_of(backend, monkeypatch):
    """The shapes of all calls from now on."""
    shapes = []
    right = backend._run

    def run(session, feeds):
        shapes.append(feeds["input_ids"].shape)
        return right(session, feeds)

    monkeypatch.setattr(backend, "_run", run)
    return shapes


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_vectors_come_in_the_order_of_the_texts(backend, texts, batch):
    found = backend.vectors(texts, batch=batch)
    alone = np.concatenate([backend.vectors([text]) for text in texts])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5)


def test_texts_of_about_equal_length_share_a_call(backend, texts, monkeypatch):
    shapes = calls_of(backend, monkeypatch)
    backend.vectors(texts, batch=3)
    assert shapes == [(1, 64), (3, 40), (3, 5)]


def test_a_call_has_no_more_tokens_than_a_cache_holds(backend, monkeypatch):
    shapes = calls_of(backend, monkeypatch)
    backend._call_tokens = 40
    backend.vectors([[5] * length for length in (4, 5, 5, 10, 10, 30, 64)], batch=3)
    assert shapes == [(1, 64), (1, 30), (2, 10), (3, 5)]


def test_texts_are_shared_among_threads(built, texts, monkeypatch):
    directory, engine = built
    both = open_encoder_backend(directory, engine, threads=2)
    shapes = calls_of(both, monkeypatch)
    expected = open_encoder_backend(directory, engine, threads=1).vectors([texts[0]] * 8)
    assert np.array_equal(both.vectors([texts[0]] * 8), expected)
    assert shapes == [(4, 5), (4, 5)]


def test_no_text_is_no_vector(backend):
    assert backend.vectors([]).shape == (0, 64)


def test_types_of_tokens_count(backend, texts):
    types = [[0] * (len(text) // 2) + [1] * (len(text) - len(text) // 2) for text in texts]
    assert np.abs(backend.vectors(texts, token_types=types) - backend.vectors(texts)).max() > 1e-3


@pytest.mark.parametrize(
    ("text", "said"),
    [([], "a text has 0 tokens"), ([5] * 65, "has 65 tokens, the engine takes 1 to 64"), ([512], "from 0 to 511")],
)
def test_what_the_engine_does_not_take_is_refused(backend, text, said):
    with pytest.raises(InputError, match=said):
        backend.vectors([text])


def test_a_run_that_fails_is_an_error_of_its_own(backend):
    feeds = {name: np.zeros((1, 2), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    with pytest.raises(ExecutionError, match="the engine failed"):
        backend._run(backend.session(1), feeds | {"attention_mask": np.zeros((1, 3), np.int64)})


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"features": ["telepathy"]}, "telepathy"), ({"target": "cuda"}, "not cuda")],
)
def test_an_engine_for_something_else_is_refused(built, changes, said):
    directory, engine = built
    with pytest.raises(UnsupportedError, match=said):
        open_encoder_backend(directory, engine.model_copy(update=changes), threads=1)
