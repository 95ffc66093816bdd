"""Which differences between two models are seen, which are not, and what is said of them."""

import pytest
import torch

from llmopt.calibration.reference import Reference
from llmopt.calibration.same_function import LIMIT, relative_difference, verify_same_function
from llmopt.optimizer.errors import PassError, VerificationError
from llmopt.optimizer.model import DenseWeight


def verify(before, after, level="quick"):
    return verify_same_function("turn", before, after, level=level, seed=0)


def with_noise(model, name, share):
    values = model.weights[name].dense()
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)) * values.std() * share
    return model.with_weights({name: DenseWeight.of(values + noise)})


def test_a_model_agrees_with_itself(pair_of):
    model, _ = pair_of()
    parts = ["embedding and head", *(f"model.layers.{i}" for i in range(3))]
    assert verify(model, model) == dict.fromkeys(parts, 0.0)


def test_a_difference_is_the_share_of_the_logits_spread_in_the_worst_row():
    expected = torch.tensor([[1.0, -1.0], [3.0, 1.0]])
    computed = expected + torch.tensor([[0.0, 0.0], [0.1, 0.1]])
    assert relative_difference(computed, expected) == pytest.approx(0.1 / 2**0.5)


def test_each_layer_is_named_when_one_of_its_weights_is_wrong(pair_of):
    model, _ = pair_of()
    for name in model.weights:
        part = ".".join(name.split(".")[:3]) if ".layers." in name else "embedding and head"
        with pytest.raises(VerificationError, match=f"turn changes what the model computes: {part}: logits differ by"):
            verify(model, with_noise(model, name, 1e-2))


def test_the_error_ends_with_exit_code_6_and_says_what_is_accepted(pair_of):
    model, _ = pair_of()
    with pytest.raises(VerificationError, match=rf"{LIMIT:g} is accepted \(seed 0\)") as caught:
        verify(model, with_noise(model, "model.layers.1.mlp.up_proj.weight", 1e-2))
    assert caught.value.exit_code == 6
    assert "bug in that pass" in caught.value.hint


def test_rounding_of_float32_is_accepted(pair_of):
    model, _ = pair_of()
    assert 0 < max(verify(model, with_noise(model, "model.layers.1.mlp.up_proj.weight", 1e-6)).values()) < LIMIT


def test_numbers_that_are_none_are_refused(pair_of):
    model, _ = pair_of()
    name = "model.layers.0.self_attn.o_proj.weight"
    broken = model.with_weights({name: DenseWeight.of(torch.full(model.weights[name].shape, float("nan")))})
    with pytest.raises(VerificationError, match=r"model\.layers\.0: logits differ by nan"):
        verify(model, broken)


def test_a_weight_that_was_damaged_before_the_pass_is_named(pair_of):
    model, _ = pair_of()
    name = "model.layers.0.self_attn.o_proj.weight"
    damaged = model.weights[name].dense().clone()
    damaged[3, 5] = float("nan")
    broken = model.with_weights({name: DenseWeight.of(damaged)})
    with pytest.raises(PassError, match=f"{name} has values that are not finite"):
        verify(broken, broken)


def test_quick_takes_three_layers_and_one_of_each_kind_and_full_all(pair_of):
    deep, _ = pair_of(num_hidden_layers=9)
    assert list(verify(deep, deep))[1:] == [f"model.layers.{i}" for i in (0, 4, 8)]
    assert list(verify(deep, deep, "full"))[1:] == [f"model.layers.{i}" for i in range(9)]
    without_rope, _ = pair_of(num_hidden_layers=9, no_rope_layers=[1, 1, 1, 0, 1, 1, 0, 1, 1])
    assert list(verify(without_rope, without_rope))[1:] == [f"model.layers.{i}" for i in (0, 3, 4, 8)]


def test_a_stream_in_another_basis_is_the_same_function(pair_of):
    """Signs of the residual stream's channels turned, with norms of one: what hidden states would not show."""
    model, _ = pair_of(num_hidden_layers=1, tie_word_embeddings=False)
    norms = {name: DenseWeight.of(torch.ones(48)) for name in model.weights if name.endswith("norm.weight")}
    model = model.with_weights(norms)
    signs = torch.tensor([1.0, -1.0] * 24)
    writers = ("o_proj.weight", "down_proj.weight")
    turned = {
        name: DenseWeight.of(weight.dense() * (signs[:, None] if name.endswith(writers) else signs))
        for name, weight in model.weights.items()
        if name not in norms
    }
    after = model.with_weights(turned)
    ids = torch.arange(12)[None]
    assert not torch.allclose(Reference(model).embed(ids), Reference(after).embed(ids))
    assert max(verify(model, after).values()) < 1e-6
