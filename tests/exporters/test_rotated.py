"""Engines of rotated models: the logits from before the rotation, and integer kernels behind online rotations."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch

from llmopt.calibration.reference import Reference
from llmopt.exporters.onnx.exporter import Onnx
from llmopt.optimizer.contents import sizes_of
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.sources import load_model
from llmopt.passes.rotate import Rotate
from llmopt.passes.round_to_nearest import RoundToNearest
from llmopt.runtime.backends.onnxruntime import open_backend

TOLERANCE = 1e-4
"""As in test_family_parity.py: largest difference of logits over the largest logit."""

ONLINE = {"down_proj": 16}
OPTIONS = {
    "qwen2": {"online": ONLINE},
    "granite": {"online": ONLINE},
    "phi3": {"online": ONLINE},
    "gpt2": {"online": ONLINE},
    "falcon": {"online": ONLINE},
    "gpt_neox-in-sequence": {"online": ONLINE},
    "opt": {"online": ONLINE},
    "gemma2": {"residual": False, "online": ONLINE},
    "opt-350m": {"residual": False, "online": ONLINE},
    "mixtral": {},
}


@pytest.fixture
def rotated(family_of, tmp_path):
    """Makes (a family's model, the rotated one)."""

    def make(name):
        model = load_model(str(family_of(name)), cache=tmp_path / "cache")
        return model, Rotate(**OPTIONS[name]).run(model, PassContext())

    return make


def exported(model, directory, context):
    directory.mkdir()
    engine, records = Onnx(capacity=32).export(model, directory, context)
    return engine, records


@pytest.mark.parametrize("name", OPTIONS)
def test_the_engine_of_a_rotated_model_computes_what_the_model_did(name, rotated, tmp_path):
    model, after = rotated(name)
    engine, _ = exported(after, tmp_path / "build", PassContext(verify="quick"))
    backend = open_backend(tmp_path / "build", engine, slots=2, capacity=32, threads=1)
    ids = np.random.default_rng(0).integers(3, 500, 20)
    expected = Reference(model).logits(torch.from_numpy(ids)[None])[0].numpy()
    pieces = [backend.prefill(0, ids[:9], 0, np.arange(9)), backend.prefill(0, ids[9:], 9, np.arange(11))]
    found = np.concatenate(pieces)
    assert np.abs(found - expected).max() / np.abs(expected).max() < TOLERANCE


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "phi3"])
def test_linears_behind_an_online_rotation_run_on_integer_kernels(name, rotated, tmp_path):
    _, after = rotated(name)
    quantized = RoundToNearest(scheme="W8A8").run(after, PassContext())
    fallbacks = []
    exported(quantized, tmp_path / "build", PassContext(verify="quick", fallback=fallbacks.append))
    graph = onnx.load(tmp_path / "build/engine/model.onnx", load_external_data=False).graph
    operators = Counter(node.op_type for node in graph.node)
    assert operators["MatMul"] == 3  # a rotation in each layer
    assert operators["DequantizeLinear"] == 0
    assert fallbacks == []
    rotations = [tensor.name for tensor in graph.initializer if "input_rotation" in tensor.name]
    assert len(rotations) == 1  # equal in all layers, stored once


def test_only_the_rows_that_need_logits_are_rotated_in_the_last_layer(rotated, tmp_path):
    _, after = rotated("qwen2")
    _, records = exported(after, tmp_path / "build", PassContext(verify="none"))
    select = next(record for record in records if record.name == "select_rows")
    plain = load_model(after.source.spec, cache=tmp_path / "cache")
    _, others = exported(plain, tmp_path / "plain", PassContext(verify="none"))
    without = next(record for record in others if record.name == "select_rows")
    assert select.details["applied"] == without.details["applied"] + 1


def test_the_sizes_of_a_rotated_model_have_its_rotations_and_its_untied_head(rotated):
    model, after = rotated("qwen2")
    sizes = sizes_of(after)
    assert set(sizes_of(model)) == {"embedding and head", "attention", "mlp", "other"}
    assert set(sizes) == {"embedding", "attention", "mlp", "head", "other"}
    assert sizes["mlp"]["float32"] == sizes_of(model)["mlp"]["float32"] + 3 * 16 * 16 * 4
