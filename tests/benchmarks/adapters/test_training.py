"""The training of the demo's adapter, on a tiny model."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmopt.benchmarks.adapters.tickets import trained_on
from llmopt.benchmarks.adapters.training import Training, packed, require_peft, train
from llmopt.optimizer.errors import InputError, MissingExtraError
from llmopt.optimizer.lora.adapter import read_adapter
from llmopt.optimizer.sources import load_model


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.arange(4 * 24).reshape(4, 24) % 97


def test_a_trained_adapter_fits_its_base_and_has_learned(tiny_llama: Path, windows, tmp_path: Path) -> None:
    losses: list[float] = []
    settings = Training(rank=4, steps=12, rate=2e-2)
    train(tiny_llama, windows, tmp_path / "a", settings, base="tiny", progress=lambda step, loss: losses.append(loss))
    assert len(losses) == settings.steps
    assert losses[-1] < losses[0] - 0.1
    adapter = read_adapter(tmp_path / "a", load_model(str(tiny_llama), cache=tmp_path))
    assert adapter.config.base_model_name_or_path == "tiny"
    assert len(adapter.changes) == 3 * 7


def test_training_twice_gives_the_same_adapter(tiny_llama: Path, windows, tmp_path: Path) -> None:
    for name in ("first", "second"):
        torch.rand(3)  # what was drawn before does not matter
        train(tiny_llama, windows, tmp_path / name, Training(rank=2, steps=3), base="tiny")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(values, second[name]) for name, values in first.items())


def test_windows_begin_with_a_conversation(tiny_llama: Path) -> None:
    found = packed(trained_on(20), tiny_llama, tokens=64)
    assert found.shape[1] == 64
    assert len(found) > 1
    assert len({tuple(window[:4].tolist()) for window in found}) == 1


def test_too_little_text_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(InputError, match="1 conversations do not fill a window of 4096 tokens"):
        packed(trained_on(1), tiny_llama, tokens=4096)


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="peft is not installed") as raised:
        require_peft()
    assert raised.value.hint == "pip install 'llmopt[dev]'"
