"""Configs without a description, or that contradict themselves, are refused when a model is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.exporters.onnx import rope
from llmopt.optimizer.config_check import ROPE_TYPES
from llmopt.optimizer.errors import InputError, LlmoptError, UnsupportedError
from llmopt.optimizer.sources import load_model

Refusal = Callable[..., LlmoptError]


@pytest.fixture
def refusal(family_of: Callable[[str], Path], tmp_path: Path) -> Refusal:
    """Loads a family's checkpoint with a changed config and returns the error."""

    def load(family_name: str, **changes: Any) -> LlmoptError:
        directory = Path(shutil.copytree(family_of(family_name), tmp_path / "copy"))
        config = json.loads((directory / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps(config))
        with pytest.raises(LlmoptError) as caught:
            load_model(str(directory), cache=tmp_path / "cache")
        assert caught.value.hint
        assert "\n" not in caught.value.message
        return caught.value

    return load


def turned(kind: str, **entries: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **entries}}


@pytest.mark.parametrize(
    ("family_name", "changes", "what"),
    [
        ("llama", turned("ntk-by-parts"), "rope type 'ntk-by-parts'"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "su", "factor": 2.0}}, "rope type 'su'"),
        ("qwen2", turned("mrope", mrope_section=[4, 2, 2]), "rope type 'mrope'"),
        ("qwen2", turned("default", mrope_section=[4, 2, 2]), "mrope_section of config.json's rope is not supported"),
        ("llama", turned("proportional", partial_rotary_factor=1.0), "rope type 'proportional'"),
        ("llama", turned("default", partial_rotary_factor=0.5), "partial_rotary_factor in config.json is 0.5"),
        ("llama", {"hidden_act": "no_such_function"}, "the activation 'no_such_function' (hidden_act"),
        ("llama", {"hidden_act": "relu2"}, "the activation 'relu2' (hidden_act"),
        ("gpt2", {"activation_function": "tanh"}, "the activation 'tanh' (activation_function"),
        ("gemma2", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "layer_types.1"),
        ("gemma3", {"layer_types": ["linear"] * 3}, "layer_types.0 in config.json is 'linear'"),
        ("falcon", {"alibi": True}, "alibi: true"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: true"),
        ("llama", {"use_bidirectional_attention": True}, "use_bidirectional_attention: true"),
        ("llama", {"is_causal": False}, "is_causal: false"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention: true"),
        ("opt", {"is_encoder_decoder": True}, "is_encoder_decoder: true"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: false"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: true"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine: false"),
    ],
)
def test_what_has_no_description_is_refused_by_name(
    family_name: str, changes: dict[str, Any], what: str, refusal: Refusal
) -> None:
    error = refusal(family_name, **changes)
    assert type(error) is UnsupportedError
    assert error.exit_code == 5
    assert what in error.message


@pytest.mark.parametrize(
    ("family_name", "changes", "what"),
    [
        ("llama", {"num_key_value_heads": 3}, "4 attention heads, not a multiple of its 3 KV heads"),
        ("falcon-40b", {"num_kv_heads": 3}, "4 attention heads, not a multiple of its 3 KV heads"),
        ("llama", {"num_key_value_heads": 0}, "num_key_value_heads in config.json is 0, which is not positive"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads in config.json is 0"),
        ("gpt2", {"n_head": -4}, "n_head in config.json is -4"),
        ("gpt2", {"n_head": 5}, "a hidden size of 64, which 5 attention heads do not divide"),
        ("llama", {"hidden_size": 66, "head_dim": None}, "The hidden size (66) is not a multiple"),
        ("llama", {"head_dim": 15}, "an even rotary dimension"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers in config.json is 0"),
        ("gpt2", {"n_layer": 0}, "n_layer in config.json is 0"),
        ("llama", {"num_hidden_layers": 2}, "holds 9 weights that its config has no place for"),
        ("llama", {"vocab_size": 511}, "model.embed_tokens.weight is [512, 64], not [511, 64]"),
        ("llama", {"pad_token_id": 600}, "Padding_idx must be within num_embeddings"),
        ("llama", {"max_position_embeddings": 0}, "max_position_embeddings in config.json is 0"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "3 layers, but layer_types has length 2"),
        ("smollm3", {"no_rope_layers": [1]}, "3 layers, but no_rope_layers has length 1"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "3 layers, but no_rope_layers has length 4"),
        ("mistral", {"sliding_window": 0}, "sliding_window in config.json is 0"),
        ("mistral", {"sliding_window": -4}, "sliding_window in config.json is -4"),
        ("gemma3", {"sliding_window": None}, "is 'sliding_attention', but there is no sliding_window"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok in config.json is 5, but there are only 4"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok in config.json is 9, but there are only 8"),
        ("qwen3_moe", {"num_experts_per_tok": 0}, "num_experts_per_tok in config.json is 0"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step in config.json is 0"),
        ("mixtral", {"num_local_experts": 5}, "block_sparse_moe.experts.4.w1.weight"),
        ("granite", {"logits_scaling": 0.0}, "logits_scaling in config.json is 0.0, not a positive number"),
        ("gemma2", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar in config.json is -1, not a positive"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping in config.json is 0.0, not a positive"),
        ("gemma2", {"final_logit_softcapping": 0.0}, "final_logit_softcapping in config.json is 0.0, not a pos"),
        (
            "llama",
            {"architectures": "LlamaForCausalLM"},
            "architectures in config.json is 'LlamaForCausalLM', not a list",
        ),
        ("llama", {"architectures": []}, "architectures in config.json is [], not a list of names"),
        ("llama", {"architectures": [None]}, "architectures in config.json is [None], not a list of names"),
        (
            "llama",
            {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}},
            "config.json's rope has rope_type 'linear' and type 'dynamic'",
        ),
        ("llama", turned("linear"), "'linear': {'factor'}"),
        ("llama", turned("dynamic"), "'dynamic': {'factor'}"),
        ("llama", turned("llama3", factor=8.0, low_freq_factor=1.0), "'llama3': {'high_freq_factor'}"),
        ("llama", turned("longrope", long_factor=[1.0] * 8), "'longrope': {'short_factor'}"),
        ("llama", turned("linear", factor=0.0), "factor of config.json's rope is 0.0, not a positive number"),
        ("llama", turned("linear", factor=-2.0), "factor of config.json's rope is -2.0"),
        ("llama", turned("linear", factor="two"), "factor of config.json's rope is 'two'"),
        ("llama", turned("default", rope_theta=0.0), "rope_theta of config.json's rope is 0.0"),
        ("llama", turned("default", rope_theta="high"), "could not convert string to float: 'high'"),
        (
            "llama",
            turned("llama3", factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0),
            "low_freq_factor of config.json's rope is 4.0, not below its high_freq_factor 4.0",
        ),
        (
            "llama",
            turned("longrope", short_factor=[1.0] * 8, long_factor=[1.0] * 4, factor=2.0),
            "long_factor of config.json's rope has length 4, but heads have 8 frequencies",
        ),
        ("gpt_neox", turned("default", partial_rotary_factor=2.0), "rope turn 32 of the 16 columns of each head"),
        ("gpt_neox", turned("default", partial_rotary_factor=0.01), "rope turn 0 of the 16 columns of each head"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "rope_theta": 1e4}}},
            "factor",
        ),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(
    family_name: str, changes: dict[str, Any], what: str, refusal: Refusal
) -> None:
    error = refusal(family_name, **changes)
    assert type(error) is InputError
    assert error.exit_code == 2
    assert what in error.message


def test_rope_types_are_those_that_can_be_exported() -> None:
    assert tuple(rope._KINDS) == ROPE_TYPES


@pytest.mark.parametrize(
    ("family_name", "changes"),
    [
        ("llama", {"is_encoder_decoder": False, "alibi": False, "sliding_window": None}),
        ("llama", {"rope_parameters": None}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 1}),
        ("gpt2", {"n_inner": None, "reorder_and_upcast_attn": True}),
    ],
)
def test_entries_that_say_nothing_are_no_reason(
    family_name: str, changes: dict[str, Any], family_of: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(family_of(family_name), tmp_path / "copy"))
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    assert load_model(str(directory), cache=tmp_path / "cache").num_layers == 3
