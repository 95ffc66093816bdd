"""Which module gets which scheme: overrides, the head, group sizes, and what is refused before any work."""

from pathlib import Path

import pydantic
import pytest
import torch

from llmopt.optimizer.arch import qwen3_moe
from llmopt.optimizer.arch.llama import ARCH
from llmopt.optimizer.assignment import SchemeQuantPass
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.hf_config import complete
from llmopt.optimizer.model import DenseWeight, Model, QuantWeight, Source
from llmopt.optimizer.rounding import quantize
from llmopt.optimizer.scheme import PRESETS

LAYER = "model.layers.{}."
W8A8, W8A16, W4A16 = PRESETS["W8A8"], PRESETS["W8A16"], PRESETS["W4A16"]


class Chosen(SchemeQuantPass):
    """A quantizer that does nothing but choose."""

    def run(self, model, context):
        return model


def unread():
    raise AssertionError("requires and assign read no tensor")


def weights_of(shapes):
    """Weights that can be described but not read."""
    return {f"{name}.weight": DenseWeight(shape, torch.float32, unread) for name, shape in shapes.items()}


def model_of(*, hidden=128, mlp=256, tied=True):
    """A Llama of two layers."""
    config = {
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": 2, "num_attention_heads": 1,
        "vocab_size": 50, "model_type": "llama",
    }  # fmt: skip
    model = Model(ARCH, complete(config, ARCH, "here"), {}, Source("x", "0" * 64, {}, Path()))
    shapes = {"model.embed_tokens": (50, hidden)} | ({} if tied else {"lm_head": (50, hidden)})
    for name in model.linears()[:-1]:
        shapes[name] = (hidden, mlp if name.endswith("down_proj") else hidden)
    return model.with_weights(weights_of(shapes))


def mixture_of(*, inner=64):
    """A Qwen 3 of two layers with three experts; its first layer is dense."""
    config = {
        "hidden_size": 128, "moe_intermediate_size": inner, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 1, "num_key_value_heads": 1, "num_experts": 3, "num_experts_per_tok": 2,
        "mlp_only_layers": [0], "vocab_size": 50, "model_type": "qwen3_moe",
    }  # fmt: skip
    arch = qwen3_moe.ARCH
    routers = weights_of({LAYER.format(1) + "mlp.gate": (3, 128), "model.embed_tokens": (50, 128)})
    model = Model(arch, complete(config, arch, "here"), routers, Source("x", "0" * 64, {}, Path()))
    shapes = {
        name: (128, 256 if "layers.0.mlp.down" in name else inner if "down_proj" in name else 128)
        for name in model.linears()
    }
    return model.with_weights(weights_of(shapes))


def assigned(model=None, **options):
    return Chosen(**options).assign(model or model_of())


def refused(model=None, **options):
    with pytest.raises(PassError) as caught:
        Chosen(**options).requires(model or model_of())
    assert caught.value.exit_code == 3
    return caught.value


def test_every_linear_in_data_order_gets_the_scheme():
    found = assigned(scheme="W4A16")
    assert list(found) == model_of().linears()
    assert {scheme.name for module, scheme in found.items() if module != "lm_head"} == {"W4A16"}


@pytest.mark.parametrize(
    ("options", "head"),
    [
        ({"scheme": "W8A8"}, W8A8),
        ({"scheme": "W8A16"}, W8A16),
        ({"scheme": "W4A16"}, W8A16.with_group_size(128)),
        ({"scheme": "W4A16", "group_size": 32}, W8A16.with_group_size(32)),
        ({"scheme": "W4A16_ASYM", "group_size": -1}, W8A16),
        ({"scheme": "W4A16", "head": "W8A8"}, W8A8),
        ({"scheme": "W8A8", "head": "W4A16"}, W4A16),
        ({"scheme": "W4A16", "group_size": 32, "head": W4A16.model_dump()}, W4A16),
    ],
)
def test_the_head_has_a_default_and_can_be_named(options, head):
    assert assigned(**options)["lm_head"] == head


