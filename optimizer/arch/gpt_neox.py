"""GPT-NeoX and Pythia: attention and MLP in parallel, LayerNorm, rope on a part of each head."""

from llmopt.optimizer.arch.base import Arch, AttentionPart, Key, LayerNorms, MlpPart

ARCH = Arch(
    name="gpt_neox",
    models={"GPTNeoXForCausalLM": "gpt_neox"},
    attention=AttentionPart(
        packed="attention.query_key_value",
        packing="groups",
        output="attention.dense",
        kv_heads=Key("num_attention_heads"),
        partial_rope=True,
    ),
    mlp=MlpPart(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
    norms=LayerNorms(attention_in="input_layernorm", mlp_in="post_attention_layernorm"),
    parallel="use_parallel_residual",
    norm="layer",
    norm_epsilon=Key("layer_norm_eps"),
    layer="gpt_neox.layers.{i}",
    embedding="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    head="embed_out",
    module_names={"embed_out": "lm_head"},
)
