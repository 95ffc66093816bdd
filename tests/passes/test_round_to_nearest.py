"""Round-to-nearest over whole models: what is rounded, with which scheme, and what it tells."""

import json

import pytest
import torch

from llmopt.calibration.reference import Reference
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import DenseWeight, QuantWeight
from llmopt.optimizer.rounding import quantize
from llmopt.optimizer.scheme import PRESETS
from llmopt.passes.round_to_nearest import RoundToNearest

IDS = torch.randint(0, 512, (4, 16), generator=torch.Generator().manual_seed(0))


def rounded(model, context=None, **options):
    return RoundToNearest(**options).run(model, context or PassContext())


def test_every_linear_and_the_head_are_rounded_and_nothing_else(float_model_of):
    model = float_model_of(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    result = rounded(model, scheme="W8A8")
    quantized = {name for name, weight in result.weights.items() if isinstance(weight, QuantWeight)}
    assert quantized == {f"{module}.weight" for module in model.linears()}
    assert all(result.weights[name] is model.weights[name] for name in set(model.weights) - quantized)


def test_each_weight_is_what_rounding_makes_of_it(float_model_of):
    model = float_model_of()
    result = rounded(model, scheme="W4A16", group_size=32)
    scheme = PRESETS["W4A16"].with_group_size(32)
    for module in model.linears()[:-1]:
        expected = quantize(model.weights[f"{module}.weight"].dense(), scheme)
        found = result.weights[f"{module}.weight"]
        assert found.scheme == scheme
        assert found.load().values.equal(expected.values)
        assert found.load().scale.equal(expected.scale)


def test_a_tied_table_is_rounded_once_for_both_ends(float_model_of):
    model = float_model_of()
    result = rounded(model, scheme="W8A8")
    assert result.is_tied
    table = result.weights["model.embed_tokens.weight"]
    assert isinstance(table, QuantWeight)
    assert table.scheme == PRESETS["W8A8"]
    assert "lm_head.weight" not in result.weights


def test_the_embedding_of_an_untied_model_stays_in_float(float_model_of):
    result = rounded(float_model_of(tie_word_embeddings=False), scheme="W8A8")
    assert isinstance(result.weights["model.embed_tokens.weight"], DenseWeight)
    assert isinstance(result.weights["lm_head.weight"], QuantWeight)


def test_an_untied_embedding_is_rounded_when_it_is_asked_for(float_model_of):
    result = rounded(float_model_of(tie_word_embeddings=False), scheme="W8A8", embedding="W8A16")
    table = result.weights["model.embed_tokens.weight"]
    assert table.scheme == PRESETS["W8A16"]
    embedded = Reference(result).embed(IDS)
    assert torch.equal(embedded, table.dense()[IDS])


def test_nothing_to_round_gives_the_model_itself(float_model_of):
    model = float_model_of()
    result = rounded(model, scheme="W8A8", overrides=[{"match": "re:.*", "scheme": "none"}])
    assert result is model


def test_bfloat16_is_rounded_from_its_float32_values(float_model_of):
    model = float_model_of(dtype="bfloat16")
    name = "model.layers.0.mlp.up_proj.weight"
    assert model.weights[name].dtype == torch.bfloat16
    found = rounded(model, scheme="W8A16").weights[name]
    assert found.load().values.equal(quantize(model.weights[name].load().float(), PRESETS["W8A16"]).values)


def kl(model, **options):
    """The divergence of the rounded model's distribution of the next token from the model's own."""
    expected, found = (Reference(m).logits(IDS).log_softmax(-1) for m in (model, rounded(model, **options)))
    return float(torch.nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean"))


def test_finer_schemes_stay_closer_to_the_model(float_model_of):
    model = float_model_of(hidden_size=128, head_dim=32)
    eight = kl(model, scheme="W8A16")
    fine, coarse = (kl(model, scheme="W4A16", group_size=size, head="none") for size in (32, 128))
    assert 0 <= eight < fine < coarse


def test_zero_points_are_worth_their_bits(float_model_of):
    model = float_model_of(hidden_size=128, head_dim=32)
    model = model.with_weights(
        {n: DenseWeight.of(w.dense() + 0.1) for n, w in model.weights.items() if n.endswith("_proj.weight")}
    )
    errors = {}
    for scheme in ("W4A16", "W4A16_ASYM"):
        rounded(
            model, PassContext(detail=lambda _, found, scheme=scheme: errors.update({scheme: found})), scheme=scheme
        )
    assert all(errors["W4A16_ASYM"][module] < errors["W4A16"][module] for module in model.linears()[:-1])


def test_errors_are_recorded_for_each_module(float_model_of):
    model = float_model_of(num_hidden_layers=1)
    details = {}
    result = rounded(model, PassContext(detail=details.__setitem__), scheme="W8A8")
    assert list(details["errors"]) == model.linears()
    for module, error in details["errors"].items():
        name = model.weight_of(module)
        before, after = model.weights[name].dense(), result.weights[name].dense()
        assert error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-6)
    assert json.loads(json.dumps(details)) == details


def test_a_weight_of_zeros_has_no_error(float_model_of):
    model = float_model_of(num_hidden_layers=1)
    name = "model.layers.0.mlp.up_proj.weight"
    model = model.with_weights({name: DenseWeight.of(torch.zeros(model.weights[name].shape))})
    details = {}
    rounded(model, PassContext(detail=details.__setitem__), scheme="W8A8")
    assert details["errors"]["model.layers.0.mlp.up_proj"] == 0


def test_progress_counts_modules_and_every_weight_is_kept_once(float_model_of):
    model = float_model_of(num_hidden_layers=1)
    steps, kept = [], []

    def keep(weights):
        kept.extend(weights)
        return weights

    rounded(model, PassContext(progress=lambda *step: steps.append(step), keep=keep), scheme="W8A8")
    count = len(model.linears())
    assert steps == [(done, count) for done in range(1, count + 1)]
    assert kept == [model.weight_of(module) for module in model.linears()]


def test_what_keep_returns_is_what_the_model_holds(float_model_of):
    model = float_model_of(num_hidden_layers=1)
    stored = {}

    def keep(weights):
        copies = {
            name: QuantWeight.of(weight.load()._replace(scale=weight.load().scale.clone()), weight.scheme)
            for name, weight in weights.items()
        }
        stored.update(copies)
        return copies

    result = rounded(model, PassContext(keep=keep), scheme="W8A8")
    assert all(result.weights[name] is weight for name, weight in stored.items())


def test_two_runs_are_bit_identical_whatever_the_seed(float_model_of):
    model = float_model_of(num_hidden_layers=1)
    first, second = (rounded(model, PassContext(seed=seed), scheme="W4A16_ASYM", group_size=16) for seed in (0, 1))
    for name, weight in first.weights.items():
        if isinstance(weight, QuantWeight):
            tensors, other = weight.load(), second.weights[name].load()
            assert tensors.values.equal(other.values)
            assert tensors.scale.equal(other.scale)
            assert (tensors.zero is None and other.zero is None) or tensors.zero.equal(other.zero)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(float_model_of, value):
    model = float_model_of(num_hidden_layers=1)
    name = "model.layers.0.mlp.up_proj.weight"
    damaged = model.weights[name].load().clone()
    damaged[3, 5] = value
    with pytest.raises(PassError, match=name):
        rounded(model.with_weights({name: DenseWeight.of(damaged)}), scheme="W8A8")
