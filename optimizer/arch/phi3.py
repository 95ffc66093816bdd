"""Phi-3 and Phi-4: Llama with the linears of query, key and value in one, and those of gate and up in one."""

from dataclasses import replace

from llmopt.optimizer.arch import llama
from llmopt.optimizer.arch.base import AttentionPart, MlpPart

ARCH = replace(
    llama.ARCH,
    name="phi3",
    models={"Phi3ForCausalLM": "phi3"},
    attention=AttentionPart(packed="self_attn.qkv_proj", output="self_attn.o_proj", partial_rope=True),
    mlp=MlpPart(packed="mlp.gate_up_proj", down="mlp.down_proj"),
    gguf=None,
)
