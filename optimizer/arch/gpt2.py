"""GPT-2: learned positions, LayerNorm, and linears stored as [in, out]."""

from llmopt.optimizer.arch.base import Arch, AttentionPart, Key, LayerNorms, MlpPart

ARCH = Arch(
    name="gpt2",
    models={"GPT2LMHeadModel": "gpt2"},
    attention=AttentionPart(
        packed="attn.c_attn",
        output="attn.c_proj",
        kv_heads=Key("num_attention_heads"),
        rope=False,
    ),
    mlp=MlpPart(up="mlp.c_fc", down="mlp.c_proj", activation="activation_function"),
    norms=LayerNorms(attention_in="ln_1", mlp_in="ln_2"),
    norm="layer",
    norm_epsilon=Key("layer_norm_epsilon"),
    layer="transformer.h.{i}",
    embedding="transformer.wte",
    positions="transformer.wpe",
    final_norm="transformer.ln_f",
    refused={"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "add_cross_attention": True},
    transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
)
