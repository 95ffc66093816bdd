"""An architecture without a description: the refusal names the nearest one and what differs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmopt.optimizer import arch as families
from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.sources import load_model

SMALL = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}


def refused(config: dict[str, Any], parameters: list[str] | None = None) -> UnsupportedError:
    with pytest.raises(UnsupportedError) as caught:
        families.find(config, lambda: parameters or [])
    assert caught.value.exit_code == 5
    return caught.value


@pytest.mark.parametrize(
    ("model_type", "config", "nearest", "differences"),
    [
        (
            "qwen2_moe",
            {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
            "Qwen3MoeForCausalLM",
            "it has model.layers.{i}.mlp.shared_expert.*, model.layers.{i}.mlp.shared_expert_gate and lacks "
            "model.layers.{i}.self_attn.k_norm, model.layers.{i}.self_attn.q_norm",
        ),
        ("bloom", {}, "FalconForCausalLM", "it has transformer.word_embeddings_layernorm"),
        (
            "starcoder2",
            {"intermediate_size": 8},
            "LlamaForCausalLM",
            "it has model.layers.{i}.mlp.c_fc, model.layers.{i}.mlp.c_proj and lacks "
            "model.layers.{i}.mlp.down_proj, model.layers.{i}.mlp.gate_proj, model.layers.{i}.mlp.up_proj",
        ),
        (
            "gpt_neo",
            {"attention_types": [[["global"], 1]], "num_layers": 1, "num_heads": 2},
            "GPT2LMHeadModel",
            "it has transformer.h.{i}.attn.attention.* and lacks "
            "transformer.h.{i}.attn.c_attn, transformer.h.{i}.attn.c_proj",
        ),
        ("cohere", {"intermediate_size": 8}, "LlamaForCausalLM", "it lacks model.layers.{i}.post_attention_layernorm"),
    ],
)
def test_the_names_of_weights_say_what_differs(
    model_type: str, config: dict[str, Any], nearest: str, differences: str, tmp_path: Path
) -> None:
    network = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**(SMALL | config)))
    network.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError) as caught:
        load_model(str(tmp_path), cache=tmp_path / "cache")
    name = type(network).__name__
    assert caught.value.message == (
        f"architecture {name} is not supported; unlike {nearest}, the nearest that is, {differences}"
    )
    assert f"supported: {', '.join(sorted(name for arch in families.known() for name in arch.models))}" in str(
        caught.value.hint
    )


def test_where_the_names_are_the_same_the_config_says_what_differs() -> None:
    parameters = ["model.embed_tokens.weight", "model.norm.weight"] + [
        f"model.layers.3.{name}.weight"
        for name in (
            *(f"self_attn.{role}_proj" for role in "qkvo"),
            *(f"mlp.{role}_proj" for role in ("gate", "up", "down")),
            "input_layernorm",
            "post_attention_layernorm",
        )
    ]
    error = refused({"architectures": ["YiForCausalLM"], "hidden_size": 8, "use_parallel_residual": True}, parameters)
    assert error.message == (
        "architecture YiForCausalLM is not supported; unlike LlamaForCausalLM, the nearest that is, "
        "its config.json has use_parallel_residual"
    )
    error = refused({"architectures": ["YiForCausalLM"], "hidden_size": 8}, parameters)
    assert "its weights have the same names, and there is no description of what it computes" in error.message


def test_without_weights_the_config_and_the_name_say_what_is_nearest() -> None:
    error = refused({"architectures": ["Qwen2MoeForCausalLM"], "shared_expert_intermediate_size": 8})
    assert "unlike Qwen3MoeForCausalLM" in error.message
    assert "its config.json has shared_expert_intermediate_size" in error.message
    assert refused({"architectures": ["Mistrall"]}).message == (
        "architecture Mistrall is not supported; the nearest that is: MistralForCausalLM"
    )
    assert refused({"architectures": ["ZForCausalLM"]}).message == "architecture ZForCausalLM is not supported"
    assert refused({"model_type": "mamba"}).message == "model type mamba is not supported"
    assert refused({}).message == "config.json names neither architectures nor model_type"


def test_a_task_other_than_generating_text_is_told_by_its_head(
    family_of: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(family_of("llama"), tmp_path / "copy"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    tensors = load_file(directory / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors | {"score.weight": np.ones((2, 64), np.float32)}, directory / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"unlike LlamaForCausalLM, the nearest that is, it has score"):
        load_model(str(directory), cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("architecture", "inside", "hint"),
    [
        ("Gemma3ForConditionalGeneration", "gemma3_text", "save its own alone, as Gemma3ForCausalLM"),
        ("LlavaForConditionalGeneration", "llama", "save its own alone, as LlamaForCausalLM"),
        ("Gemma4ForConditionalGeneration", "gemma4_text", "llmopt compiles text decoders only: save its own alone"),
    ],
)
def test_a_multimodal_checkpoint_is_more_than_a_text_decoder(architecture: str, inside: str, hint: str) -> None:
    error = refused({"architectures": [architecture], "text_config": {"model_type": inside}, "vision_config": {}})
    assert error.message == f"architecture {architecture} is not supported; it is more than a text decoder"
    assert hint in (error.hint or "")


def test_damaged_weights_do_not_hide_that_the_architecture_is_unsupported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UnsupportedError, match="architecture MambaForCausalLM is not supported"):
        load_model(str(tmp_path), cache=tmp_path / "cache")
