"""OLMo 2: norms behind the branches instead of before them, and of all query and all key heads together."""

from dataclasses import replace

from llmopt.optimizer.arch import llama
from llmopt.optimizer.arch.base import LayerNorms

ARCH = replace(
    llama.ARCH,
    name="olmo2",
    models={"Olmo2ForCausalLM": "olmo2"},
    attention=replace(
        llama.ARCH.attention, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm", norm_span="all"
    ),
    norms=LayerNorms(attention_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm"),
    gguf=None,
)
