"""OPT: learned positions from row 2 on, LayerNorm, ReLU; its 350m model normalizes behind the residual addition."""

from dataclasses import replace

from llmopt.optimizer.arch.base import Arch, AttentionPart, Key, LayerNorms, MlpPart

_BEFORE = Arch(
    name="opt",
    models={"OPTForCausalLM": "opt"},
    attention=AttentionPart(
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.out_proj",
        kv_heads=Key("num_attention_heads"),
        rope=False,
    ),
    mlp=MlpPart(up="fc1", down="fc2", activation="activation_function"),
    norms=LayerNorms(attention_in="self_attn_layer_norm", mlp_in="final_layer_norm"),
    norm="layer",
    # Not in the config: torch's own default.
    norm_epsilon=Key("layer_norm_eps", default=1e-5),
    layer="model.decoder.layers.{i}",
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    positions_offset=2,
    final_norm="model.decoder.final_layer_norm",
    project_in="model.decoder.project_in",
    project_out="model.decoder.project_out",
    refused={"layer_norm_elementwise_affine": False},
)
_BEHIND = replace(_BEFORE, norms=LayerNorms(attention_after="self_attn_layer_norm", mlp_after="final_layer_norm"))

ARCH = replace(_BEFORE, variants=(({"do_layer_norm_before": False}, _BEHIND),))
