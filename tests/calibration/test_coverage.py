"""What calibration text reached, and what it did not."""

import json

import pytest
import torch

from llmopt.calibration.coverage import Coverage, coverage_words
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.tokens import Tokens

TEXT = Tokens("some.txt", torch.zeros(3, 64, dtype=torch.int64), "d", lengths=torch.tensor([64, 33, 5]))


@pytest.fixture
def decoder_of(family_of, tmp_path):
    return lambda name: load_model(str(family_of(name)), cache=tmp_path).decoder


def filled(decoder, *, without=()):
    """Every linear got 60 tokens and then 42, except those ``without``."""
    coverage = Coverage(decoder, TEXT)
    for layer in decoder.layers:
        for name in layer.linears:
            if name not in without:
                coverage.add(name, 60)
                coverage.add(name, 42)
    return coverage


def test_tokens_are_summed_per_module(decoder_of):
    decoder = decoder_of("llama")
    coverage = filled(decoder)
    coverage.add(decoder.head, 7)
    details = coverage.details()
    linears = sum(len(layer.linears) for layer in decoder.layers)
    assert details["tokens"] == 102
    assert details["modules"] == {"count": linears, "tokens": 102}
    assert details["others"] == {decoder.head: 7}
    assert details["lengths"] == {"5-8": 1, "33-64": 2}
    assert details["unreached"] == []
    assert json.loads(json.dumps(details)) == details


def test_only_what_is_expected_can_be_missed(decoder_of):
    decoder = decoder_of("llama")
    wanted = decoder.layers[0].linears[:2]
    coverage = Coverage(decoder, TEXT, wanted)
    coverage.add(wanted[0], 5)
    assert coverage.unreached == [wanted[1]]


def test_a_linear_that_nothing_reached_is_an_error_that_names_it(decoder_of):
    decoder = decoder_of("llama")
    lost = decoder.layers[1].linears[-1]
    with pytest.raises(PassError, match=f"never reached {lost}$") as caught:
        filled(decoder, without=[lost]).record(PassContext())
    assert "overrides" in caught.value.hint


def test_experts_that_nothing_reached_are_listed_and_noted(decoder_of):
    decoder = decoder_of("mixtral")
    layer = decoder.layers[0]
    coverage = filled(decoder, without=layer.mlp.experts[2])
    coverage.add(layer.mlp.experts[0][0], 8)
    notes, details = [], {}
    coverage.record(PassContext(note=notes.append, detail=details.__setitem__))
    expected = [110] + [102] * (len(layer.mlp.experts) - 1)
    expected[2] = 0
    assert details["coverage"]["experts"][layer.name] == expected
    total = sum(len(each.mlp.experts) for each in decoder.layers)
    assert notes == [f"1 of {total} experts were reached by no token of the calibration text: {layer.name} expert 2"]
    words = coverage_words(details["coverage"])
    assert f"{total} experts saw 0 to 110 tokens, 1 of them none" in words


def test_words_name_the_module_with_the_fewest_tokens(decoder_of):
    decoder = decoder_of("llama")
    coverage = filled(decoder, without=[decoder.layers[0].linears[0]])
    coverage.add(decoder.layers[0].linears[0], 3)
    words = coverage_words(coverage.details())
    assert words[1] == f"1 modules saw other counts, the fewest {decoder.layers[0].linears[0]} with 3"
    assert words[-1] == "texts by tokens: 5-8: 1, 33-64: 2"


def test_full_windows_need_no_histogram_in_words(decoder_of):
    decoder = decoder_of("llama")
    coverage = Coverage(decoder, Tokens("a", torch.zeros(4, 32, dtype=torch.int64), "d"))
    assert coverage.details()["lengths"] == {"17-32": 4}
    assert not [line for line in coverage_words(coverage.details()) if line.startswith("texts")]
