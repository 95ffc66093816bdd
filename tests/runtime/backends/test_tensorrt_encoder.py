"""The TensorRT executor of encoders on the paper GPU: its calls, its buffers, and what it refuses."""

import sys

import numpy as np
import pytest

from llmopt.optimizer.errors import InputError, MissingExtraError, UnsupportedError
from llmopt.runtime.backends import tensorrt_encoder
from llmopt.runtime.backends.base import ExecutionError


@pytest.fixture
def encoder_of(paper_gpu, tmp_path, monkeypatch):
    """Opens a compiled encoder: ``backend, fake engine, device``."""

    def make(**changes):
        engine, device, package = paper_gpu.compiled_encoder(**changes), paper_gpu.Device(), paper_gpu.tensorrt()
        package.loads = paper_gpu.Encoder(engine, device)
        monkeypatch.setattr(tensorrt_encoder, "open_device", lambda: device)
        monkeypatch.setattr("importlib.import_module", lambda name: package)
        (tmp_path / "tensorrt").mkdir(exist_ok=True)
        (tmp_path / "tensorrt/sm89.engine").write_bytes(b"for this one")
        return tensorrt_encoder.open_encoder_backend(tmp_path, engine), package.loads, device

    return make


def test_vectors_are_those_of_the_texts_in_their_order_and_padding_counts_nothing(encoder_of):
    backend, _, _ = encoder_of()
    texts = [[1, 2, 3], [5], [7, 7, 7, 7, 7, 7, 7, 7], [10, 20], [4]]
    expected = [[sum(text) * column for column in (1, 2, 3, 4)] for text in texts]
    found = backend.vectors(texts)
    assert found.dtype == np.float32
    assert found.tolist() == expected


def test_a_call_has_no_more_texts_than_were_compiled_for(encoder_of):
    backend, loaded, _ = encoder_of(slots=2)
    backend.vectors([[1]] * 5, batch=32)
    assert sorted(shape for _, shape in loaded.runs) == [(1, 1), (2, 1), (2, 1)]


def test_a_call_may_be_as_large_as_was_compiled_for(encoder_of):
    backend, loaded, _ = encoder_of(slots=3, capacity=8)
    backend.vectors([[1] * 8] * 3)
    assert [shape for _, shape in loaded.runs] == [(3, 8)]


def test_inputs_go_up_one_by_one_and_the_vectors_come_back_once(encoder_of):
    backend, _, device = encoder_of()
    device.calls.clear()
    backend.vectors([[1, 2]])
    assert device.calls == ["upload", "upload", "run", "download", "wait"]


def test_what_a_caller_has_is_not_written_again(encoder_of):
    backend, _, _ = encoder_of()
    first = backend.vectors([[1]])
    backend.vectors([[50]])
    assert first[0, 0] == 1


def test_a_text_longer_than_was_compiled_for_is_refused(encoder_of):
    with pytest.raises(InputError, match="a text has 9 tokens, the engine takes 1 to 8"):
        encoder_of(capacity=8)[0].vectors([[1] * 9])


def test_a_failing_run_is_an_execution_error_and_the_next_one_works(encoder_of):
    backend, loaded, _ = encoder_of()
    loaded.fails = True
    with pytest.raises(ExecutionError, match="TensorRT could not run"):
        backend.vectors([[1]])
    loaded.fails = False
    assert backend.vectors([[1]])[0, 0] == 1


def test_a_file_of_another_engine_is_refused(encoder_of, paper_gpu, monkeypatch):
    monkeypatch.setattr(paper_gpu.Encoder, "get_tensor_name", lambda self, index: f"tensor.{index}")
    with pytest.raises(UnsupportedError, match="the engine and its manifest disagree about"):
        encoder_of()


def test_a_missing_cuda_python_names_the_extra(paper_gpu, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingExtraError, match="cuda-python is not installed"):
        tensorrt_encoder.open_encoder_backend(tmp_path, paper_gpu.compiled_encoder())
