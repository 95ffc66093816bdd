import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llmopt.benchmarks.quantizers.subject import TEXT, Subject, add_options, calibration_windows, prepare
from llmopt.optimizer.errors import InputError

SENTENCES = "The people of the town number {} build boats and mend nets, and the river comes down from the hills. "


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / TEXT).parent.mkdir(parents=True)
    (folder / TEXT).write_text("What is the capital of Italy ? It is @-@ Rome . " * 100)
    return folder


def subject(data: Path, model: Path, *options: str) -> Subject:
    parser = argparse.ArgumentParser()
    add_options(parser)
    chosen = parser.parse_args(["--model", str(model), "--out", str(data.parent / "out"), "--tokens", "64", *options])
    chosen.data = data
    return prepare(chosen)


def test_the_checkpoint_is_another_that_computes_the_same(data: Path, tiny_llama: Path) -> None:
    from llmopt.calibration.reference import Reference

    found = subject(data, tiny_llama, "--quick")
    kept = subject(data, tiny_llama, "--windows", "3", "--keep-grid")
    assert (found.text.ids.shape, found.samples, kept.text.ids.shape) == ((4, 64), 8, (3, 64))
    assert found.described == "4 windows of 64 tokens of wiki.valid.tokens"
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(found.model.weights[name].dense(), kept.model.weights[name].dense(), rtol=0.01)
    ids = torch.arange(24)[None]
    # Logits of a few units: float32 rounding of differently scaled weights.
    assert torch.allclose(Reference(found.model).logits(ids), Reference(kept.model).logits(ids), atol=1e-3)


def test_as_many_calibration_windows_are_taken_as_the_text_has(data: Path, tiny_llama: Path) -> None:
    found = subject(data, tiny_llama, "--quick", "--keep-grid")
    text, path = data / "c4.jsonl", data.parent / "windows.npy"
    text.write_text("".join(json.dumps({"text": SENTENCES.format(n)}) + "\n" for n in range(40)))
    assert calibration_windows(found, text, path, samples=3) == 3
    taken = calibration_windows(found, text, path, samples=10_000)
    assert 3 < taken < 10_000
    assert np.load(path).shape == (taken, 64)
    assert np.load(path).dtype == np.int64


def test_calibrating_on_the_judges_text_is_refused(data: Path, tiny_llama: Path) -> None:
    found = subject(data, tiny_llama, "--quick", "--keep-grid")
    text = data / "same.jsonl"
    text.write_text(json.dumps({"text": "What is the capital of Italy ? It is-Rome . " * 100}) + "\n")
    with pytest.raises(InputError, match=r"wiki\.valid\.tokens"):
        calibration_windows(found, text, data.parent / "windows.npy", samples=2)
