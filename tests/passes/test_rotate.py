"""Rotations folded into weights: the same function in every family, or a refusal with what is possible instead."""

import pytest
import torch

from llmopt.calibration.reference import Reference
from llmopt.calibration.same_function import verify_same_function
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import DenseWeight
from llmopt.optimizer.sources import load_model
from llmopt.passes.rescale import Rescale
from llmopt.passes.rotate import Rotate
from llmopt.passes.round_to_nearest import RoundToNearest

REFUSED = {
    "gemma2": "post_attention_layernorm stands behind a branch",
    "gemma3": "post_attention_layernorm stands behind a branch",
    "olmo2": "post_attention_layernorm stands behind a branch",
    "opt-350m": "self_attn_layer_norm stands in the residual stream itself",
}
EXPERTS = ("mixtral", "mixtral-window", "qwen3_moe", "qwen3_moe-not-normalized")
IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture
def family(family_of, tmp_path):
    return lambda name: load_model(str(family_of(name)), cache=tmp_path)


def rotated(model, context=None, **options):
    one = Rotate(**options)
    one.requires(model)
    return one.run(model, context or PassContext())


def same(model, after):
    """The whole model's logits agree: float32 sums of rotated numbers, through three layers with weights of 0.2."""
    before, behind = Reference(model).logits(IDS), Reference(after).logits(IDS)
    return float((behind - before).abs().max() / before.abs().max()) < 5e-5


def test_every_family_computes_the_same_or_is_refused_by_name(family_name, family):
    model = family(family_name)
    if family_name in REFUSED:
        with pytest.raises(PassError, match=REFUSED[family_name]) as caught:
            Rotate().requires(model)
        assert "residual: false" in caught.value.hint
        return
    after = rotated(model)
    assert same(model, after)
    verify_same_function("rotate", model, after, level="full", seed=0)


def test_heads_alone_are_rotated_in_every_family(family_name, family):
    model = family(family_name)
    after = rotated(model, residual=False)
    assert same(model, after)
    attention = model.decoder.layers[0].attention
    changed = {name for name, weight in after.weights.items() if weight is not model.weights[name]}
    assert {f"{attention.values_in}.weight", f"{attention.output}.weight"} <= changed


def test_what_enters_the_down_projection_is_rotated_by_the_engine_in_every_family(family_name, family):
    model = family(family_name)
    if family_name in EXPERTS:
        with pytest.raises(PassError, match="has a mixture of experts, which no kernel runs with an online rotation"):
            rotated(model, residual=False, heads=False, online={"down_proj": 16})
        return
    block = 12 if family_name == "llama-odd" else 16
    after = rotated(model, residual=False, heads=False, online={"down_proj": block})
    down = model.decoder.layers[1].mlp.down
    assert after.input_rotation(down).shape == (block, block)
    assert same(model, after)
    without = {name: weight for name, weight in after.weights.items() if not name.endswith("input_rotation")}
    assert not same(model, model.with_weights(without))


def test_all_channels_of_the_stream_are_alike_afterwards(float_model_of):
    model = float_model_of()
    name = "model.embed_tokens.weight"
    table = model.weights[name].dense().clone()
    table[:, 5] *= 100
    model = model.with_weights({name: DenseWeight.of(table)})

    def peak(of):
        size = Reference(of).embed(IDS).square().mean((0, 1)).sqrt()
        return float(size.max() / size.mean())

    assert peak(model) > 20
    assert peak(rotated(model)) < 1.2


def test_norms_become_ones_and_weights_are_float32(float_model_of):
    after = rotated(float_model_of(dtype="bfloat16"))
    norms = [name for name in after.weights if "norm" in name]
    assert all(torch.equal(after.weights[name].dense(), torch.ones(64)) for name in norms)
    assert {weight.dtype for weight in after.weights.values()} == {torch.float32}


def test_a_tied_head_gets_a_table_of_its_own_which_is_noted(float_model_of):
    notes = []
    model = float_model_of()
    after = rotated(model, PassContext(note=notes.append))
    assert model.is_tied
    assert not after.is_tied
    assert notes == [
        "lm_head has a table of its own now, 512 x 64: the final norm's weight is folded into it, "
        "and not into the embedding"
    ]


