"""Rope tables against transformers' own rotary embedding, and the types that have no table."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llmopt.exporters.onnx.rope import SUPPORTED, check_rope, rope_tables
from llmopt.exporters.onnx.standard import standard_graph
from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.hf_config import complete

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "default, far": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, own factor": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "attention_factor": 0.7, "beta_fast": 16.0,
        "beta_slow": 2.0, "original_max_position_embeddings": 64,
    },
}  # fmt: skip
by_rope = pytest.mark.parametrize("parameters", ROPES.values(), ids=ROPES)


def config_of(parameters, **changes):
    settings = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return LlamaConfig(**(settings | changes), rope_parameters=dict(parameters)).to_dict()


@by_rope
@pytest.mark.parametrize("head_dim", [16, 24, 64])
def test_the_tables_are_those_of_transformers(parameters, head_dim):
    config = config_of(parameters, head_dim=head_dim)
    cos, sin = rope_tables(config, 256)
    assert (cos.dtype, cos.shape, sin.shape) == (np.float32, (256, head_dim // 2), (256, head_dim // 2))
    config.pop("model_type")
    embedding = LlamaRotaryEmbedding(LlamaConfig(**config))
    expected = embedding(torch.zeros(1), torch.arange(256)[None])
    # transformers multiplies in float32: at position p an angle is off by up to p * 2**-24 of itself.
    for found, wanted in zip((cos, sin), expected, strict=True):
        np.testing.assert_allclose(found, wanted[0, :, : head_dim // 2].numpy(), atol=256 * 2**-23)


def test_far_positions_are_more_exact_than_float32_products():
    config = config_of(ROPES["default"], head_dim=64)
    cos, _ = rope_tables(config, 8192)
    exact = np.cos(8191 * 10000.0 ** (-np.arange(0, 64, 2) / 64))
    np.testing.assert_allclose(cos[8191], exact, atol=1e-7)


def test_position_zero_turns_nothing():
    cos, sin = rope_tables(config_of(ROPES["linear"]), 1)
    assert (cos == 1).all()
    assert (sin == 0).all()


def test_yarn_scales_what_it_turns():
    cos, _ = rope_tables(config_of(ROPES["yarn"]), 1)
    np.testing.assert_allclose(cos, 0.1 * np.log(4) + 1, rtol=1e-6)


@pytest.mark.parametrize("rope_type", SUPPORTED)
def test_supported_types_pass_the_check(rope_type):
    check_rope({"rope_parameters": {"rope_type": rope_type}})
    check_rope({"rope_parameters": {}})


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope", "proportional"])
def test_other_types_are_refused(rope_type):
    with pytest.raises(UnsupportedError, match=f"rope type '{rope_type}' is not supported") as caught:
        check_rope({"rope_parameters": {"rope_type": rope_type}})
    assert caught.value.exit_code == 5
    assert "default, linear, llama3, yarn" in caught.value.hint


@by_rope
def test_a_whole_model_with_it_equals_torch(model_of, engine_of, reference_logits, ids, parameters):
    model = model_of(num_hidden_layers=1, rope_parameters=dict(parameters))
    assert model.config["rope_parameters"] == parameters | {
        key: value for key, value in model.config["rope_parameters"].items() if key not in parameters
    }
    engine = engine_of(standard_graph(model, capacity=32), model.config)
    np.testing.assert_allclose(engine.logits(ids), reference_logits(model, ids), atol=1e-4)


def test_a_config_in_the_older_spelling_gives_the_same_tables():
    from llmopt.optimizer.arch.llama import ARCH

    old = {"hidden_size": 64, "num_attention_heads": 4, "rope_theta": 500000.0, "max_position_embeddings": 256}
    old["rope_scaling"] = {key: value for key, value in ROPES["llama3"].items() if key != "rope_theta"}
    expected = rope_tables(config_of(ROPES["llama3"]), 64)
    np.testing.assert_array_equal(rope_tables(complete(old, ARCH, "here"), 64), expected)
