"""SmoothQuant: the same function, activations and weights evened out, and what is refused."""

import pytest
import torch

from llmopt.calibration.layerwise import Layerwise
from llmopt.calibration.reference import Reference
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import DenseWeight
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.tokens import Tokens
from llmopt.passes.round_to_nearest import RoundToNearest
from llmopt.passes.smoothquant import Smoothquant, smoothing_scale

IDS = torch.randint(3, 101, (12, 24), generator=torch.Generator().manual_seed(0))
EVERY = ("norm", "value", "up")
PAIRS = {"olmo2": ("value", "up"), "opt-350m": ("value", "up")}


@pytest.fixture
def smoothed(monkeypatch):
    """Runs the pass on a text; keywords are its options, ``details`` takes what it records."""
    monkeypatch.setattr("llmopt.calibration.layerwise.fast_dtype", lambda: torch.float32)
    tokens = Tokens(name="it", ids=IDS, digest="0")

    def make(model, *, details=None, notes=None, **options):
        one = Smoothquant(**options)
        one.requires(model)
        found = {} if details is None else details
        told = [] if notes is None else notes
        return one.run(model, PassContext(calibration=lambda: tokens, detail=found.__setitem__, note=told.append))

    return make


def agree(model, after):
    before, behind = Reference(model).logits(IDS[:2]), Reference(after).logits(IDS[:2])
    return float((behind - before).abs().max() / before.abs().max()) < 5e-5


def largest_inputs(model, module, tmp_path):
    seen = []
    text = Layerwise(model, Tokens(name="it", ids=IDS, digest="0"), dtype=torch.float32, directory=tmp_path)
    text.observe([module], lambda _, rows: seen.append(rows.abs().amax(0)))
    return torch.stack(seen).amax(0)


def test_every_family_computes_the_same(family_name, family_of, smoothed, tmp_path):
    model = load_model(str(family_of(family_name)), cache=tmp_path)
    after = smoothed(model, pairs=PAIRS.get(family_name, EVERY))
    assert any(after.weights[name] is not weight for name, weight in model.weights.items())
    assert agree(model, after)


def test_at_one_half_activations_and_weights_have_equal_ranges_in_every_channel(float_model_of, smoothed, tmp_path):
    model = float_model_of()
    after = smoothed(model, alpha=0.5)
    inputs = largest_inputs(after, "model.layers.0.self_attn.q_proj", tmp_path)
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    weights = torch.cat([after.weights[name].dense() for name in names]).abs().amax(0)
    torch.testing.assert_close(inputs, weights, rtol=1e-4, atol=0)


def test_at_one_all_channels_of_the_activations_have_the_same_range(float_model_of, smoothed, tmp_path):
    after = smoothed(float_model_of(), alpha=1.0, pairs=EVERY)
    for module in ("self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj"):
        inputs = largest_inputs(after, f"model.layers.0.{module}", tmp_path)
        torch.testing.assert_close(inputs, torch.ones_like(inputs), rtol=1e-4, atol=0)


def test_heads_that_share_values_share_their_scales(float_model_of, smoothed, tmp_path):
    after = smoothed(float_model_of(), alpha=1.0, pairs=["value"])
    inputs = largest_inputs(after, "model.layers.0.self_attn.o_proj", tmp_path).reshape(2, 2, 16)
    torch.testing.assert_close(inputs.amax(1), torch.ones(2, 16), rtol=1e-4, atol=0)


def test_a_scale_is_the_papers_equation_and_one_where_nothing_flows():
    inputs, weights = torch.tensor([16.0, 4.0, 0.0, 3.0]), torch.tensor([0.25, 1.0, 2.0, 0.0])
    expected = torch.tensor([16**0.75 / 0.25**0.25, 4**0.75, 1.0, 1.0])
    torch.testing.assert_close(smoothing_scale(inputs, weights, alpha=0.75), expected)


def test_a_channel_that_stands_out_costs_less_in_w8a8(float_model_of, smoothed):
    model = float_model_of()
    loud = {}
    for name, weight in model.weights.items():
        if name.endswith("layernorm.weight"):
            values = weight.dense().clone()
            values[[3, 40]] *= 60
            loud[name] = DenseWeight.of(values)
    model = model.with_weights(loud)
    expected = Reference(model).logits(IDS)

    def lost(prepared):
        quantized = RoundToNearest(scheme="W8A8", head="none").run(prepared, PassContext())
        return float((Reference(quantized).logits(IDS) - expected).square().mean())

    assert lost(smoothed(model)) < 0.6 * lost(model)


def test_the_spread_of_every_pairs_scales_is_recorded(float_model_of, smoothed):
    details = {}
    smoothed(float_model_of(), details=details)
    norms = [f"model.layers.{i}.{name}_layernorm" for i in range(3) for name in ("input", "post_attention")]
    assert list(details["spreads"]) == norms
    assert min(details["spreads"].values()) > 1


def test_a_family_without_such_channels_is_refused_with_those_it_has(family_of, tmp_path):
    model = load_model(str(family_of("olmo2")), cache=tmp_path)
    with pytest.raises(PassError, match="olmo2 has no channels of the kind norm") as caught:
        Smoothquant().requires(model)
    assert caught.value.hint == "pairs that it has: up, value"


def test_a_quantized_model_is_refused(float_model_of):
    model = RoundToNearest(scheme="W8A8").run(float_model_of(), PassContext())
    with pytest.raises(PassError, match="is already quantized to W8A8"):
        Smoothquant().requires(model)


def test_activations_that_are_not_finite_are_named(float_model_of, smoothed):
    model = float_model_of()
    name = "model.layers.0.input_layernorm.weight"
    broken = model.with_weights({name: DenseWeight.of(torch.full((64,), float("inf")))})
    with pytest.raises(PassError, match=r"what enters model\.layers\.0\.self_attn\.q_proj has values"):
        smoothed(broken)
