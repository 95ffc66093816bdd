"""Mixtral: Mistral with eight experts for each MLP, of which a token reaches two."""

from dataclasses import replace

from llmopt.optimizer.arch import llama
from llmopt.optimizer.arch.base import ExpertsPart, Key

ARCH = replace(
    llama.ARCH,
    name="mixtral",
    models={"MixtralForCausalLM": "mixtral"},
    experts=ExpertsPart(
        router="block_sparse_moe.gate",
        gate="block_sparse_moe.experts.{e}.w1",
        up="block_sparse_moe.experts.{e}.w3",
        down="block_sparse_moe.experts.{e}.w2",
        count=Key("num_local_experts"),
        top_k=Key("num_experts_per_tok"),
        normalize=True,
    ),
    module_names={"block_sparse_moe": "mlp"},
    gguf=None,
)
