"""Encoders as the compiler sees them: names of parts, what is shared with decoders, and what is refused."""

import pytest

from llmopt.optimizer import arch
from llmopt.optimizer.errors import PassError, UnsupportedError
from llmopt.optimizer.sources import load_model
from llmopt.passes.round_to_nearest import RoundToNearest


@pytest.fixture
def model(encoder_of, encoder_name, tmp_path):
    return load_model(str(encoder_of(encoder_name)), cache=tmp_path)


def test_the_linears_are_all_matrices_but_tables(model):
    tables = {"embeddings", "relative_attention_bias"}
    matrices = [
        name.removesuffix(".weight")
        for name, weight in model.weights.items()
        if len(weight.shape) == 2 and not tables & set(name.split("."))
    ]
    assert sorted(model.linears()) == sorted(matrices)
    assert len(model.encoder.layers) == model.num_layers == model.config["num_hidden_layers"]


def test_the_longest_text_has_a_position_for_every_token(model):
    assert model.encoder.max_positions == 64


@pytest.mark.parametrize(("encoder_name", "types"), [("bert", True), ("roberta", False), ("mpnet", False)])
def test_token_types_are_an_input_where_there_are_several(model, types):
    assert model.encoder.has_token_types is types


def test_what_needs_a_decoder_says_so(model):
    for ask in (lambda: model.decoder, lambda: model.arch, lambda: model.cache_scales(0)):
        with pytest.raises(UnsupportedError, match=f"{model.family.name} is an encoder") as error:
            ask()
        assert "round_to_nearest" in error.value.hint
    assert not model.is_tied


@pytest.mark.parametrize("encoder_name", ["bert"])
@pytest.mark.parametrize(("option", "said"), [("head", "an encoder has none"), ("experts", "no mixtures of experts")])
def test_options_for_parts_that_encoders_lack_are_refused(model, option, said):
    with pytest.raises(PassError, match=said):
        RoundToNearest(scheme="W8A16", **{option: "W8A16"}).requires(model)


def test_every_architecture_belongs_to_one_family():
    names = [name for family in [*arch.known(), *arch.known_encoders()] for name in family.models]
    assert len(names) == len(set(names))
    assert [family.name for family in arch.known_encoders()] == ["bert", "modernbert", "mpnet", "roberta"]
