"""PEFT's merged model against an engine of ours, on a tiny model."""

from pathlib import Path

import pytest
import torch

from llmopt.benchmarks.adapters.peft_model import distances, merged_by_peft
from llmopt.exporters.onnx.exporter import Onnx
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.model import Model
from llmopt.optimizer.sources import load_model
from llmopt.passes.merge_lora import MergeLora
from llmopt.runtime.backends.base import Backend
from llmopt.runtime.backends.onnxruntime import open_backend

IDS = torch.arange(2 * 24).reshape(2, 24) * 7 % 500


@pytest.fixture
def engine_of(tmp_path: Path):
    def make(model: Model, name: str) -> Backend:
        engine, _ = Onnx(capacity=32).export(model, tmp_path / name, PassContext(verify="none"))
        return open_backend(tmp_path / name, engine, slots=1, capacity=32, threads=1)

    return make


def test_a_merged_engine_is_pefts_model_and_the_base_is_not(engine_of, adapter_of, tiny_llama, tmp_path) -> None:
    adapter_of(tmp_path / "a", tiny_llama, target_modules=["q_proj", "down_proj"])
    base = load_model(str(tiny_llama), cache=tmp_path / "cache")
    merged = MergeLora(adapters=[{"path": str(tmp_path / "a")}]).run(base, PassContext())
    backends = [engine_of(merged, "merged"), engine_of(base, "base")]
    same, other = distances(merged_by_peft(tiny_llama, tmp_path / "a"), backends, IDS)
    # float32, three layers: the same tolerance as for the families' parity with transformers
    assert same.largest < 1e-4 < 1e-2 < other.largest
    assert (same.positions, same.targets, same.agreements) == (48, 46, 48)
    assert same.perplexities[0] == pytest.approx(same.perplexities[1], rel=1e-5)
