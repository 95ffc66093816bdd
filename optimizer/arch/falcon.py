"""Falcon: one KV head or few, attention and MLP in parallel, LayerNorm; three generations, told apart by flags."""

from dataclasses import replace

from llmopt.optimizer.arch.base import Arch, AttentionPart, Key, LayerNorms, MlpPart

_ONE_NORM = LayerNorms(attention_in="input_layernorm", mlp_in="input_layernorm")
_TWO_NORMS = LayerNorms(attention_in="ln_attn", mlp_in="ln_mlp")
_IN_SEQUENCE = LayerNorms(attention_in="input_layernorm", mlp_in="post_attention_layernorm")

_MULTI_QUERY = Arch(
    name="falcon",
    models={"FalconForCausalLM": "falcon"},
    attention=AttentionPart(
        packed="self_attention.query_key_value", packing="groups", output="self_attention.dense", kv_heads=1
    ),
    mlp=MlpPart(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", activation="activation"),
    norms=_ONE_NORM,
    parallel="parallel_attn",
    norm="layer",
    norm_epsilon=Key("layer_norm_epsilon"),
    layer="transformer.h.{i}",
    embedding="transformer.word_embeddings",
    final_norm="transformer.ln_f",
    refused={"alibi": True},
)
_GROUPED = replace(_MULTI_QUERY, attention=replace(_MULTI_QUERY.attention, kv_heads=Key("num_kv_heads")), parallel=True)
_MULTI_HEAD = replace(
    _MULTI_QUERY, attention=replace(_MULTI_QUERY.attention, kv_heads=Key("num_attention_heads")), norms=_ONE_NORM
)

ARCH = replace(
    _MULTI_QUERY,
    variants=(
        # Without parallel_attn transformers' newest generation leaves out the MLP's norm: no checkpoint has that.
        ({"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}, _GROUPED),
        ({"new_decoder_architecture": True}, replace(_GROUPED, norms=_TWO_NORMS)),
        ({"multi_query": True, "parallel_attn": False}, replace(_MULTI_QUERY, norms=_IN_SEQUENCE)),
        ({"multi_query": False, "parallel_attn": False}, replace(_MULTI_HEAD, norms=_IN_SEQUENCE)),
        ({"multi_query": False}, _MULTI_HEAD),
    ),
)
