"""Packed tensors made here, number by number, and what the readers find in them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmopt.benchmarks.quantizers.packed import read_checkpoint, unpacked
from llmopt.optimizer.errors import InputError

ROWS, COLUMNS, GROUP = 16, 64, 32


def packed(numbers: Tensor, bits: int) -> Tensor:
    """Numbers ``[rows, count]`` as words, each number put where its bits begin; slow and plain."""
    rows = []
    for row in numbers.tolist():
        stream = sum(number << (bits * place) for place, number in enumerate(row))
        words = -(-len(row) * bits // 32)
        rows.append([(stream >> (32 * word)) & 0xFFFFFFFF for word in range(words)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.uint32).view(torch.int32)


def numbers(shape: tuple[int, ...], bits: int, seed: int) -> Tensor:
    return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed))


def scales(shape: tuple[int, ...]) -> Tensor:
    """Positive, and exact in float16."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(3)) + 0.1).half()


def checkpoint(directory: Path, tensors: dict[str, Tensor], **quantization: object) -> Path:
    directory.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return directory


def expected(values: Tensor, zero: Tensor, scale: Tensor) -> Tensor:
    """``[out, in]``, element by element."""
    weight = torch.empty(values.shape)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            group = column // GROUP
            weight[row, column] = (float(values[row, column]) - float(zero[row, group])) * float(scale[row, group])
    return weight


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_numbers_come_out_of_the_stream_of_bits_as_they_went_in(bits: int) -> None:
    original = numbers((3, 19), bits, bits)
    assert torch.equal(unpacked(packed(original, bits), bits, 19), original.int())


def test_words_are_those_of_the_published_examples() -> None:
    words = torch.tensor([[0x76543210, 0xFEDCBA98 - (1 << 32)]], dtype=torch.int32)
    assert unpacked(words, 4, 16).tolist() == [list(range(16))]
    words = torch.tensor([[0x77FAC688, 0x00000539]], dtype=torch.int32)
    assert (unpacked(words, 3, 16) - 4).tolist() == [[-4, -3, -2, -1, 0, 1, 2, 3, 3, 2, 1, 0, -1, -2, -3, -4]]


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_gptq_is_read_in_both_versions_and_with_columns_in_any_order(
    tmp_path: Path, version: str, shuffled: bool
) -> None:
    values, scale = numbers((ROWS, COLUMNS), 4, 0), scales((ROWS, COLUMNS // GROUP))
    zero = numbers((ROWS, COLUMNS // GROUP), 4, 1).clamp(min=1)
    order = torch.arange(COLUMNS) // GROUP
    if shuffled:
        order = order[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(2))]
    tensors = {
        "a.qweight": packed(values, 4).T,
        "a.qzeros": packed(zero.T - int(version == "gptq"), 4),
        "a.scales": scale.T,
        "a.g_idx": order.int(),
        "a.bias": torch.arange(ROWS).half(),
        "norm.weight": torch.ones(COLUMNS).half(),
    }
    settings = {"quant_method": "gptq", "bits": 4, "sym": False, "checkpoint_format": version}
    stored = read_checkpoint(checkpoint(tmp_path / "c", tensors, **settings))
    by_hand = (values - zero[:, order]) * scale.float()[:, order]
    assert torch.equal(stored.weights["a.weight"], by_hand)
    assert torch.equal(stored.weights["a.bias"], torch.arange(ROWS).float())
    assert set(stored.weights) == {"a.weight", "a.bias", "norm.weight"}
    groups = ROWS * COLUMNS // GROUP
    assert stored.bits == {"a": ROWS * COLUMNS * 4 + groups * (16 + 4) + (32 * COLUMNS if shuffled else 0)}


def test_awq_columns_are_put_back_in_order(tmp_path: Path) -> None:
    values, scale = numbers((ROWS, COLUMNS), 4, 0), scales((ROWS, COLUMNS // GROUP))
    zero = numbers((ROWS, COLUMNS // GROUP), 4, 1)
    order = [8 * word + nibble for word in range(ROWS // 8) for nibble in (0, 2, 4, 6, 1, 3, 5, 7)]
    tensors = {
        "a.qweight": packed(values.T[:, order], 4),
        "a.qzeros": packed(zero.T[:, order], 4),
        "a.scales": scale.T,
    }
    settings = {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}
    stored = read_checkpoint(checkpoint(tmp_path / "c", tensors, **settings))
    assert torch.equal(stored.weights["a.weight"], expected(values, zero, scale))
    assert stored.bits == {"a": ROWS * COLUMNS * 4 + ROWS * COLUMNS // GROUP * 20}


def test_awq_words_are_those_of_the_published_example(tmp_path: Path) -> None:
    row = torch.tensor([[0x75316420]], dtype=torch.int32)
    tensors = {"a.qweight": row, "a.qzeros": torch.zeros_like(row), "a.scales": torch.ones(1, 8).half()}
    stored = read_checkpoint(checkpoint(tmp_path / "c", tensors, quant_method="awq", bits=4))
    assert stored.weights["a.weight"].tolist() == [[float(number)] for number in range(8)]


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_are_read_with_and_without_zero_points(tmp_path: Path, bits: int, symmetric: bool) -> None:
    half = 1 << (bits - 1)
    values, scale = numbers((ROWS, COLUMNS), bits, 0), scales((ROWS, COLUMNS // GROUP))
    zero = torch.full_like(scale, half).long() if symmetric else numbers((ROWS, COLUMNS // GROUP), bits, 1)
    tensors = {
        "a.weight_packed": packed(values, bits),
        "a.weight_scale": scale.float(),
        "a.weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    if not symmetric:
        tensors["a.weight_zero_point"] = packed(zero.T, bits).T
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": bits}}}
    settings = {"quant_method": "compressed-tensors", "config_groups": groups}
    stored = read_checkpoint(checkpoint(tmp_path / "c", tensors, **settings))
    assert torch.equal(stored.weights["a.weight"], expected(values, zero, scale))
    assert stored.bits == {"a": ROWS * COLUMNS * bits + ROWS * COLUMNS // GROUP * (16 + (0 if symmetric else bits))}


def test_scales_are_taken_as_float16_holds_them(tmp_path: Path) -> None:
    scale = torch.full((ROWS, COLUMNS // GROUP), 1 / 3)
    tensors = {
        "a.weight_packed": packed(torch.full((ROWS, COLUMNS), 9), 4),
        "a.weight_scale": scale,
        "a.weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    groups = {"group_0": {"weights": {"num_bits": 4}}}
    settings = {"quant_method": "compressed-tensors", "config_groups": groups}
    stored = read_checkpoint(checkpoint(tmp_path / "c", tensors, **settings))
    assert set(stored.weights["a.weight"].unique().tolist()) == {float(torch.tensor(1 / 3).half())}


def test_a_format_without_a_reader_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'hqq'"):
        read_checkpoint(checkpoint(tmp_path / "c", {"a.weight": torch.ones(2, 2)}, quant_method="hqq"))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match="no safetensors"):
        read_checkpoint(tmp_path)
