"""Which module gets which scheme: overrides, the head, group sizes, and what is refused before any work."""

from pathlib import Path

import pydantic
import pytest
import torch

from llmopt.optimizer.arch.llama import ARCH
from llmopt.optimizer.assignment import SchemeQuantPass
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import DenseWeight, Model, QuantWeight, Source
from llmopt.optimizer.rounding import quantize
from llmopt.optimizer.scheme import PRESETS

LAYER = "model.layers.{}."
W8A8, W8A16, W4A16 = PRESETS["W8A8"], PRESETS["W8A16"], PRESETS["W4A16"]


class Chosen(SchemeQuantPass):
    """A quantizer that does nothing but choose."""

    def run(self, model, context):
        return model


def model_of(*, hidden=128, mlp=256, tied=True):
    """Two layers whose weights can be described but not read."""

    def unread():
        raise AssertionError("requires and assign read no tensor")

    shapes = {"model.embed_tokens": (50, hidden)} | ({} if tied else {"lm_head": (50, hidden)})
    for i in range(2):
        for name in (*ARCH.attention, *ARCH.mlp):
            shapes[LAYER.format(i) + name] = (hidden, mlp if name == "mlp.down_proj" else hidden)
    weights = {f"{name}.weight": DenseWeight(shape, torch.float32, unread) for name, shape in shapes.items()}
    return Model(ARCH, {"num_hidden_layers": 2}, weights, Source("x", "0" * 64, {}, Path()))


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
    model = model.with_weights({name: QuantWeight.of(*quantize(torch.ones(128, 128), W8A16), W8A16)})
    error = refused(model, scheme="W8A8")
    module = "lm_head" if "embed" in name else name.removesuffix(".weight")
    assert error.message == f"{module} is already quantized to W8A16"
    assert "overrides" in error.hint


def test_a_second_quantizer_may_take_what_the_first_left():
    model = model_of()
    model = model.with_weights(
        {"model.embed_tokens.weight": QuantWeight.of(*quantize(torch.ones(50, 128), W8A16), W8A16)}
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
        "overrides.1.scheme": W8A16,
    }
    assert set(Chosen(scheme="W8A8", head="none").schemes()) == {"scheme"}
