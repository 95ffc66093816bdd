"""Qwen 3 with a mixture of experts in every layer, or in those that the config names."""

from dataclasses import replace

from llmopt.optimizer.arch import qwen3
from llmopt.optimizer.arch.base import ExpertsPart, Key

ARCH = replace(
    qwen3.ARCH,
    name="qwen3_moe",
    models={"Qwen3MoeForCausalLM": "qwen3_moe"},
    experts=ExpertsPart(
        router="mlp.gate",
        gate="mlp.experts.{e}.gate_proj",
        up="mlp.experts.{e}.up_proj",
        down="mlp.experts.{e}.down_proj",
        count=Key("num_local_experts"),
        top_k=Key("num_experts_per_tok"),
        normalize=Key("norm_topk_prob", default=0),
    ),
)
