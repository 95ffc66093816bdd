"""A family's description resolved with configs: the numbers that are compiled, and what is refused by name."""

from dataclasses import replace

import pytest

from llmopt.optimizer.arch import falcon, find, gemma2, gemma3, gpt2, gpt_neox, llama, mixtral, opt, phi3, qwen3_moe
from llmopt.optimizer.decoder import Experts, Mlp
from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.hf_config import complete
from llmopt.optimizer.resolver import describe

SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
LLAMA = {"architectures": ["LlamaForCausalLM"]}


def described(arch, *, parameters=(), model_type=None, **config):
    if model_type is not None:
        config["architectures"] = [name for name, kind in arch.models.items() if kind == model_type]
    else:
        config["architectures"] = [next(iter(arch.models))]
    return describe(arch, complete(SMALL | config, arch, "here"), set(parameters))


def test_a_llama_has_neither_window_nor_caps_nor_multipliers():
    decoder = described(llama.ARCH, parameters=["model.norm.weight"])
    first = decoder.layers[0]
    assert (first.attention.heads, first.attention.kv_heads, first.attention.head_dim) == (4, 2, 16)
    assert (first.attention.scale, first.attention.softcap, first.attention.window) == (0.25, None, None)
    assert (first.residual_scale, decoder.embedding_scale, decoder.logit_scale, decoder.logit_softcap) == (
        1,
        1,
        1,
        None,
    )
    assert (first.attention_in.name, first.mlp_in.name) == (
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
    )
    assert decoder.final_norm.name == "model.norm"
    assert decoder.linears[-1] == "lm_head"


def test_linears_come_in_data_order():
    names = [name.removeprefix("model.layers.1.") for name in described(llama.ARCH).layers[1].linears]
    assert names == [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ]  # fmt: skip


def test_mistral_has_its_window_in_every_layer():
    decoder = described(llama.ARCH, model_type="mistral", sliding_window=7)
    assert [layer.attention.window for layer in decoder.layers] == [7, 7, 7, 7]


def test_layer_types_say_which_layers_have_the_window():
    kinds = ["sliding_attention", "full_attention"] * 2
    decoder = described(gemma2.ARCH, sliding_window=7, layer_types=kinds)
    assert [layer.attention.window for layer in decoder.layers] == [7, None, 7, None]


def test_gemma_2_scales_and_caps():
    decoder = described(
        gemma2.ARCH, query_pre_attn_scalar=64, attn_logit_softcapping=50.0, final_logit_softcapping=30.0
    )
    attention = decoder.layers[0].attention
    assert (attention.scale, attention.softcap, decoder.logit_softcap) == (0.125, 50.0, 30.0)
    assert (decoder.embedding_scale, decoder.layers[0].attention_in.offset) == (8.0, 1.0)
    assert decoder.layers[0].mlp.activation == "gelu_tanh"


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("keys", [("type",), ("rope_type",), ("type", "rope_type")])
def test_the_older_name_of_a_ropes_type_is_no_parameter_of_it(name, keys):
    written = {"factor": 2.0} | dict.fromkeys(keys, "linear")
    rope = described(llama.ARCH, **{name: written}).layers[0].attention.rope
    assert (rope.kind, rope.parameters) == ("linear", {"factor": 2.0})


def test_gemma_3_turns_sliding_layers_by_another_base():
    kinds = ["sliding_attention", "full_attention"] * 2
    decoder = described(gemma3.ARCH, layer_types=kinds, sliding_window=7)
    assert [layer.attention.rope.theta for layer in decoder.layers] == [1e4, 1e6, 1e4, 1e6]


def test_smollm_3_turns_only_the_layers_that_its_config_names():
    decoder = described(llama.ARCH, model_type="smollm3", no_rope_layers=[1, 0, 1, 0], pad_token_id=0)
    assert [layer.attention.rope is not None for layer in decoder.layers] == [True, False, True, False]


def test_granite_multiplies():
    decoder = described(
        llama.ARCH, model_type="granite", attention_multiplier=0.5, embedding_multiplier=3.0, logits_scaling=4.0,
        residual_multiplier=0.25,
    )  # fmt: skip
    assert (decoder.embedding_scale, decoder.logit_scale) == (3.0, 0.25)
    assert (decoder.layers[0].attention.scale, decoder.layers[0].residual_scale) == (0.5, 0.25)


def test_rope_may_turn_a_part_of_each_head():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    assert described(phi3.ARCH, rope_parameters=rope, pad_token_id=0).layers[0].attention.rope.dim == 8


