"""Gemma 3's text models: Gemma 2 with a norm on every query and key head, and another rope in sliding layers."""

from dataclasses import replace

from llmopt.optimizer.arch import gemma2

# Its config has Gemma 2's cap of the scores, which transformers does not obey.
ATTENTION = replace(gemma2.ARCH.attention, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm", softcap=None)

ARCH = replace(
    gemma2.ARCH,
    name="gemma3",
    models={"Gemma3ForCausalLM": "gemma3_text"},
    attention=ATTENTION,
    gguf="gemma3",
    gguf_interleaves=False,
)
