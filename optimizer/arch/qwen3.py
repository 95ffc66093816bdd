"""Qwen 3: Llama with a norm on every query and key head."""

from dataclasses import replace

from llmopt.optimizer.arch import llama

ATTENTION = replace(llama.ARCH.attention, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")

ARCH = replace(llama.ARCH, name="qwen3", models={"Qwen3ForCausalLM": "qwen3"}, attention=ATTENTION, gguf=None)
