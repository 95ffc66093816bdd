"""Tiny Llamas in every scheme, and engines of them, executed three ways."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from llmopt.calibration.reference import Reference
from llmopt.exporters.onnx.exporter import Onnx
from llmopt.exporters.onnx.lowering import finished, stages
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.model import Model
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.target import TARGETS
from llmopt.passes.round_to_nearest import RoundToNearest
from llmopt.runtime.backends.onnxruntime import OnnxRuntimeBackend, open_backend

CAPACITY = 32


class Engine:
    """A graph in ONNX Runtime with its caches in ordinary arrays, as the contract's inputs and outputs."""

    def __init__(self, graph: ir.Model, config: Mapping[str, Any], *, optimized: bool = True) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        if not optimized:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        data = ir.to_proto(graph).SerializeToString()
        self._session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self._config = config
        self._caches: dict[str, np.ndarray] = {}

    def start(self, count: int) -> None:
        """Empty caches for ``count`` sequences."""
        heads, width = self._config["num_key_value_heads"], self._config["head_dim"]
        names = [value.name for value in self._session.get_inputs() if value.name.startswith("past.")]
        self._caches = {name: np.zeros((count, heads, CAPACITY, width), np.float32) for name in names}

    def run(self, ids: np.ndarray, lengths: Sequence[int], rows: Sequence[int] | None = None) -> np.ndarray:
        """Logits of ``rows``, by default all, float32 ``[rows, vocab]``; the caches are kept for the next call."""
        wanted = np.arange(ids.size) if rows is None else np.array(rows)
        feeds = {"input_ids": ids, "past_lengths": np.array(lengths), "logit_rows": wanted} | self._caches
        presents = [name.replace("past", "present") for name in self._caches]
        logits, *caches = self._session.run(["logits", *presents], feeds)
        self._caches = dict(zip(self._caches, caches, strict=True))
        return logits

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Of a batch without a past, float32 ``[n, t, vocab]``."""
        self.start(len(ids))
        return self.run(ids, [0] * len(ids)).reshape(*ids.shape, -1)


@pytest.fixture(scope="session")
def engine_of() -> type[Engine]:
    """The class ``Engine``."""
    return Engine


@pytest.fixture(scope="session")
def model_of(llama_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """``model_of(scheme=None, options={}, **changes)``: a tiny Llama, quantized when ``scheme`` is given.

    Options are those of ``round_to_nearest``; other keywords change the config.
    """
    directory = tmp_path_factory.mktemp("cache")

    @cache
    def loaded(changes: str) -> Model:
        return load_model(str(llama_of(**json.loads(changes))), cache=directory)

    @cache
    def quantized(changes: str, options: str) -> Model:
        one = RoundToNearest(**json.loads(options))
        one.requires(loaded(changes))
        return one.run(loaded(changes), PassContext())

    def make(scheme: str | None = None, options: Mapping[str, Any] | None = None, **changes: Any) -> Model:
        changed = json.dumps({"num_hidden_layers": 2} | changes, sort_keys=True)
        if scheme is None:
            return loaded(changed)
        return quantized(changed, json.dumps({"scheme": scheme} | dict(options or {})))

    return make


@pytest.fixture(scope="session")
def lowered_of() -> Callable[..., ir.Model]:
    """The graph that the target cpu executes, made once for each model."""
    made: dict[int, tuple[Model, ir.Model]] = {}  # the model is held, so that its id stays its own

    def lowered(model: Model) -> ir.Model:
        if id(model) not in made:
            made[id(model)] = model, finished(stages(model, TARGETS["cpu"], capacity=CAPACITY))[0]
        return made[id(model)][1]

    return lowered


@pytest.fixture(scope="session")
def reference_logits() -> Callable[..., np.ndarray]:
    """Logits that torch computes of the same ``Model``, float32 ``[n, t, vocab]``."""

    def logits(model: Model, ids: np.ndarray) -> np.ndarray:
        return Reference(model, threads=1).logits(torch.from_numpy(ids)).numpy()

    return logits


@pytest.fixture(scope="session")
def row_error() -> Callable[..., np.ndarray]:
    """Of each row of logits ``rms(difference) / std(expected)``, as exporters/onnx/verify.py measures."""

    def errors(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
        rms = np.sqrt(((found - expected).astype(np.float64) ** 2).mean(-1))
        return rms / expected.std(-1)

    return errors


@pytest.fixture(scope="session")
def backend_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., OnnxRuntimeBackend]:
    """Exports a model and opens it with a pool of four slots bound in place; once for each model."""
    made: dict[int, tuple[Model, OnnxRuntimeBackend]] = {}

    def make(model: Model) -> OnnxRuntimeBackend:
        if id(model) not in made:
            directory = tmp_path_factory.mktemp("build")
            engine, _ = Onnx(capacity=CAPACITY).export(model, directory, PassContext(verify="none"))
            made[id(model)] = model, open_backend(directory, engine, slots=4, capacity=CAPACITY, threads=1)
        return made[id(model)][1]

    return make


@pytest.fixture
def ids() -> np.ndarray:
    """Three sequences of twelve tokens."""
    return np.random.default_rng(5).integers(3, 512, (3, 12))
