"""Tiny random models in memory, beside transformers' own module that computes the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmopt.optimizer.arch.llama import ARCH
from llmopt.optimizer.model import DenseWeight, Model, Source

Pair = tuple[Model, LlamaForCausalLM]


def make_pair(**changes: Any) -> Pair:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    network = LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    weights = {name: DenseWeight.of(parameter.detach()) for name, parameter in network.named_parameters()}
    source = Source(spec="tiny", digest="0" * 64, files={}, tokenizer_dir=Path())
    return Model(family=ARCH, config=network.config.to_dict(), weights=weights, source=source), network


@pytest.fixture(scope="session")
def pair_of() -> Callable[..., Pair]:
    """Makes (our model, transformers' module) with the same random weights; keywords change the config."""
    return make_pair