def test_gpt_2_reads_its_own_spelling():
    config = {"architectures": ["GPT2LMHeadModel"], "n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 32}
    decoder = describe(gpt2.ARCH, complete(config, gpt2.ARCH, "here"), ())
    assert (len(decoder.layers), decoder.hidden_size, decoder.max_positions) == (2, 64, 32)
    assert (decoder.positions, decoder.layers[0].attention.rope) == ("transformer.wpe", None)


@pytest.mark.parametrize("parallel", [True, False])
def test_gpt_neox_may_be_parallel(parallel):
    decoder = described(gpt_neox.ARCH, use_parallel_residual=parallel)
    assert [layer.parallel for layer in decoder.layers] == [parallel] * 4


@pytest.mark.parametrize(
    ("config", "kv_heads", "norms", "parallel"),
    [
        ({}, 1, ("input_layernorm", "input_layernorm"), True),
        ({"parallel_attn": False}, 1, ("input_layernorm", "post_attention_layernorm"), False),
        ({"multi_query": False}, 4, ("input_layernorm", "input_layernorm"), True),
        ({"multi_query": False, "parallel_attn": False}, 4, ("input_layernorm", "post_attention_layernorm"), False),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2, ("ln_attn", "ln_mlp"), True),
        (
            {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
            2, ("input_layernorm", "input_layernorm"), True,
        ),
    ],
)  # fmt: skip
def test_the_generations_of_falcon(config, kv_heads, norms, parallel):
    layer = described(falcon.ARCH, **config).layers[0]
    assert (layer.attention.kv_heads, layer.parallel) == (kv_heads, parallel)
    assert tuple(norm.name.removeprefix("transformer.h.0.") for norm in (layer.attention_in, layer.mlp_in)) == norms


def test_opt_350m_normalizes_behind_the_addition():
    layer = described(opt.ARCH, ffn_dim=96, do_layer_norm_before=False).layers[0]
    assert (layer.attention_in, layer.mlp_in) == (None, None)
    assert layer.attention_after.name == "model.decoder.layers.0.self_attn_layer_norm"
    assert layer.mlp_after.epsilon == 1e-5


def test_layers_have_experts_where_the_checkpoint_has_a_router():
    decoder = described(
        qwen3_moe.ARCH, parameters=["model.layers.1.mlp.gate.weight"], num_experts=8, num_experts_per_tok=3
    )
    kinds = [type(layer.mlp) for layer in decoder.layers]
    assert kinds == [Mlp, Experts, Mlp, Mlp]
    experts = decoder.layers[1].mlp
    assert (len(experts.experts), experts.top_k, experts.normalize) == (8, 3, False)
    assert experts.linears[3:6] == tuple(f"model.layers.1.mlp.experts.1.{name}_proj" for name in ("gate", "up", "down"))


def test_mixtral_normalizes_the_shares_of_its_experts():
    decoder = described(mixtral.ARCH, parameters=["model.layers.0.block_sparse_moe.gate.weight"])
    assert decoder.layers[0].mlp.normalize
    assert decoder.layers[0].mlp.experts[2][1] == "model.layers.0.block_sparse_moe.experts.2.w3"


def test_an_unknown_activation_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"the activation 'mish' \(hidden_act in config.json\)") as caught:
        described(llama.ARCH, hidden_act="mish")
    assert "gelu_pytorch_tanh" in caught.value.hint


def test_an_unknown_kind_of_layer_is_refused_by_name():
    config = complete(SMALL | {"architectures": ["Qwen3ForCausalLM"]}, find({"model_type": "qwen3"}), "here")
    config["layer_types"] = ["full_attention", "chunked_attention"] * 2
    with pytest.raises(UnsupportedError, match=r"layer_types.1 in config.json is 'chunked_attention'"):
        describe(llama.ARCH, config, ())


@pytest.mark.parametrize(
    ("arch", "config", "message"),
    [
        (falcon.ARCH, {"alibi": True}, "alibi: true"),
        (gpt2.ARCH, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: true"),
        (gpt2.ARCH, {"scale_attn_weights": False}, "scale_attn_weights: false"),
        (gpt2.ARCH, {"add_cross_attention": True}, "add_cross_attention: true"),
        (gemma2.ARCH, {"use_bidirectional_attention": True}, "use_bidirectional_attention: true"),
    ],
)
def test_what_no_description_covers_is_refused(arch, config, message):
    with pytest.raises(UnsupportedError, match=message) as caught:
        described(arch, **config)
    assert caught.value.exit_code == 5


def test_heads_that_kv_heads_do_not_divide_are_an_error():
    with pytest.raises(InputError, match="4 attention heads, not a multiple of its 3 KV heads"):
        described(llama.ARCH, num_key_value_heads=3)


def test_a_hidden_size_that_heads_do_not_divide_is_an_error():
    config = complete(SMALL | LLAMA, llama.ARCH, "here") | {"hidden_size": 66, "head_dim": None}
    with pytest.raises(InputError, match="hidden size of 66, which 4 attention heads do not divide"):
        describe(llama.ARCH, config, ())


def test_a_number_that_is_missing_is_an_error():
    config = {**complete(SMALL | LLAMA, llama.ARCH, "here"), "vocab_size": None}
    with pytest.raises(InputError, match="no number vocab_size"):
        describe(llama.ARCH, config, ())


def test_descriptions_are_values():
    assert replace(llama.ARCH, gguf=None) == replace(llama.ARCH, gguf=None)
    assert described(llama.ARCH) == described(llama.ARCH)


@pytest.mark.parametrize(
    ("model_type", "stray"),
    [
        ("llama", {"sliding_window": 4, "layer_types": ["sliding_attention"] * 4}),
        ("llama", {"no_rope_layers": [1, 0, 1, 0]}),
        ("llama", {"attention_multiplier": 3.0, "logits_scaling": 2.0, "embedding_multiplier": 4.0}),
        ("granite", {"sliding_window": 4}),
    ],
)
def test_entries_that_transformers_does_not_obey_are_not_obeyed(model_type, stray):
    assert described(llama.ARCH, model_type=model_type, **stray) == described(llama.ARCH, model_type=model_type)


def test_gemma_3_has_no_cap_of_scores_whatever_its_config_says():
    assert described(gemma3.ARCH, attn_logit_softcapping=3.0).layers[0].attention.softcap is None


def test_a_multiplier_of_zero_is_a_multiplier():
    decoder = described(llama.ARCH, model_type="granite", residual_multiplier=0.0)
    assert decoder.layers[0].residual_scale == 0.0
