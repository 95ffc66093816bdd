"""The model that passes hand on: shared weights, lazy reading, sizes, and what a quantized weight stands for."""

from pathlib import Path

import pytest
import torch

from llmopt.optimizer.arch.llama import ARCH
from llmopt.optimizer.model import DenseWeight, Model, QuantWeight, Source
from llmopt.optimizer.scheme import PRESETS

CONFIG = {"num_hidden_layers": 2}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def model_of(*names):
    weights = {name: DenseWeight.of(torch.ones(3, 4)) for name in names}
    return Model(ARCH, CONFIG, weights, Source("somewhere", "0" * 64, {}, Path()))


def quantized(scheme, rows, columns, groups, *, asymmetric=False):
    generator = torch.Generator().manual_seed(0)
    zero = torch.randint(-8, 8, (rows, groups), generator=generator).to(torch.int8) if asymmetric else None
    return QuantWeight(
        torch.randint(-8, 8, (rows, columns), generator=generator).to(torch.int8),
        torch.rand(rows, groups, generator=generator),
        zero,
        scheme,
    )


def test_a_dense_weight_is_read_when_asked_for():
    reads = []

    def load():
        reads.append(1)
        return torch.ones(2, 3, dtype=torch.bfloat16)

    weight = DenseWeight((2, 3), torch.bfloat16, load)
    assert (weight.shape, weight.nbytes, len(reads)) == ((2, 3), 12, 0)
    assert weight.dense().dtype == torch.float32
    assert len(reads) == 1


@pytest.mark.parametrize(("dtype", "nbytes"), [(torch.float32, 24), (torch.float16, 12), (torch.bfloat16, 12)])
def test_a_dense_weight_has_its_tensors_size(dtype, nbytes):
    weight = DenseWeight.of(torch.zeros(2, 3, dtype=dtype))
    assert (weight.shape, weight.dtype, weight.nbytes) == ((2, 3), dtype, nbytes)
    assert weight.load().dtype == dtype


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_integers_stand_for_their_distance_from_zero_in_steps(groups, asymmetric):
    weight = quantized(PRESETS["W4A16"], 5, 12, groups, asymmetric=asymmetric)
    dense = weight.dense()
    assert (weight.shape, tuple(dense.shape), dense.dtype) == ((5, 12), (5, 12), torch.float32)
    for row in range(5):
        for column in range(12):
            group = column * groups // 12
            zero = int(weight.zero[row, group]) if asymmetric else 0
            expected = (int(weight.values[row, column]) - zero) * float(weight.scale[row, group])
            assert float(dense[row, column]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("scheme", "groups", "asymmetric", "nbytes"),
    [
        ("W8A8", 1, False, 4 * 32 + 4 * 4),
        ("W4A16", 2, False, 4 * 32 // 2 + 4 * 2 * 4),
        ("W4A16_ASYM", 2, True, 4 * 32 // 2 + 4 * 2 * 4 + 4 * 2 // 2),
    ],
)
def test_a_quantized_weight_has_its_packed_size(scheme, groups, asymmetric, nbytes):
    assert quantized(PRESETS[scheme], 4, 32, groups, asymmetric=asymmetric).nbytes == nbytes


def test_changed_weights_share_the_rest():
    model = model_of(EMBEDDING, HEAD, "model.norm.weight")
    other = DenseWeight.of(torch.zeros(1))
    changed = model.with_weights({HEAD: other, "new": other})
    assert changed.weights[HEAD] is other
    assert changed.weights["new"] is other
    assert changed.weights[EMBEDDING] is model.weights[EMBEDDING]
    assert list(model.weights) == [EMBEDDING, HEAD, "model.norm.weight"]
    assert (changed.config, changed.arch, changed.source) == (model.config, model.arch, model.source)


def test_changed_weights_cannot_be_written_to():
    changed = model_of(EMBEDDING).with_weights({})
    with pytest.raises(TypeError):
        changed.weights["new"] = DenseWeight.of(torch.zeros(1))


def test_a_tied_head_has_the_embeddings_weight():
    model = model_of(EMBEDDING)
    assert model.is_tied
    assert model.weight_of("lm_head") == EMBEDDING
    assert model.weight_of("model.layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj.weight"


def test_an_untied_head_has_its_own():
    model = model_of(EMBEDDING, HEAD)
    assert not model.is_tied
    assert model.weight_of("lm_head") == HEAD


def test_linears_are_listed_in_data_order_with_the_head_last():
    below = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    below += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    expected = [f"model.layers.{i}.{name}" for i in range(2) for name in below]
    assert model_of(EMBEDDING).linears() == [*expected, "lm_head"]
