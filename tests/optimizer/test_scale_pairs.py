"""Every family computes the same after random scales were moved along each of its pairs, and no pair is missed."""

from collections import Counter

import pytest
import torch

from llmopt.calibration.reference import Reference
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import DenseWeight, Model, QuantTensors, QuantWeight
from llmopt.optimizer.scale_pairs import ScalePair, head_pairs, layer_pairs, scaled
from llmopt.optimizer.scheme import PRESETS
from llmopt.optimizer.sources import load_model


def scale_pairs(model: Model) -> list[ScalePair]:
    """All pairs in data order."""
    return [*(pair for index in range(model.num_layers) for pair in layer_pairs(model, index)), *head_pairs(model)]


# Kinds of pairs in the first layer: norms whose output only linears read, values, and ups that scales pass through.
EXPECTED = {
    "olmo2": {"value": 1, "up": 1},
    "gpt2": {"norm": 2, "value": 1},
    "gpt_neox": {"norm": 2, "value": 1},
    "gpt_neox-in-sequence": {"norm": 2, "value": 1},
    "falcon": {"norm": 1, "value": 1},
    "falcon-40b": {"norm": 2, "value": 1},
    "falcon2-11b": {"norm": 1, "value": 1},
    "falcon-multi-head": {"norm": 1, "value": 1},
    "falcon-in-sequence": {"norm": 2, "value": 1},
    "opt-350m": {"value": 1, "up": 1},
    "mixtral": {"norm": 2, "value": 1, "up": 4},
    "mixtral-window": {"norm": 2, "value": 1, "up": 4},
    "qwen3_moe": {"norm": 2, "value": 1, "up": 8},
    "qwen3_moe-not-normalized": {"norm": 2, "value": 1, "up": 8},
}
USUAL = {"norm": 2, "value": 1, "up": 1}


@pytest.fixture
def family(family_of, tmp_path):
    return lambda name: load_model(str(family_of(name)), cache=tmp_path)


def random_scale(pair, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(pair.channels).uniform_(-0.7, 0.7, generator=generator).exp()


def logits(model):
    ids = torch.arange(3, 29).reshape(2, 13)
    return Reference(model).logits(ids)


def difference(model, before):
    return float((logits(model) - before).abs().max() / before.abs().max())


def test_every_family_computes_the_same_with_scales_moved_along_all_pairs(family_name, family):
    model = family(family_name)
    before = logits(model)
    for seed, pair in enumerate(scale_pairs(model)):
        changed = scaled(model, pair, random_scale(pair, seed))
        for name, weight in changed.items():
            assert not torch.allclose(weight.dense(), model.weights[name].dense(), atol=1e-3)
        model = model.with_weights(changed)
    # Float32 sums of other numbers: each is off by its last bits, through three layers with weights of 0.2.
    assert difference(model, before) < 2e-5


def test_the_pairs_of_every_family_are_known(family_name, family):
    found = Counter(pair.kind for pair in layer_pairs(family(family_name), 0))
    assert found == EXPECTED.get(family_name, USUAL)


@pytest.mark.parametrize("family_name", ["llama", "falcon-40b", "phi3", "mixtral", "opt", "gpt2"])
def test_a_pair_without_one_of_its_consumers_changes_the_function(family_name, family):
    model = family(family_name)
    before = logits(model)
    for seed, pair in enumerate(layer_pairs(model, 0)):
        changed = scaled(model, pair, random_scale(pair, seed))
        for module in pair.consumers[-1:]:
            del changed[f"{module}.weight"]
        assert difference(model.with_weights(changed), before) > 1e-4


def test_channels_and_columns_of_shared_heads_belong_together(family):
    pair = next(pair for pair in layer_pairs(family("llama-odd"), 0) if pair.kind == "value")
    assert (pair.channels, pair.sharing, pair.head_dim) == (24, 3, 24)
    scale = torch.arange(1.0, 25.0)
    assert torch.equal(pair.columns(scale), scale.repeat(3))
    grouped = next(pair for pair in layer_pairs(family("falcon-40b"), 0) if pair.kind == "value")
    numbers = torch.arange(64)
    sorted_by_channel = grouped.by_channel(numbers)
    assert sorted_by_channel.shape == (grouped.sharing, grouped.channels) == (2, 32)
    # Column c of the output linear is read from channel columns[c].
    columns = grouped.columns(torch.arange(32))
    assert all(torch.equal(columns[row], torch.arange(32)) for row in sorted_by_channel)


def test_a_tied_head_makes_no_pair_and_an_untied_one_does(family):
    assert scale_pairs(family("qwen2"))[-1].producer != "model.norm"
    untied = scale_pairs(family("llama"))[-1]
    assert (untied.producer, untied.consumers) == ("model.norm", ("lm_head",))


def test_nothing_is_read_before_the_result_is_and_the_input_is_left_alone(family):
    model = family("llama")

    def refuse():
        raise AssertionError("read")

    pair = layer_pairs(model, 0)[0]
    unread = {name: DenseWeight(weight.shape, weight.dtype, refuse) for name, weight in model.weights.items()}
    changed = scaled(model.with_weights(unread), pair, random_scale(pair, 0))
    assert {weight.dtype for weight in changed.values()} == {torch.float32}
    with pytest.raises(AssertionError, match="read"):
        changed[f"{pair.producer}.weight"].load()


def test_rows_can_be_read_without_the_others(family):
    model = family("llama")
    pair = scale_pairs(model)[-1]
    head = scaled(model, pair, random_scale(pair, 0))["lm_head.weight"]
    assert torch.equal(head.rows(7, 9), head.load()[7:9])


@pytest.mark.parametrize("scale", [torch.ones(3), torch.zeros(64), torch.full((64,), float("inf")), -torch.ones(64)])
def test_scales_that_are_none_are_refused(family, scale):
    model = family("llama")
    with pytest.raises(ValueError, match=r"model.layers.0.input_layernorm"):
        scaled(model, layer_pairs(model, 0)[0], scale)


def test_a_quantized_weight_is_refused(family):
    model = family("llama")
    name = "model.layers.0.self_attn.k_proj.weight"
    shape = model.weights[name].shape
    zeros = QuantTensors(torch.zeros(shape, dtype=torch.int8), torch.ones(shape[0], 1), None)
    rounded = QuantWeight.of(zeros, PRESETS["W8A16"])
    with pytest.raises(PassError, match=r"k_proj.weight is already quantized to W8A16"):
        scaled(model.with_weights({name: rounded}), layer_pairs(model, 0)[0], torch.ones(64))
