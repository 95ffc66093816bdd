"""Writes a checkpoint with random weights, one decoder layer at a time: a model of any size needs the memory of one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt.optimizer.cache import publish
from llmopt.optimizer.checkpoint import INDEX_NAME
from llmopt.optimizer.weight_store import save_tensors

__all__ = ["LLAMA_1B", "LLAMA_3B", "parameter_shapes", "write_random_llama"]

LLAMA_3B: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "bfloat16",
}
"""The config of Llama-3.2-3B, but for the ids of its special tokens."""

LLAMA_1B: Mapping[str, Any] = {
    **LLAMA_3B,
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
"""Layers of the shape of TinyLlama-1.1B's."""

_STD = 0.02


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, dict[str, tuple[int, ...]]]:
    """File name -> parameter name -> shape of a Llama: the embedding, each layer, and what follows them."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query, key = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    linears: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    table = (config["vocab_size"], hidden)
    parts: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": table}]
    for i in range(config["num_hidden_layers"]):
        parts.append({f"model.layers.{i}.{name}.weight": shape for name, shape in linears.items()})
    parts.append({"model.norm.weight": (hidden,)})
    if not config["tie_word_embeddings"]:
        parts.append({"lm_head.weight": table})
    return {f"model-{n:05}-of-{len(parts):05}.safetensors": part for n, part in enumerate(parts, start=1)}


def write_random_llama(directory: Path, config: Mapping[str, Any], *, seed: int = 0) -> Path:
    """Write a Llama in bfloat16, a file per part, with a tokenizer of single bytes. A directory that exists is kept.

    Args:
        directory: Appears when it is whole.
        config: As ``LLAMA_3B``.
        seed: Of the weights: normal with a deviation of 0.02; norms are 1.

    Returns:
        ``directory``.
    """
    if directory.is_dir():
        return directory
    generator = torch.Generator().manual_seed(seed)
    files = parameter_shapes(config)
    with publish(directory) as partial:
        for file, shapes in files.items():
            save_tensors({name: _random(shape, generator) for name, shape in shapes.items()}, partial / file)
        where = {name: file for file, shapes in files.items() for name in shapes}
        (partial / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")
        (partial / "config.json").write_text(json.dumps(dict(config), indent=1), encoding="utf-8")
        _save_tokenizer(partial)
    return directory


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.ones(shape, dtype=torch.bfloat16)
    return values if len(shape) == 1 else values.normal_(0, _STD, generator=generator)


def _save_tokenizer(directory: Path) -> None:
    """Save a tokenizer with a token for each byte, behind the two special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], pad_token=special[1]
    ).save_pretrained(directory)
