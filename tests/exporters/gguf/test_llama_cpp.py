"""GGUF files in their real loader: llama.cpp tokenizes and computes as our own execution does.

llama-cpp-python is compiled for this, which takes minutes, so these tests run only when asked for:
``LLMOPT_LLAMA_CPP=1 pytest -m llama_cpp``. The environment is kept in ``out/bench/loaders/llama_cpp``.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from llmopt.benchmarks.loaders.programs import LOADERS
from llmopt.benchmarks.peer import installed, run_script
from llmopt.calibration.reference import Reference
from llmopt.exporters.gguf.exporter import Gguf
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.model import Model
from llmopt.optimizer.sources import load_model
from llmopt.passes.round_to_nearest import RoundToNearest

pytestmark = [
    pytest.mark.llama_cpp,
    pytest.mark.skipif(os.environ.get("LLMOPT_LLAMA_CPP") != "1", reason="compiles llama.cpp: LLMOPT_LLAMA_CPP=1"),
]

IDS = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))
TEXTS = [
    "The capital of France is Paris.",
    "12345, 3.14 <|im_start|>user\nhi",
    "  spaces   and\n\nnewlines\t tabs",
    "über 東京",
]

# Families whose patterns llama.cpp has in its source, as it has them.
PATTERNS: dict[str, dict[str, Any]] = {
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "gemma2": {"num_hidden_layers": 2, "query_pre_attn_scalar": 16},
    "gemma3": {
        "num_hidden_layers": 6,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
    "mistral": {"sliding_window": None},
}


@pytest.fixture(scope="session")
def python() -> Path:
    folder = Path("out/bench/loaders")
    folder.mkdir(parents=True, exist_ok=True)
    return installed(LOADERS["llama_cpp"], folder / "llama_cpp")


@pytest.fixture
def loaded(python: Path, tmp_path: Path) -> Callable[..., tuple[torch.Tensor, list[list[int]]]]:
    """Logits of ``IDS`` and tokens of ``TEXTS``, from the GGUF file of a model."""

    def load(model: Model, **options: Any) -> tuple[torch.Tensor, list[list[int]]]:
        exporter = Gguf(**options)
        exporter.check(model)
        exporter.write(model, tmp_path / "gguf", PassContext())
        np.save(tmp_path / "ids.npy", IDS.numpy())
        given = {"path": str(tmp_path / "gguf"), "ids": str(tmp_path / "ids.npy"), "texts": TEXTS}
        finished = run_script(python, LOADERS["llama_cpp"], given, output=tmp_path / "logits.npy", threads=1)
        return torch.from_numpy(np.load(tmp_path / "logits.npy")), json.loads(finished.output)

    return load


@pytest.mark.parametrize(
    "name",
    [
        "llama", "llama-linear-rope", "llama-llama3-rope", "llama-yarn-rope", "mistral", "qwen2", "qwen3", "smollm3",
        "granite", "gemma2", "gemma3", "phi3", "olmo2",
    ],
)  # fmt: skip
def test_every_family_computes_and_tokenizes_alike(name, loaded, config_of, tmp_path: Path) -> None:
    model = load_model(str(config_of(name, **PATTERNS.get(name, {}))), cache=tmp_path / "cache")
    logits, tokens = loaded(model, type="F32")
    # Both compute in float32; Gelu is a table of float16 in llama.cpp.
    limit = 5e-3 if name.startswith("gemma") else 1e-4
    assert (logits - Reference(model).logits(IDS)).abs().max() < limit
    tokenizer = Tokenizer.from_file(str(model.source.tokenizer_dir / "tokenizer.json"))
    assert tokens == [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]


@pytest.fixture
def config_of(tmp_path: Path, save_changed) -> Callable[..., Path]:
    """A family's checkpoint in a folder whose name says nothing: llama.cpp takes Phi-3 by the name."""
    return lambda name, **changes: save_changed(tmp_path / "it", name, **changes)


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A16"])
def test_transcribed_integers_lose_what_llama_cpps_own_rounding_of_inputs_loses(scheme, loaded, tiny_llama, tmp_path):
    model = load_model(str(tiny_llama), cache=tmp_path / "cache")
    made = RoundToNearest(scheme=scheme, group_size=32).run(model, PassContext())
    logits, _ = loaded(made, type="F32")
    ours, source = Reference(made).logits(IDS), Reference(model).logits(IDS)
    # Inputs are rounded to 8 bits for each 32 columns there, which is little beside what 4 bits lose.
    assert (logits - ours).square().mean() < (0.1 if scheme != "W8A16" else 2) * (ours - source).square().mean()
    assert (logits.argmax(-1) == ours.argmax(-1)).float().mean() > 0.9


@pytest.mark.real_model
def test_smollm2_is_tokenized_and_continued_alike(smollm2: Model, loaded) -> None:
    logits, tokens = loaded(smollm2, type="F16")
    ours = Reference(smollm2).logits(IDS)
    assert (logits.argmax(-1) == ours.argmax(-1)).float().mean() > 0.95
    tokenizer = Tokenizer.from_file(str(smollm2.source.tokenizer_dir / "tokenizer.json"))
    assert tokens == [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
