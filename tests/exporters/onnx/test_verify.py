"""Every graph pass is run against the graph before it, and one that breaks a layer is named with node and input."""

import sys
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch

from llmopt.exporters.onnx.sessions import Sessions
from llmopt.exporters.onnx.verify import _quick, verify_lowering
from llmopt.optimizer.decoder import Norm
from llmopt.optimizer.errors import MissingExtraError, VerificationError
from llmopt.optimizer.model import DenseWeight
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.target import TARGETS
from llmopt.passes.graph import (
    fuse_activation,
    fuse_gate_up,
    fuse_norm,
    lower_attention,
    lower_linear,
    select_rows,
    share_activation_quantization,
)

CPU = TARGETS["cpu"]


def verified(model, level="quick", seed=0):
    return verify_lowering(model, CPU, level=level, seed=seed)


@pytest.mark.parametrize(("level", "layers"), [("none", []), ("quick", [0, 2, 3]), ("full", [0, 1, 2, 3])])
def test_a_level_says_which_layers_are_run(model_of, level, layers):
    found = verified(model_of(num_hidden_layers=4), level)
    assert list(found) == [f"layers.{i}" for i in layers]


@pytest.mark.parametrize(("count", "layers"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2])])
def test_quick_takes_every_layer_of_a_small_model_once(model_of, count, layers):
    assert list(verified(model_of(num_hidden_layers=count))) == [f"layers.{i}" for i in layers]


@pytest.mark.parametrize(
    ("scheme", "options", "limit"),
    [
        (None, {}, 1e-5),
        ("W8A8", {}, 1e-5),
        ("W8A16", {}, 1e-5),
        ("W4A16_ASYM", {"group_size": 16}, 1e-5),
        ("W8A8", {"head": "W8A16"}, 1e-5),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_a_right_lowering_stays_within_the_limit(model_of, scheme, options, limit, biased):
    changes = {"num_hidden_layers": 1, "attention_bias": biased, "mlp_bias": biased}
    (differences,) = verified(model_of(scheme, options, **changes)).values()
    assert all(0 <= difference < limit for difference in differences.values())
    assert scheme in (None, "W8A8") or differences["all"] > 0
    assert {"select_rows", "fuse_qkv", "lower_attention"} <= differences.keys()


def test_the_same_seed_finds_the_same(model_of):
    model = model_of("W8A16", num_hidden_layers=1)
    assert verified(model, seed=4) == verified(model, seed=4)
    assert verified(model, seed=4) != verified(model, seed=5)


def scaled(rewrite, factor):
    """A rewrite whose result is multiplied: a rule with a mistake in it."""

    def wrong(self, op, *args, **matched):
        value = rewrite(self, op, *args, **matched)
        return op.Mul(value, op.Constant(value_float=factor))

    return wrong


@pytest.mark.parametrize("scheme", [None, "W8A8", "W8A16"])
def test_a_broken_graph_pass_is_caught(model_of, monkeypatch, scheme):
    monkeypatch.setattr(fuse_activation._SiluRule, "rewrite", scaled(fuse_activation._SiluRule.rewrite, 1.5))
    message = r"^layer 0: fuse_activation changes the result: .* by .* is accepted; first at Mul "
    with pytest.raises(VerificationError, match=message + r"model.layers.0.mlp.activated.rows, for ") as caught:
        verified(model_of(scheme))
    assert "for 17 tokens behind 0 cached ones (seed 0)" in str(caught.value)
    assert caught.value.exit_code == 6
    assert "graph pass" in caught.value.hint


def test_a_small_mistake_is_caught_where_kernels_are_exact(model_of, monkeypatch):
    monkeypatch.setattr(lower_linear._PerTokenRule, "rewrite", scaled(lower_linear._PerTokenRule.rewrite, 1.01))
    with pytest.raises(VerificationError, match="layer 0: lower_linear changes the result"):
        verified(model_of("W8A8"))


def test_the_layer_that_differs_is_named(model_of, monkeypatch):
    right = fuse_norm._SkipNormRule.rewrite

    def wrong(self, op, x, y, weight, normed):
        if float(weight.const_value.numpy()[0]) == 7:
            x = op.Mul(x, op.Constant(value_float=0.5))
        return right(self, op, x=x, y=y, weight=weight, normed=normed)

    monkeypatch.setattr(fuse_norm._SkipNormRule, "rewrite", wrong)
    model = model_of(num_hidden_layers=4)
    name = "model.layers.1.post_attention_layernorm.weight"
    marked = model.weights[name].dense().clone()
    marked[0] = 7
    model = model.with_weights({name: DenseWeight.of(marked)})
    assert len(verified(model, "quick")) == 3  # layers 0, 2 and 3
    with pytest.raises(VerificationError, match=r"^layer 1: "):
        verified(model, "full")


def test_numbers_that_are_not_finite_are_caught(model_of):
    model = model_of(num_hidden_layers=1)
    name = "model.layers.0.mlp.down_proj.weight"
    broken = model.weights[name].dense().clone()
    broken[:] = np.nan
    with pytest.raises(VerificationError, match="layer 0"):
        verified(model.with_weights({name: DenseWeight.of(broken)}))


def test_without_onnxruntime_the_extra_is_named(model_of, monkeypatch):
    model = model_of(num_hidden_layers=1)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError) as caught:
        verified(model)
    assert caught.value.hint == "pip install 'llmopt[cpu]'"
    assert verified(model, "none") == {}


def test_a_cache_that_decoding_misreads_is_caught(model_of, monkeypatch):
    """A rope that turns backwards is the same at position 0 and wrong wherever there is a past."""
    rope = lower_attention._rope

    def backwards(node):
        query, key = rope(node)
        sin = query.inputs[2]
        if sin.name != "backwards":
            tensor = ir.tensor(-sin.const_value.numpy(), name="backwards")
            turned = ir.Value(name="backwards", const_value=tensor, type=sin.type, shape=sin.shape)
            query.graph.register_initializer(turned)
            for one in (query, key):
                one.replace_input_with(2, turned)
        return query, key

    monkeypatch.setattr(lower_attention, "_rope", backwards)
    with pytest.raises(VerificationError, match=r"lower_attention changes .* model.layers.0.attention.output"):
        verified(model_of(num_hidden_layers=1))


def test_rows_picked_from_one_operand_in_the_wrong_order_are_caught(model_of, monkeypatch):
    right = select_rows._picked

    def unordered(op, x, rows):
        if "attention.output" in x.name:
            count = op.Squeeze(op.Shape(rows))
            rows = op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1))
        return right(op, x, rows)

    monkeypatch.setattr(select_rows, "_picked", unordered)
    with pytest.raises(VerificationError, match=r"select_rows changes .* for 14 tokens behind 17 cached ones"):
        verified(model_of(num_hidden_layers=1))


