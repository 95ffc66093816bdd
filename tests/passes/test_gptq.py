"""GPTQ as a pass: what it does to a model, from what it is told, and what it refuses."""

import pytest
import torch
from pydantic import ValidationError

from llmopt.calibration.input_maxima import input_maxima
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import DenseWeight, QuantWeight
from llmopt.passes.awq import Awq
from llmopt.passes.gptq import Gptq
from llmopt.passes.round_to_nearest import RoundToNearest


def test_every_family_loses_less_than_by_rounding(family_name, model_of, context, distance) -> None:
    model = model_of(family_name)
    columns = min(model.weights[model.weight_of(module)].shape[1] for module in model.linears())
    options = {"scheme": "W4A16", "group_size": 16 if columns % 16 == 0 else -1, "head": "none"}
    quantized = Gptq(**options).run(model, context[0])
    rounded = RoundToNearest(**options).run(model, context[0])
    assert {k for k, w in quantized.weights.items() if isinstance(w, QuantWeight)} == {
        model.weight_of(module) for module in model.linears()[:-1]
    }
    outputs, plain = context[1]["output_errors"], context[1]["output_errors_of_rounding"]
    assert sum(outputs.values()) < 0.9 * sum(plain.values())
    assert distance(model, quantized) < distance(model, rounded)


def test_the_input_model_is_left_alone_and_head_and_embedding_are_rounded(model_of, context) -> None:
    model = model_of("llama")
    before = {name: weight.load().clone() for name, weight in model.weights.items()}
    options = {"scheme": "W4A16", "group_size": 16, "embedding": "W8A16"}
    quantized = Gptq(**options).run(model, context[0])
    assert all(torch.equal(model.weights[name].load(), value) for name, value in before.items())
    rounded = RoundToNearest(**options).run(model, context[0])
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(quantized.weights[name].load().values, rounded.weights[name].load().values)


@pytest.mark.parametrize(
    "option",
    [
        {"token_weighting": "none"},
        {"act_order": False},
        {"damping": 0.5},
        {"clipping": "none"},
        {"clipping": "weights"},
        {"error_propagation": 0.0},
        {"inputs": "float"},
        {"true_sequential": False},
    ],
    ids=str,
)
def test_every_option_changes_the_result(option, model_of, context) -> None:
    model = model_of("llama")
    usual = {"scheme": "W4A16", "group_size": 16, "head": "none", "true_sequential": True}
    found, expected = (Gptq(**(usual | each)).run(model, context[0]) for each in (option, {}))
    names = [model.weight_of(module) for module in model.linears()[:-1]]
    assert any(not torch.equal(found.weights[n].load().values, expected.weights[n].load().values) for n in names)


def asymmetric(bits):
    return {"weights": {"num_bits": bits, "symmetric": False, "strategy": "group", "group_size": 16}}


@pytest.mark.parametrize(
    "scheme",
    ["W8A16", "W8A8", "FP8_DYNAMIC", "W4A16_ASYM", "W3A16", "W2A16", *map(asymmetric, (2, 3, 8))],
    ids=str,
)
def test_schemes(scheme, model_of, context, distance) -> None:
    model = model_of("llama")
    grouped = isinstance(scheme, str) and scheme not in ("W8A16", "W8A8", "FP8_DYNAMIC")
    options = {"scheme": scheme, "head": "none"} | ({"group_size": 16} if grouped else {})
    quantized = Gptq(**options).run(model, context[0])
    rounded = RoundToNearest(**options).run(model, context[0])
    assert distance(model, quantized) < distance(model, rounded)


def test_two_runs_give_the_same_bits(model_of, context) -> None:
    model = model_of("llama")
    one, two = (Gptq(scheme="W4A16", group_size=16).run(model, context[0]) for _ in range(2))
    for name in model.weights:
        assert torch.equal(one.weights[name].dense(), two.weights[name].dense())


