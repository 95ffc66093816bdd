"""Engines made of the reference execution, so that metrics are tested without exporting anything."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from llmopt.calibration.reference import Reference
from llmopt.optimizer.manifest import Engine
from llmopt.optimizer.model import Model
from llmopt.optimizer.tokens import Tokens


class ReferenceBackend:
    """A ``Backend`` that runs a model in torch, the whole sequence again for every chunk.

    Args:
        model: What to run.
        change: Applied to the logits, float32 ``[rows, vocab]``, before they are returned.
        max_chunk: The engine's.
    """

    def __init__(
        self,
        model: Model,
        change: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
        *,
        capacity: int = 64,
        max_chunk: int = 16,
    ) -> None:
        self.slots = 1
        self.capacity = capacity
        self.engine = Engine(
            exporter="onnx", target="cpu", path="none", inputs=[], outputs=[], num_layers=3, kv_heads=2, head_dim=12,
            kv_dtype="float32", vocab_size=int(model.config["vocab_size"]), capacity=capacity, max_chunk=max_chunk,
            min_chunk=2,
        )  # fmt: skip
        self.chunks: list[tuple[int, int]] = []
        self._reference = Reference(model)
        self._change = change
        self._held: list[int] = []

    def prefill(self, slot, ids, start, rows):
        assert slot == 0
        assert start == len(self._held)
        assert 0 < len(ids) <= self.engine.max_chunk
        self.chunks.append((start, len(ids)))
        self._held += ids.tolist()
        logits = self._reference.logits(torch.tensor([self._held]))[0, start:][torch.from_numpy(rows)]
        return np.ascontiguousarray(self._change(logits).numpy())

    def decode(self, ids, lengths):
        raise AssertionError("a measurement reads whole texts")

    def copy_prefix(self, source, destination, length):
        raise AssertionError("a measurement copies nothing")

    def drop(self, slot):
        self._held = []


@pytest.fixture(scope="session")
def backend_of() -> type[ReferenceBackend]:
    """The class ``ReferenceBackend``."""
    return ReferenceBackend


@pytest.fixture
def text() -> Tokens:
    """Three windows of 41 tokens."""
    ids = torch.randint(0, 512, (3, 41), generator=torch.Generator().manual_seed(3))
    return Tokens(name="some.txt", ids=ids, digest="d" * 64)


@pytest.fixture
def tiny_model(tiny_llama: Path, tmp_path: Path) -> Model:
    """``tiny_llama``, loaded."""
    from llmopt.optimizer.sources import load_model

    return load_model(str(tiny_llama), cache=tmp_path / "cache")