def test_a_mistake_that_only_a_ragged_step_shows_is_caught(model_of, monkeypatch):
    """Every sequence told to be as long as the longest: right alone, wrong beside others."""
    right = lower_attention._AttentionRule.rewrite

    def longest(self, op, lengths, attended, **matched):
        level = op.Add(op.Mul(lengths, op.Constant(value_int=0)), op.ReduceMax(lengths, keepdims=1))
        return right(self, op, lengths=level, attended=attended, **matched)

    monkeypatch.setattr(lower_attention._AttentionRule, "rewrite", longest)
    with pytest.raises(
        VerificationError, match=r"lower_attention changes .* for 1 token behind 31, 4, 0, 16, 9 cached ones"
    ):
        verified(model_of(num_hidden_layers=1))


def test_quick_takes_one_layer_of_every_kind(family_of, tmp_path):
    model = load_model(str(family_of("qwen3_moe")), cache=tmp_path)
    kinds = [[layer.attention.window, type(layer.mlp).__name__] for layer in model.decoder.layers]
    assert kinds == [[None, "Experts"], [None, "Mlp"], [None, "Experts"]]
    layers = (model.decoder.layers[0],) * 3 + (model.decoder.layers[1],) + (model.decoder.layers[0],) * 4
    model.__dict__["decoder"] = replace(model.decoder, layers=layers)
    assert _quick(model) == [0, 3, 4, 7]


ATTENTION = {"softcap": 30.0, "scale": 0.5, "query_norm": Norm(name="norm", kind="rms", epsilon=1e-6)}


@pytest.mark.parametrize("change", [*ATTENTION, "no norm", "norm's epsilon", "activation", "residual_scale", "bias"])
def test_layers_that_differ_in_one_thing_are_two_kinds(model_of, change):
    model = model_of(num_hidden_layers=6)
    assert _quick(model) == [0, 3, 5]
    layers = list(model.decoder.layers)
    odd = layers[1]
    if change in ATTENTION:
        odd = replace(odd, attention=replace(odd.attention, **{change: ATTENTION[change]}))
    elif change == "no norm":
        odd = replace(odd, mlp_in=None)
    elif change == "norm's epsilon":
        odd = replace(odd, mlp_in=replace(odd.mlp_in, epsilon=0.5))
    elif change == "activation":
        odd = replace(odd, mlp=replace(odd.mlp, activation="relu"))
    elif change == "residual_scale":
        odd = replace(odd, residual_scale=0.5)
    else:
        name = f"{odd.attention.output}.bias"
        model = model.with_weights({name: DenseWeight.of(torch.zeros(model.decoder.hidden_size))})
    model = replace(model)  # so that the shared model keeps its description
    model.__dict__["decoder"] = replace(model.decoder, layers=(layers[0], odd, *layers[2:]))
    assert _quick(model) == [0, 1, 3, 5]


