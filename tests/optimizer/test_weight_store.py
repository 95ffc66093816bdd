"""Weights between two passes: what is read back is what was kept, and a full disk is told as such."""

import errno
import resource
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from llmopt.optimizer import weight_store
from llmopt.optimizer.model import DenseWeight, QuantWeight
from llmopt.optimizer.rounding import quantize
from llmopt.optimizer.scheme import PRESETS
from llmopt.optimizer.weight_store import WeightStore, read_weights


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    return WeightStore(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_floats_come_back_bit_for_bit(store: WeightStore, tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = random(5, 7).to(dtype)
    kept = store.keep({"a": DenseWeight.of(tensor)})
    store.close()
    for found in (kept["a"], read_weights(tmp_path)["a"]):
        assert (found.shape, found.dtype) == ((5, 7), dtype)
        assert torch.equal(found.load(), tensor)


@pytest.mark.parametrize("name", ["W8A8", "W4A16", "W4A16_ASYM", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_integers_come_back_with_their_scheme(store: WeightStore, tmp_path: Path, name: str) -> None:
    scheme = PRESETS[name]
    expected = quantize(random(6, 128), scheme)
    kept = store.keep({"a": QuantWeight.of(expected, scheme)})
    store.close()
    for found in (kept["a"], read_weights(tmp_path)["a"]):
        assert isinstance(found, QuantWeight)
        assert found.scheme == scheme
        values, scale, zero = found.load()[:3]
        assert found.shape == tuple(values.shape)
        assert values.dtype == expected.values.dtype
        assert torch.equal(values.float(), expected.values.float())
        assert torch.equal(scale, expected.scale)
        assert (zero is None) == (expected.zero is None)
        assert torch.equal(found.dense(), expected.dense())


def test_a_scale_of_inputs_comes_back(store: WeightStore, tmp_path: Path) -> None:
    scheme = PRESETS["FP8"]
    tensors = quantize(random(6, 128), scheme)._replace(input_scale=torch.tensor([0.25]))
    kept = store.keep({"a": QuantWeight.of(tensors, scheme)})
    store.close()
    for found in (kept["a"], read_weights(tmp_path)["a"]):
        assert found.load().input_scale.tolist() == [0.25]
        assert torch.equal(found.dense(), tensors.dense())


def test_a_file_is_written_when_a_weight_is_kept(store: WeightStore, tmp_path: Path) -> None:
    store.keep({"a": DenseWeight.of(random(2, 2))})
    store.keep({"b": DenseWeight.of(random(2, 2)), "c": DenseWeight.of(random(3))})
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    store.close()
    assert list(read_weights(tmp_path)) == ["a", "b", "c"]


def test_a_view_is_stored_as_what_it_shows(store: WeightStore, tmp_path: Path) -> None:
    whole = random(6, 4)
    store.keep({"t": DenseWeight.of(whole.T), "top": DenseWeight.of(whole[:2]), "rest": DenseWeight.of(whole[2:])})
    store.close()
    found = read_weights(tmp_path)
    assert torch.equal(found["t"].dense(), whole.T)
    assert torch.equal(found["top"].dense(), whole[:2])
    assert torch.equal(found["rest"].dense(), whole[2:])


def test_one_tensor_may_be_kept_under_two_names(store: WeightStore, tmp_path: Path) -> None:
    tensor = random(4, 4)
    store.keep({"a": DenseWeight.of(tensor), "b": DenseWeight.of(tensor), "c": DenseWeight.of(tensor[:2])})
    store.close()
    found = read_weights(tmp_path)
    assert torch.equal(found["a"].dense(), tensor)
    assert torch.equal(found["b"].dense(), tensor)
    assert torch.equal(found["c"].dense(), tensor[:2])


def test_what_was_kept_last_counts(store: WeightStore, tmp_path: Path) -> None:
    first = store.keep({"a": DenseWeight.of(random(2, 2))})["a"]
    second = store.keep({"a": DenseWeight.of(torch.ones(3))})["a"]
    assert [store.holds("a", weight) for weight in (first, second)] == [False, True]
    assert not store.holds("b", second)
    store.close()
    assert torch.equal(read_weights(tmp_path)["a"].dense(), torch.ones(3))


def test_a_file_that_cannot_grow_is_an_error_of_the_system(store: WeightStore, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            store.keep({"a": DenseWeight.of(random(100, 100))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path / "00000.safetensors")


@pytest.mark.parametrize(
    ("said", "raised"),
    [("I/O error: No space left on device (os error 28)", OSError), ("InvalidHeader", SafetensorError)],
)
def test_errors_of_the_system_are_told_from_those_of_the_library(
    store: WeightStore, said: str, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise SafetensorError(said)

    monkeypatch.setattr(weight_store, "save_file", fail)
    with pytest.raises(raised) as caught:
        store.keep({"a": DenseWeight.of(random(2, 2))})
    assert raised is SafetensorError or caught.value.errno == errno.ENOSPC
