"""Gemma 2: norms around both branches, capped scores and logits, every other layer with a sliding window."""

from dataclasses import replace

from llmopt.optimizer.arch import llama
from llmopt.optimizer.arch.base import Key, LayerNorms

ARCH = replace(
    llama.ARCH,
    name="gemma2",
    models={"Gemma2ForCausalLM": "gemma2"},
    attention=replace(
        llama.ARCH.attention,
        scale=Key("query_pre_attn_scalar", power=-0.5),
        softcap=Key("attn_logit_softcapping"),
    ),
    mlp=replace(llama.ARCH.mlp, activation="hidden_activation"),
    norms=LayerNorms(
        attention_in="input_layernorm",
        attention_out="post_attention_layernorm",
        mlp_in="pre_feedforward_layernorm",
        mlp_out="post_feedforward_layernorm",
    ),
    norm_offset=1.0,
    embedding_scale=Key("hidden_size", power=0.5),
    logit_softcap=Key("final_logit_softcapping"),
    refused={"use_bidirectional_attention": True},
    gguf=None,
)
