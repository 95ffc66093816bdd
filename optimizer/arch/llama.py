"""Llama and the families that differ from it in config entries only: Mistral, Qwen 2, SmolLM 2 and 3, Granite.

Mistral's sliding window, SmolLM 3's layers without rope and Granite's multipliers are numbers in the config; Qwen 2's
biases are weights that the checkpoint has.
"""

from llmopt.optimizer.arch.base import Arch, AttentionPart, Key, LayerNorms, MlpPart

ARCH = Arch(
    name="llama",
    models={
        "LlamaForCausalLM": "llama",
        "MistralForCausalLM": "mistral",
        "Qwen2ForCausalLM": "qwen2",
        "SmolLM3ForCausalLM": "smollm3",
        "GraniteForCausalLM": "granite",
    },
    attention=AttentionPart(
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.o_proj",
        scale=Key("attention_multiplier"),
    ),
    mlp=MlpPart(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),
    norms=LayerNorms(attention_in="input_layernorm", mlp_in="post_attention_layernorm"),
    gguf="llama",
    gguf_interleaves=True,
)
