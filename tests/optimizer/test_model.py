"""The model that passes hand on: shared weights, lazy reading, sizes, and what a quantized weight stands for."""

from pathlib import Path

import pytest
import torch

from llmopt.optimizer import model as model_module
from llmopt.optimizer.arch.llama import ARCH
from llmopt.optimizer.model import DenseWeight, Model, QuantTensors, QuantWeight, Source
from llmopt.optimizer.rounding import quantize
from llmopt.optimizer.scheme import PRESETS

CONFIG = {
    "num_hidden_layers": 2,
    "vocab_size": 3,
    "hidden_size": 4,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 8,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class ByRows:
    """Loads some rows; the test fails when it is asked for all."""

    def __init__(self, values):
        self.values = values

    def __call__(self):
        pytest.fail("it was read whole")

    def rows(self, first, past_end):
        return self.values[first:past_end]


def model_of(*names):
    weights = {name: DenseWeight.of(torch.ones(3, 4)) for name in names}
    return Model(ARCH, CONFIG, weights, Source("somewhere", "0" * 64, {}, Path()))


def quantized(scheme, rows, columns):
    generator = torch.Generator().manual_seed(0)
    groups = columns // (scheme.weights.group_size or columns)
    zero = torch.randint(-8, 8, (rows, groups), generator=generator).to(torch.int8)
    tensors = QuantTensors(
        torch.randint(-8, 8, (rows, columns), generator=generator).to(torch.int8),
        torch.rand(rows, groups, generator=generator),
        None if scheme.weights.symmetric else zero,
    )
    return QuantWeight.of(tensors, scheme)


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


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM"])
@pytest.mark.parametrize("group_size", [-1, 4])
def test_integers_stand_for_their_distance_from_zero_in_steps(name, group_size):
    weight = quantized(PRESETS[name].with_group_size(group_size), 5, 12)
    dense, (values, scale, zeros) = weight.dense(), weight.load()[:3]
    assert (weight.shape, tuple(dense.shape), dense.dtype) == ((5, 12), (5, 12), torch.float32)
    assert (zeros is None) == (name == "W4A16")
    for row in range(5):
        for column in range(12):
            group = column * weight.groups // 12
            zero = 0 if zeros is None else int(zeros[row, group])
            expected = (int(values[row, column]) - zero) * float(scale[row, group])
            assert float(dense[row, column]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("scheme", "nbytes"),
    [
        (PRESETS["W8A8"], 4 * 32 + 4 * 4),
        (PRESETS["W4A16"].with_group_size(16), 4 * 32 // 2 + 4 * 2 * 4),
        (PRESETS["W4A16_ASYM"].with_group_size(16), 4 * 32 // 2 + 4 * 2 * 4 + 4 * 2 // 2),
        (PRESETS["W3A16"].with_group_size(16), 4 * 32 * 3 // 8 + 4 * 2 * 4),
        (PRESETS["FP8_DYNAMIC"], 4 * 32 + 4 * 4),
        (PRESETS["FP8_BLOCK"], 4 * 32 + 4),
        (PRESETS["FP8"], 4 * 32 + 4 + 4),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_quantized_weight_has_its_packed_size_whether_or_not_it_is_in_memory(scheme, nbytes):
    weight = QuantWeight.of(quantize(torch.ones(4, 32), scheme), scheme)
    assert weight.nbytes == nbytes
    assert QuantWeight(weight.shape, scheme, lambda: pytest.fail("it was read")).nbytes == nbytes


@pytest.mark.parametrize("block", [1, 3 * 12 * 4, 1 << 20])
@pytest.mark.parametrize("kind", ["in memory", "read by rows", "quantized"])
def test_blocks_of_rows_make_up_the_whole(kind, block, monkeypatch):
    monkeypatch.setattr(model_module, "_BLOCK_BYTES", block)
    values = torch.randn(7, 12, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight = {
        "in memory": DenseWeight.of(values),
        "read by rows": DenseWeight((7, 12), torch.bfloat16, ByRows(values)),
        "quantized": quantized(PRESETS["W4A16_ASYM"].with_group_size(4), 7, 12),
    }[kind]
    blocks = list(weight.dense_blocks())
    assert [len(part) for part in blocks] == {1: [1] * 7, 144: [3, 3, 1], 1 << 20: [7]}[block]
    assert {part.dtype for part in blocks} == {torch.float32}
    expected = weight.dense() if kind == "quantized" else values.float()
    assert torch.equal(torch.cat(blocks), expected)


def test_rows_are_as_stored_and_the_others_are_not_read():
    values = torch.arange(12.0).reshape(4, 3).to(torch.bfloat16)
    for weight in (DenseWeight.of(values), DenseWeight((4, 3), torch.bfloat16, ByRows(values))):
        assert weight.rows(1, 3).dtype == torch.bfloat16
        assert torch.equal(weight.rows(1, 3), values[1:3])


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
