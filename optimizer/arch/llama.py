"""Llama and the checkpoints that share its structure, such as SmolLM2."""

from llmopt.optimizer.arch.base import Arch

ARCH = Arch(
    name="llama",
    hf_names=("LlamaForCausalLM",),
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    mlp=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    norms=("input_layernorm", "post_attention_layernorm"),
    gguf="llama",
    gguf_interleaves=True,
)
