"""Tiny Llamas for weight passes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmopt.calibration.reference import Reference
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.model import Model
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.tokens import Tokens


@pytest.fixture(scope="session")
def float_model_of(llama_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """A tiny Llama, loaded; keywords change its config."""
    cache = tmp_path_factory.mktemp("cache")
    loaded: dict[str, Model] = {}

    def make(**changes: Any) -> Model:
        key = repr(sorted(changes.items()))
        if key not in loaded:
            loaded[key] = load_model(str(llama_of(**changes)), cache=cache)
        return loaded[key]

    return make


@pytest.fixture
def model_of(family_of: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Model]:
    """A tiny model of a family, loaded."""
    return lambda name: load_model(str(family_of(name)), cache=tmp_path)


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> tuple[PassContext, dict[str, Any]]:
    """What a pass that calibrates is handed, computing in float32, and the details it records."""
    monkeypatch.setattr("llmopt.calibration.layerwise.fast_dtype", lambda: torch.float32)
    ids = torch.randint(3, 101, (48, 24), generator=torch.Generator().manual_seed(0))
    tokens = Tokens(name="it", ids=ids, digest="0")
    details: dict[str, Any] = {}
    return PassContext(calibration=lambda: tokens, detail=details.__setitem__), details


@pytest.fixture
def distance() -> Callable[[Model, Model], float]:
    """KL divergence of a model's predictions from another's on text that ``context`` does not calibrate on."""
    ids = torch.randint(3, 101, (8, 24), generator=torch.Generator().manual_seed(1))

    def between(model: Model, quantized: Model) -> float:
        source, found = (Reference(each).logits(ids).log_softmax(-1) for each in (model, quantized))
        return float((source.exp() * (source - found)).sum(-1).mean())

    return between