def test_a_linear_that_is_never_activated_is_rounded_and_named(model_of, context) -> None:
    from dataclasses import replace

    model = model_of("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    dead = model.with_weights({name: DenseWeight.of(torch.zeros_like(model.weights[name].load()))})
    told: list[str] = []
    quantized = Gptq(scheme="W4A16", group_size=16).run(dead, replace(context[0], fallback=told.append))
    assert told == ["no calibration token activates model.layers.1.mlp.down_proj: it is rounded to nearest"]
    down = "model.layers.1.mlp.down_proj.weight"
    rounded = RoundToNearest(scheme="W4A16", group_size=16).run(dead, context[0])
    assert torch.equal(quantized.weights[down].load().values, rounded.weights[down].load().values)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(value, model_of, context) -> None:
    model = model_of("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    damaged = model.weights[name].load().clone()
    damaged[3, 5] = value
    with pytest.raises(PassError, match=f"{name} has values that are not finite"):
        Gptq(scheme="W4A16", group_size=16).run(model.with_weights({name: DenseWeight.of(damaged)}), context[0])


def test_activations_that_are_not_finite_are_named(model_of, context) -> None:
    model = model_of("llama")
    name = "model.layers.1.input_layernorm.weight"
    damaged = model.with_weights({name: DenseWeight.of(model.weights[name].load() * torch.inf)})
    with pytest.raises(PassError, match=r"what enters model\.layers\.1\.self_attn\.q_proj has values"):
        Gptq(scheme="W4A16", group_size=16).run(damaged, context[0])


def test_inputs_whose_squares_overflow_are_named(model_of, context) -> None:
    model = model_of("llama")
    name = "model.layers.1.input_layernorm.weight"
    large = model.with_weights({name: DenseWeight.of(model.weights[name].load() * 1e25)})
    options = {"token_weighting": "none", "true_sequential": True, "error_propagation": 0.0}
    with pytest.raises(PassError, match=r"the Hessian of model\.layers\.1\.self_attn\.q_proj cannot be factorized"):
        Gptq(scheme="W4A16", group_size=16, **options).run(large, context[0])


def test_errors_before_attention_are_corrected_in_models_with_experts_too(model_of, context) -> None:
    model = model_of("mixtral")
    options = {"scheme": "W4A16", "group_size": 16, "head": "none"}
    found, without = (Gptq(**options, error_propagation=share).run(model, context[0]) for share in (0.5, 0.0))
    query = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(found.weights[query].dense(), without.weights[query].dense())


def test_error_propagation_needs_quantized_inputs() -> None:
    with pytest.raises(ValidationError, match="error_propagation goes with inputs: quantized"):
        Gptq(scheme="W4A16", inputs="float", error_propagation=0.5)


def test_an_already_quantized_module_is_refused(model_of, context) -> None:
    model = model_of("llama")
    quantized = RoundToNearest(scheme="W8A16").run(model, context[0])
    with pytest.raises(PassError, match="already quantized"):
        Gptq(scheme="W4A16", group_size=16).requires(quantized)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_static_scales_of_inputs_cover_what_entered(name, model_of, context, distance) -> None:
    model = model_of("llama")
    options = {"scheme": "FP8", "head": "none"} | ({"error_propagation": 0.0} if name == "gptq" else {"scaling": False})
    quantized = {"gptq": Gptq, "awq": Awq}[name](**options).run(model, context[0])
    # The first layer sees what the float model's first layer does.
    maxima = input_maxima(model, model.decoder.layers[0].attention.inputs, context[0])
    for module, largest in maxima.items():
        scale = quantized.weights[f"{module}.weight"].load().input_scale
        assert float(scale) == pytest.approx(largest / 448, rel=1e-5)
    assert distance(model, quantized) < 1


def test_a_static_scale_of_what_enters_the_head_is_refused(model_of) -> None:
    with pytest.raises(PassError, match=r"head is FP8, and this pass chooses no static scale of what enters lm_head"):
        Gptq(scheme="W8A8", head="FP8").requires(model_of("llama"))
