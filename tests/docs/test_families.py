"""The page about families: its worked example compiles, and computes what transformers does."""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmopt.exporters.onnx.exporter import Onnx
from llmopt.optimizer import arch as families
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.sources import load_model
from llmopt.runtime.backends.onnxruntime import open_backend

PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text("utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found[1]


@pytest.fixture
def checkpoint(tiny_llama: Path, tmp_path: Path) -> Path:
    """A random model of the page's config, with a tokenizer."""
    ((_, settings),) = YAML(typ="safe").load(block("yaml")).items()
    small = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = CONFIG_MAPPING[settings.pop("type")](**small, max_position_embeddings=64, **settings)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config)
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    network.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((tiny_llama / name).read_bytes())
    return tmp_path / "model"


def test_the_worked_example_is_all_that_a_family_needs(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("starcoder2")
    exec(compile(block("python"), "docs/families.md", "exec"), module.__dict__)
    known: Callable[[], list[object]] = families.known
    monkeypatch.setattr(families, "known", lambda: [*known(), module.ARCH])
    model = load_model(str(checkpoint), cache=tmp_path / "cache")
    (tmp_path / "build").mkdir()
    engine, _ = Onnx(capacity=32).export(model, tmp_path / "build", PassContext())
    backend = open_backend(tmp_path / "build", engine, slots=1, capacity=32, threads=1)
    ids = np.random.default_rng(0).integers(3, 512, 20)
    found = backend.prefill(0, ids, 0, np.arange(20))
    network = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    with torch.no_grad():
        expected = network(torch.from_numpy(ids[None])).logits[0].numpy()
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_every_architecture_is_on_the_page() -> None:
    assert [name for arch in families.known() for name in arch.models if f"`{name}`" not in PAGE] == []
