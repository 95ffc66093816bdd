"""Tiny Llamas for weight passes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.optimizer.model import Model
from llmopt.optimizer.sources import load_model


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
