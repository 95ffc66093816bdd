"""Random checkpoints: what transformers would make of their config, and whole or not there."""

from pathlib import Path

import pytest
import torch

from llmopt.benchmarks.random_checkpoint import LLAMA_3B, parameter_shapes, write_random_llama
from llmopt.optimizer.sources import load_model

CONFIG = {
    **LLAMA_3B,
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.mark.parametrize("tied", [True, False])
def test_it_has_the_parameters_that_transformers_gives_its_config(tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {**CONFIG, "tie_word_embeddings": tied}
    with torch.device("meta"):
        network = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k != "dtype"}))
    expected = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    assert {k: v for shapes in parameter_shapes(config).values() for k, v in shapes.items()} == expected


def test_the_same_seed_writes_the_same_weights_and_an_existing_one_is_kept(tmp_path: Path) -> None:
    written = [write_random_llama(tmp_path / name, CONFIG, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    weights = [load_model(str(path), cache=tmp_path / "cache").weights for path in written]
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(weights[0][name].dense(), weights[1][name].dense())
    assert not torch.equal(weights[0][name].dense(), weights[2][name].dense())
    before = (written[0] / "config.json").stat().st_mtime_ns
    write_random_llama(written[0], CONFIG, seed=1)
    assert (written[0] / "config.json").stat().st_mtime_ns == before
