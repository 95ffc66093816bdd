"""AWQ as a pass: the function of the float model is kept by its scales, and rounding them loses less."""

from dataclasses import replace

import pytest
import torch

from llmopt.calibration.reference import Reference
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import DenseWeight, QuantWeight
from llmopt.optimizer.scale_pairs import layer_pairs
from llmopt.passes.awq import Awq
from llmopt.passes.gptq import Gptq
from llmopt.passes.round_to_nearest import RoundToNearest

OTHER = torch.randint(3, 101, (8, 24), generator=torch.Generator().manual_seed(1))
OPTIONS = {"scheme": "W4A16", "group_size": 16, "head": "none"}


def uneven(model):
    """The same function with norms whose channels differ by up to 30, which is what AWQ is made for."""
    from llmopt.optimizer.scale_pairs import scaled

    generator = torch.Generator().manual_seed(5)
    for index in range(model.num_layers):
        for pair in layer_pairs(model, index):
            scale = torch.exp(torch.empty(pair.channels).uniform_(-1.7, 1.7, generator=generator))
            changed = scaled(model, pair, scale)
            model = model.with_weights({name: DenseWeight.of(weight.dense()) for name, weight in changed.items()})
    return model


def test_every_family_with_uneven_channels_loses_less_than_by_rounding(
    family_name, model_of, context, distance
) -> None:
    model = uneven(model_of(family_name))
    columns = min(model.weights[model.weight_of(module)].shape[1] for module in model.linears())
    options = OPTIONS | ({} if columns % 16 == 0 else {"group_size": -1})
    quantized = Awq(**options).run(model, context[0])
    assert {k for k, w in quantized.weights.items() if isinstance(w, QuantWeight)} == {
        model.weight_of(module) for module in model.linears()[:-1]
    }
    rounded = RoundToNearest(**options).run(model, context[0])
    assert distance(model, quantized) < 0.9 * distance(model, rounded)


def test_without_rounding_the_function_stays_and_another_quantizer_gains(model_of, context, distance) -> None:
    model = uneven(model_of("llama"))
    scaled = Awq(**OPTIONS, rounds=False).run(model, context[0])
    assert not any(isinstance(weight, QuantWeight) for weight in scaled.weights.values())
    torch.testing.assert_close(Reference(scaled).logits(OTHER), Reference(model).logits(OTHER), rtol=1e-3, atol=1e-3)
    plain, prepared = (Gptq(**OPTIONS).run(each, context[0]) for each in (model, scaled))
    assert distance(model, prepared) < distance(model, plain)


def test_ranges_alone_are_searched_without_scaling(model_of, context, distance) -> None:
    model = model_of("llama")
    quantized = Awq(**OPTIONS, scaling=False).run(model, context[0])
    norms = [name for name in model.weights if "norm" in name]
    assert all(quantized.weights[name] is model.weights[name] for name in norms)
    rounded = RoundToNearest(**OPTIONS).run(model, context[0])
    assert distance(model, quantized) < distance(model, rounded)


@pytest.mark.parametrize(
    "option", [{"token_weighting": "none"}, {"clipping": "none"}, {"clipping": "weights"}], ids=str
)
def test_every_option_changes_the_result(option, model_of, context) -> None:
    model = uneven(model_of("llama"))
    found, expected = (Awq(**(OPTIONS | each)).run(model, context[0]) for each in (option, {}))
    names = [model.weight_of(module) for module in model.linears()[:-1]]
    assert any(not torch.equal(found.weights[n].dense(), expected.weights[n].dense()) for n in names)


def test_what_scales_gained_and_what_rounding_lost_is_recorded(model_of, context) -> None:
    model = uneven(model_of("llama"))
    Awq(**OPTIONS).run(model, context[0])
    details = context[1]
    assert details["scaling"].keys() == {
        pair.producer for i in range(model.num_layers) for pair in layer_pairs(model, i)
    }
    assert min(details["scaling"].values()) < 0.8
    assert details["output_errors"].keys() == set(model.linears()[:-1])


@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "W3A16", "W2A16"])
def test_schemes(scheme, model_of, context, distance) -> None:
    model = uneven(model_of("llama"))
    options = {"scheme": scheme, "group_size": 16, "head": "none"}
    rounded = RoundToNearest(**options).run(model, context[0])
    assert distance(model, Awq(**options).run(model, context[0])) < distance(model, rounded)


def test_a_linear_that_is_never_activated_is_rounded_and_named(model_of, context) -> None:
    model = model_of("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    dead = model.with_weights({name: DenseWeight.of(torch.zeros_like(model.weights[name].load()))})
    told: list[str] = []
    quantized = Awq(**OPTIONS, scaling=False).run(dead, replace(context[0], fallback=told.append))
    assert told == ["no calibration token activates model.layers.1.mlp.down_proj: it is rounded to nearest"]
    down = "model.layers.1.mlp.down_proj.weight"
    rounded = RoundToNearest(**OPTIONS).run(dead, context[0])
    assert torch.equal(quantized.weights[down].load().values, rounded.weights[down].load().values)


def test_what_the_text_reached_is_told_of_linears_alone(model_of, context) -> None:
    model = uneven(model_of("llama"))
    Awq(**OPTIONS).run(model, context[0])
    assert context[1]["coverage"]["modules"] == {"count": len(model.linears()) - 1, "tokens": 48 * 24}
    assert context[1]["coverage"]["others"] == {}


def test_a_weight_that_is_not_finite_is_named(model_of, context) -> None:
    model = model_of("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    damaged = model.weights[name].load().clone()
    damaged[3, 5] = torch.nan
    with pytest.raises(PassError, match=f"{name} has values that are not finite"):
        Awq(**OPTIONS).run(model.with_weights({name: DenseWeight.of(damaged)}), context[0])


def test_linears_that_stay_in_float_are_scaled_with_the_others(model_of, context, distance) -> None:
    model = uneven(model_of("llama"))
    overrides = ({"match": "re:.*q_proj", "scheme": "none"},)
    quantized = Awq(**OPTIONS, overrides=overrides).run(model, context[0])
    query = "model.layers.0.self_attn.q_proj.weight"
    assert isinstance(quantized.weights[query], DenseWeight)
    assert not torch.equal(quantized.weights[query].dense(), model.weights[query].dense())
    assert distance(model, quantized) < distance(model, RoundToNearest(**OPTIONS).run(model, context[0]))
