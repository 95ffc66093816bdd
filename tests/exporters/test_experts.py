"""Whole models with mixtures of experts: quantized and lowered they are what torch computes, in any company."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmopt.exporters.onnx.exporter import Onnx
from llmopt.exporters.onnx.lowering import finished, stages
from llmopt.exporters.onnx.verify import verify_lowering
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.decoder import Experts
from llmopt.optimizer.model import Model, QuantWeight
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.target import TARGETS
from llmopt.passes.round_to_nearest import RoundToNearest
from llmopt.runtime.backends.onnxruntime import OnnxRuntimeBackend, open_backend

CAPACITY = 48
CPU = TARGETS["cpu"]

MIXED = {"scheme": "W8A8", "experts": {"weights": {"num_bits": 4, "strategy": "channel"}}}
"""Other linears round their activations."""

CASES = [
    ("mixtral", {"scheme": "W8A16"}),
    ("mixtral", {"scheme": "W4A16", "group_size": 32}),
    ("qwen3_moe", MIXED),
    ("qwen3_moe", {"scheme": "W8A16", "group_size": 16}),
    ("qwen3_moe-not-normalized", {"scheme": "W4A16_ASYM", "group_size": 16}),
]
by_case = pytest.mark.parametrize(("family", "options"), CASES)


@pytest.fixture(scope="module")
def model_of(
    family_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Mapping[str, Any] | None], Model]:
    """A family's tiny model, quantized where options of ``round_to_nearest`` are given."""
    directory = tmp_path_factory.mktemp("cache")

    @cache
    def loaded(family: str) -> Model:
        return load_model(str(family_of(family)), cache=directory)

    def make(family: str, options: Mapping[str, Any] | None = None) -> Model:
        if options is None:
            return loaded(family)
        quantizer = RoundToNearest(**options)
        quantizer.requires(loaded(family))
        return quantizer.run(loaded(family), PassContext())

    return make


@pytest.fixture
def backend_of(tmp_path: Path) -> Callable[[Model], OnnxRuntimeBackend]:
    """The lowered engine with a pool of four slots, on two threads."""

    def make(model: Model) -> OnnxRuntimeBackend:
        engine, _ = Onnx(capacity=CAPACITY).export(model, tmp_path, PassContext(verify="none"))
        return open_backend(tmp_path, engine, slots=4, capacity=CAPACITY, threads=2)

    return make


def ids(count: int) -> np.ndarray:
    return np.random.default_rng(5).integers(3, 512, count)


@by_case
def test_every_layer_is_lowered_exactly(model_of, family: str, options: Mapping[str, Any]) -> None:
    """Up to what the kernels round; a layer without experts is among them."""
    model = model_of(family, options)
    found = verify_lowering(model, CPU, level="full", seed=0)
    assert len(found) == model.num_layers
    assert max(found[layer]["all"] for layer in found) < 1e-5
    assert sum("lower_experts" in found[layer] for layer in found) == _mixtures(model)


@by_case
def test_all_experts_of_a_layer_are_one_operator(model_of, family: str, options: Mapping[str, Any]) -> None:
    model = model_of(family, options)
    experts = [model.weights[f"{name}.weight"] for name in model.decoder.expert_linears]
    assert experts
    assert all(isinstance(weight, QuantWeight) for weight in experts)
    graph, records = finished(stages(model, CPU, capacity=CAPACITY))
    assert sum(node.op_type == "QMoE" for node in graph.graph) == _mixtures(model)
    assert [fallback for record in records for fallback in record.fallbacks] == []


@pytest.mark.parametrize(("family", "options"), [("mixtral", None), ("qwen3_moe", None), *CASES])
def test_a_sequence_gets_the_same_bits_in_any_company(model_of, backend_of, family: str, options: Any) -> None:
    backend = backend_of(model_of(family, options))
    prompts = [ids(30)[first : first + length] for first, length in ((0, 11), (3, 7), (9, 20))]
    steps = ids(15).reshape(5, 3)

    def generated(sequences: list[int]) -> np.ndarray:
        """Logits ``[calls, sequences, vocab]`` with the sequences in the first slots."""
        lengths = np.array([len(prompts[i]) for i in sequences])
        prefilled = [
            backend.prefill(slot, prompts[i], 0, lengths[slot : slot + 1] - 1).copy()
            for slot, i in enumerate(sequences)
        ]
        decoded = [backend.decode(tokens[sequences], lengths + step).copy() for step, tokens in enumerate(steps)]
        return np.stack([np.concatenate(prefilled), *decoded])

    together = generated([0, 1, 2])
    for i in range(3):
        np.testing.assert_array_equal(generated([i])[:, 0], together[:, i])


def _mixtures(model: Model) -> int:
    """Layers with experts."""
    return sum(isinstance(layer.mlp, Experts) for layer in model.decoder.layers)
