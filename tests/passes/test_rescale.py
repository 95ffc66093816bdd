"""Moved scales: the same function from other weights, drawn from the recipe's seed, off the grid of a 4-bit file."""

import pytest
import torch

from llmopt.calibration.same_function import verify_same_function
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import DenseWeight
from llmopt.optimizer.rounding import quantize
from llmopt.optimizer.scheme import PRESETS
from llmopt.optimizer.sources import load_model
from llmopt.passes.rescale import Rescale
from llmopt.passes.round_to_nearest import RoundToNearest


def rescaled(model, *, seed=0, **options):
    return Rescale(**options).run(model, PassContext(seed=seed))


def rounding_error(values, scheme):
    return float((quantize(values, scheme).dense() - values).norm() / values.norm())


def test_every_family_computes_the_same(family_name, family_of, tmp_path):
    model = load_model(str(family_of(family_name)), cache=tmp_path)
    verify_same_function("rescale", model, rescaled(model), level="full", seed=0)


def test_every_weight_of_a_layer_is_another(float_model_of):
    model = float_model_of(attention_bias=True)
    result = rescaled(model)
    same = [name for name, weight in result.weights.items() if weight.dense().equal(model.weights[name].dense())]
    # Query and key take part by their columns only, output linears and norms of a tied head have no channel to move.
    biases = [f"model.layers.{i}.self_attn.{part}_proj.bias" for i in range(3) for part in "kqo"]
    assert sorted(same) == sorted(["model.embed_tokens.weight", "model.norm.weight", *biases])


def test_factors_lie_between_the_range_and_its_inverse(float_model_of):
    model = float_model_of()
    result = rescaled(model, range=3)
    name = "model.layers.1.input_layernorm.weight"
    factors = result.weights[name].dense() / model.weights[name].dense()
    assert factors.min() > 1 / 3 - 1e-6
    assert factors.max() < 3 + 1e-6
    assert factors.max() / factors.min() > 4


def test_a_seed_gives_the_same_scales_and_another_seed_others(float_model_of):
    model = float_model_of()
    name = "model.layers.2.mlp.down_proj.weight"
    first, again, other = (rescaled(model, seed=seed).weights[name].dense() for seed in (3, 3, 4))
    assert first.equal(again)
    assert not torch.allclose(first, other)


def test_weights_that_lie_on_a_grid_are_taken_off_it(float_model_of):
    model = float_model_of()
    scheme = PRESETS["W4A16_ASYM"].with_group_size(32)
    name = "model.layers.0.mlp.down_proj.weight"
    values = quantize(model.weights[name].dense(), scheme).dense()
    assert rounding_error(values, scheme) < 1e-6
    off_grid = rescaled(model.with_weights({name: DenseWeight.of(values)})).weights[name].dense()
    assert rounding_error(off_grid, scheme) > 0.03


def test_how_many_scales_were_moved_is_recorded(float_model_of):
    details = {}
    Rescale().run(float_model_of(), PassContext(detail=details.__setitem__))
    assert details["scales"] == {"norm": 3 * 2 * 64, "value": 3 * 32, "up": 3 * 128}


def test_a_quantized_model_is_refused(float_model_of):
    model = RoundToNearest(scheme="W8A8").run(float_model_of(), PassContext())
    with pytest.raises(PassError, match="is already quantized to W8A8") as caught:
        Rescale().requires(model)
    assert "before the quantizing pass" in caught.value.hint