def test_a_head_stays_tied_where_the_final_norm_treats_all_channels_alike(float_model_of):
    model = float_model_of()
    model = model.with_weights({"model.norm.weight": DenseWeight.of(torch.full((64,), 1.5))})
    after = rotated(model)
    assert after.is_tied
    assert same(model, after)


def test_heads_only_leave_tables_and_norms_as_they_are(float_model_of):
    model = float_model_of()
    after = rotated(model, residual=False)
    changed = {name.split(".")[-2] for name, weight in after.weights.items() if weight is not model.weights[name]}
    assert changed == {"v_proj", "o_proj"}


def test_a_norms_bias_stays_with_it_where_linears_have_none(family):
    """Falcon 7b: the bias of its LayerNorm, divided by the weight and rotated, since no linear can take it."""
    model = family("falcon")
    after = rotated(model)
    name = "transformer.h.0.input_layernorm.bias"
    assert after.weights[name].dense().abs().min() > 0
    taken = rotated(family("gpt2")).weights["transformer.h.0.ln_1.bias"].dense()
    assert torch.equal(taken, torch.zeros(64))


def test_a_bias_that_no_linear_can_take_and_no_weight_can_carry_is_refused(family):
    model = family("falcon")
    name = "transformer.h.1.input_layernorm.weight"
    weight = model.weights[name].dense().clone()
    weight[7] = 0.0
    with pytest.raises(PassError, match=r"h\.1\.input_layernorm has a channel with a bias and no weight"):
        rotated(model.with_weights({name: DenseWeight.of(weight)}))


def test_a_large_table_is_turned_a_few_rows_at_a_time(float_model_of):
    after = rotated(float_model_of())
    table = after.weights["lm_head.weight"]
    assert torch.equal(table.rows(3, 6), table.load()[3:6])


def test_the_seed_decides(float_model_of):
    model = float_model_of()
    name = "model.layers.0.mlp.up_proj.weight"
    first, again, other = (rotated(model, PassContext(seed=seed)).weights[name].dense() for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_the_orders_of_the_factors_are_recorded(float_model_of):
    details = {}
    rotated(float_model_of(), PassContext(detail=details.__setitem__), online={"down_proj": 32})
    assert details["rotations"] == {"residual": [64], "heads": [16], "online": [32]}


def test_rotations_of_several_passes_go_together(float_model_of):
    model = float_model_of()
    after = rotated(rotated(Rescale().run(model, PassContext()), residual=False), heads=False)
    assert same(model, rotated(after, residual=False, heads=False, online={"down_proj": 64}))


def test_scales_no_longer_move_through_an_online_rotation(float_model_of):
    model = float_model_of()
    after = rotated(model, residual=False, heads=False, online={"down_proj": 64})
    assert same(model, Rescale().run(after, PassContext()))


def test_experts_and_routers_are_rotated_expert_by_expert(family):
    model = family("mixtral")
    after = rotated(model)
    changed = [name for name in after.weights if after.weights[name] is not model.weights[name]]
    assert len([name for name in changed if ".experts." in name]) == 3 * 4 * 3
    assert len([name for name in changed if name.endswith("block_sparse_moe.gate.weight")]) == 3


@pytest.mark.parametrize(
    ("options", "said", "hint"),
    [
        ({"residual": False, "heads": False}, "residual, heads and online are all off", "remove the pass"),
        ({"online": {"down_proj": 48}}, r"mlp.down_proj has 128 input columns, not a multiple", "16, 32, 64, 128"),
    ],
)
def test_options_that_do_not_fit_are_refused(float_model_of, options, said, hint):
    with pytest.raises(PassError, match=said) as caught:
        Rotate(**options).requires(float_model_of())
    assert hint in caught.value.hint


def test_a_second_online_rotation_is_refused(float_model_of):
    after = rotated(float_model_of(), online={"down_proj": 64})
    with pytest.raises(PassError, match="has an online rotation already"):
        Rotate(online={"down_proj": 64}).requires(after)


def test_a_quantized_model_is_refused(float_model_of):
    model = RoundToNearest(scheme="W8A8").run(float_model_of(), PassContext())
    with pytest.raises(PassError, match="is already quantized to W8A8"):
        Rotate().requires(model)