@pytest.mark.parametrize("scheme", ["FP8", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_fp8_leaves_the_head_in_float(scheme):
    assert "lm_head" not in assigned(scheme=scheme)
    assert assigned(scheme=scheme, head="W8A8")["lm_head"] == W8A8


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_none_stays_in_float(tied):
    found = assigned(model_of(tied=tied), scheme="W8A8", head="none")
    assert "lm_head" not in found
    assert len(found) == 14


def test_a_group_size_of_its_own_replaces_the_schemes():
    found = assigned(scheme="W4A16_ASYM", group_size=32)
    assert found["model.layers.0.mlp.up_proj"] == PRESETS["W4A16_ASYM"].with_group_size(32)


def test_the_first_override_that_matches_wins():
    overrides = [
        {"match": "model.layers.0.mlp.down_proj", "scheme": "none"},
        {"match": "re:.*down_proj$", "scheme": "W8A16"},
        {"match": "re:.*", "scheme": "W8A8"},
    ]
    found = assigned(scheme="W4A16", overrides=overrides)
    assert "model.layers.0.mlp.down_proj" not in found
    assert found["model.layers.1.mlp.down_proj"] == W8A16
    assert found["model.layers.1.mlp.up_proj"] == W8A8
    assert found["lm_head"] == W8A8


def test_an_override_speaks_of_the_head_before_the_head_option_does():
    found = assigned(scheme="W4A16", head="none", overrides=[{"match": "lm_head", "scheme": "W8A8"}])
    assert found["lm_head"] == W8A8


def test_an_overrides_scheme_keeps_its_own_group_size():
    overrides = [{"match": "re:.*v_proj", "scheme": "W4A16_ASYM"}]
    found = assigned(scheme="W4A16", group_size=32, overrides=overrides)
    assert found["model.layers.0.self_attn.v_proj"] == PRESETS["W4A16_ASYM"]


@pytest.mark.parametrize(
    ("match", "hits"),
    [
        ("model.layers.1.mlp.up_proj", 1),
        ("re:.*up_proj", 2),
        (r"re:model\.layers\.0\.", 7),
        ("re:.*(q|k)_proj$", 4),
        ("re:lm_head", 1),
    ],
)
def test_names_match_whole_and_expressions_from_the_start(match, hits):
    found = assigned(scheme="W8A16", head="W8A16", overrides=[{"match": match, "scheme": "W8A8"}])
    assert sum(scheme == W8A8 for scheme in found.values()) == hits


@pytest.mark.parametrize("match", ["up_proj", "re:up_proj", "model.layers.9.mlp.up_proj", "model.embed_tokens", ""])
def test_an_override_that_matches_nothing_is_refused(match):
    overrides = [{"match": "lm_head", "scheme": "none"}, {"match": match, "scheme": "W8A16"}]
    error = refused(scheme="W8A8", overrides=overrides)
    assert error.message == f"overrides.1.match {match!r} matches no linear of this model"
    assert "model.layers.0.self_attn.q_proj" in error.hint


def test_a_broken_expression_is_refused_when_it_is_read():
    with pytest.raises(pydantic.ValidationError, match=r"'re:\*down' is no regular expression"):
        Chosen(scheme="W8A8", overrides=[{"match": "re:*down", "scheme": "none"}])


@pytest.mark.parametrize(
    ("hidden", "size", "fitting"),
    [(576, 128, "16, 32, 64, 96, 192"), (72, 16, "none; use -1"), (128, 256, "16, 32, 64, 128")],
)
def test_a_group_size_that_does_not_fit_names_the_module_and_sizes_that_do(hidden, size, fitting):
    error = refused(model_of(hidden=hidden), scheme="W4A16", group_size=size)
    assert error.message == (
        f"model.layers.0.self_attn.q_proj has {hidden} input columns, not a multiple of group_size={size}"
    )
    assert error.hint == f"group sizes that fit it: {fitting}"


def test_a_module_whose_columns_differ_is_found():
    error = refused(model_of(hidden=128, mlp=200), scheme="W4A16", group_size=64)
    assert error.message.startswith("model.layers.0.mlp.down_proj has 200 input columns")


def test_a_head_that_does_not_fit_is_found():
    error = refused(model_of(hidden=96), scheme="W4A16", group_size=32, head="W4A16")
    assert error.message.startswith("lm_head has 96 input columns")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_module_that_is_quantized_already_is_refused(name):
    model = model_of()
    model = model.with_weights({name: QuantWeight.of(quantize(torch.ones(128, 128), W8A16), W8A16)})
    error = refused(model, scheme="W8A8")
    module = "lm_head" if "embed" in name else name.removesuffix(".weight")
    assert error.message == f"{module} is already quantized to W8A16"
    assert "overrides" in error.hint


def test_a_second_quantizer_may_take_what_the_first_left():
    model = model_of()
    model = model.with_weights(
        {"model.embed_tokens.weight": QuantWeight.of(quantize(torch.ones(50, 128), W8A16), W8A16)}
    )
    Chosen(scheme="W8A8", head="none").requires(model)


@pytest.mark.parametrize("size", [0, -2, 1.5, "many"])
def test_a_group_size_that_is_none_is_refused(size):
    with pytest.raises(pydantic.ValidationError, match="group_size"):
        Chosen(scheme="W4A16", group_size=size)


def test_a_group_size_does_not_go_with_quantized_activations():
    with pytest.raises(pydantic.ValidationError, match="one scale a channel"):
        Chosen(scheme="W8A8", group_size=32)
    assert assigned(scheme="W8A8", group_size=-1)["lm_head"] == W8A8


def test_every_scheme_is_told_with_the_option_that_names_it():
    overrides = [{"match": "lm_head", "scheme": "none"}, {"match": "re:.*", "scheme": "W8A16"}]
    one = Chosen(scheme="W4A16", group_size=32, overrides=overrides)
    assert one.schemes() == {
        "scheme": W4A16.with_group_size(32),
        "head": W8A16.with_group_size(32),
        "experts": W4A16.with_group_size(32),
        "overrides.1.scheme": W8A16,
    }
    assert set(Chosen(scheme="W8A8", head="none", experts="none").schemes()) == {"scheme"}


def test_every_linear_is_told_with_the_option_that_decides_about_it():
    overrides = [{"match": "re:.*v_proj", "scheme": "none"}, {"match": "re:.*experts.2", "scheme": "W8A16"}]
    found = Chosen(scheme="W4A16", overrides=overrides).deciding(mixture_of())
    short = {module.removeprefix("model.layers.1."): option for module, option in found.items()}
    assert list(found) == mixture_of().linears()
    assert {name: short[name] for name in ("self_attn.q_proj", "self_attn.v_proj", "lm_head")} == {
        "self_attn.q_proj": "scheme", "self_attn.v_proj": "overrides.0.scheme", "lm_head": "head",
    }  # fmt: skip
    assert short["mlp.experts.0.gate_proj"] == "experts"
    assert short["mlp.experts.2.gate_proj"] == "overrides.1.scheme"
    assert short["model.layers.0.mlp.up_proj"] == "scheme"


@pytest.mark.parametrize(
    ("options", "experts"),
    [
        ({"scheme": "W8A8"}, W8A16),
        ({"scheme": "W8A16"}, W8A16),
        ({"scheme": "W4A16", "group_size": 32}, W4A16.with_group_size(32)),
        ({"scheme": "W4A16_ASYM", "group_size": -1}, PRESETS["W4A16_ASYM"].with_group_size(-1)),
        ({"scheme": "W8A8", "experts": W4A16.with_group_size(32).model_dump()}, W4A16.with_group_size(32)),
        ({"scheme": "W4A16", "group_size": 32, "experts": "W8A16"}, W8A16),
        ({"scheme": "W8A16", "experts": "none"}, None),
    ],
)
def test_the_experts_have_a_default_and_can_be_named(options, experts):
    found = assigned(mixture_of(), **options)
    assert {found.get(name) for name in mixture_of().decoder.expert_linears} == {experts}
    dense = LAYER.format(0) + "mlp.up_proj"
    assert found[dense] == Chosen(**options).schemes()["scheme"]


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16"])
def test_no_router_is_quantized(scheme):
    options = {"scheme": scheme} | ({} if scheme == "W8A8" else {"group_size": 32})
    assert LAYER.format(1) + "mlp.gate" not in assigned(mixture_of(), **options)


def test_the_experts_of_a_layer_may_differ_between_their_parts_only():
    overrides = [{"match": "re:.*experts.*down_proj$", "scheme": "W8A16"}]
    Chosen(scheme="W4A16", group_size=32, overrides=overrides).requires(mixture_of())
    one = ("re:.*experts.1.down_proj", "down"), ("re:.*experts.2.gate_proj", "gate and up")
    for match, part in (*one, ("re:.*experts.*up_proj", "gate and up")):
        overrides = [{"match": match, "scheme": "none"}]
        error = refused(mixture_of(), scheme="W4A16", group_size=32, overrides=overrides)
        assert error.message == f"model.layers.1: {part} of its experts get different schemes: W4A16 g32, none"
        assert "re:.*experts" in error.hint


def test_an_expert_that_does_not_fit_is_found():
    error = refused(mixture_of(inner=48), scheme="W8A8", experts=W4A16.with_group_size(32).model_dump())
    assert error.message.startswith("model.layers.1.mlp.experts.0.down_proj has 48 input columns")


def test_experts_of_a_model_without_any_are_refused():
    error = refused(scheme="W8A8", experts="W8A16")
    assert error.message == "experts is given, but this model has no mixtures of experts"


def test_an_embedding_stays_in_float_unless_it_is_given_a_scheme():
    model = model_of(tied=False)
    assert "model.embed_tokens" not in assigned(model, scheme="W8A8")
    found = assigned(model, scheme="W8A8", embedding="W8A16")
    assert found["model.embed_tokens"] == W8A16
    assert len(found) == 1 + len(model.linears())


def test_the_embeddings_scheme_is_among_those_that_targets_are_asked_about():
    assert Chosen(scheme="W8A8", embedding="W4A16").schemes()["embedding"] == W4A16
    assert "embedding" not in Chosen(scheme="W8A8").schemes()


def test_an_embedding_that_shares_the_heads_table_has_no_scheme_of_its_own():
    error = refused(scheme="W8A8", embedding="W8A16")
    assert error.message == "embedding is given, but this model's embedding and head share a table"
    assert "head decides about both" in error.hint


def test_an_embedding_has_no_inputs_to_quantize():
    with pytest.raises(pydantic.ValidationError, match="looks rows up, it has no inputs to quantize"):
        Chosen(scheme="W8A8", embedding="W8A8")


def test_an_embeddings_group_size_must_divide_its_columns():
    error = refused(model_of(hidden=96, tied=False), scheme="W8A8", embedding="W4A16")
    assert "model.embed_tokens has 96 input columns, not a multiple of group_size=128" in error.message


def test_an_embedding_is_quantized_once():
    model = model_of(tied=False)
    name = "model.embed_tokens.weight"
    rounded = QuantWeight.of(quantize(torch.ones(50, 128), W8A16), W8A16)
    assert (
        "is already quantized" in refused(model.with_weights({name: rounded}), scheme="W8A8", embedding="W8A16").message
    )