def test_a_bias_of_the_head_is_cut_with_its_rows(model_of):
    model = model_of("W8A16", {"head": "W8A16"}, num_hidden_layers=1, vocab_size=1100, tie_word_embeddings=False)
    bias = torch.linspace(-1, 1, 1100)
    found = verified(model.with_weights({"lm_head.bias": DenseWeight.of(bias)}))
    assert max(found["layers.0"].values()) < 1e-5


def test_a_window_is_exceeded(family_of, tmp_path, monkeypatch):
    """A window of thousands is cut down, so that a lowering without it is caught."""
    model = load_model(str(family_of("phi3-window")), cache=tmp_path)
    model = replace(model, config={**model.config, "sliding_window": 4096})
    assert model.decoder.layers[0].attention.window == 4096
    assert max(verified(model)["layers.0"].values()) < 1e-5
    attributes = lower_attention._attributes
    monkeypatch.setattr(
        lower_attention,
        "_attributes",
        lambda node: {k: v for k, v in attributes(node).items() if k != "local_window_size"},
    )
    with pytest.raises(VerificationError, match="lower_attention changes the result"):
        verified(model)


def test_a_mistake_in_one_row_of_one_call_is_caught_where_activations_are_rounded(model_of, monkeypatch):
    """The last position of the capacity is taken for the one before: only the longest sequence of a step has it."""
    right = lower_attention._AttentionRule.rewrite

    def shortened(self, op, lengths, attended, **matched):
        shorter = op.Min(lengths, op.Constant(value_int=30))
        return right(self, op, lengths=shorter, attended=attended, **matched)

    monkeypatch.setattr(lower_attention._AttentionRule, "rewrite", shortened)
    with pytest.raises(VerificationError, match=r"lower_attention changes .* for 1 token behind 31, 4, 0, 16, 9"):
        verified(model_of("W8A8", num_hidden_layers=1))


def test_operands_in_the_wrong_order_are_caught_at_their_first_reader(model_of, monkeypatch):
    right = fuse_gate_up._gated

    def exchanged(factors):
        gated = right(factors)
        return gated and replace(gated, gate=gated.up, up=gated.gate)

    monkeypatch.setattr(fuse_gate_up, "_gated", exchanged)
    message = r"layer 0: fuse_gate_up changes .* first at com.microsoft::QuickGelu model.layers.0.mlp.activated.rows"
    with pytest.raises(VerificationError, match=message):
        verified(model_of(num_hidden_layers=1))


def test_a_wrong_axis_is_caught(model_of, monkeypatch):
    """The largest magnitude of each column instead of each row."""

    def of_columns(self, op, x):
        largest = op.ReduceMax(op.Abs(x), op.Constant(value_ints=[0]), keepdims=1)
        step, middle = (op.Constant(value=ir.tensor(number)) for number in (np.float32(1 / 127), np.uint8(128)))
        integers = op.QuantizeLinear(op.Div(x, largest), step, middle)
        return op.Mul(op.DequantizeLinear(integers, step, middle), largest)

    monkeypatch.setattr(share_activation_quantization._RoundingRule, "rewrite", of_columns)
    message = "layer 0: share_activation_quantization changes .* first at Mul model.layers.0.input_layernorm"
    with pytest.raises(VerificationError, match=message):
        verified(model_of("W8A8", num_hidden_layers=1))


def test_a_graph_that_does_not_run_is_blamed_on_the_pass_that_made_it(model_of, monkeypatch):
    monkeypatch.setattr(
        fuse_activation._SiluRule, "rewrite", lambda self, op, x: op.QuickestGelu(x, _domain="com.microsoft")
    )
    message = "layer 0: ONNX Runtime does not run the graph behind fuse_activation: .*QuickestGelu"
    with pytest.raises(VerificationError, match=message) as caught:
        verified(model_of(num_hidden_layers=1))
    assert "that graph pass" in caught.value.hint


def test_memory_that_runs_out_is_no_mistake_of_a_pass(model_of, monkeypatch):
    def fail(self, graph):
        raise MemoryError

    monkeypatch.setattr(Sessions, "open", fail)
    with pytest.raises(MemoryError):
        verified(model_of(num_hidden_layers=1))


FAMILIES = ["gemma3", "gpt2", "gpt_neox", "falcon-40b", "opt-350m", "phi3-longrope", "smollm3", "mixtral-window"]


@pytest.mark.parametrize("family_name", FAMILIES)
def test_every_family_is_lowered_within_the_limit(family_of, family_name, tmp_path):
    found = verified(load_model(str(family_of(family_name)), cache=tmp_path))
    assert all(max(differences.values()) < 2e-5 for differences in found.values())
    assert all("all" in differences for differences in found.values())
