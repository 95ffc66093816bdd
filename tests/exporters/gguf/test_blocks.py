"""GGML's blocks: what the gguf library dequantizes them to is what the integers stand for."""

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from llmopt.exporters.gguf.blocks import block_type, refusal, to_blocks
from llmopt.optimizer.model import QuantTensors
from llmopt.optimizer.rounding import quantize
from llmopt.optimizer.scheme import PRESETS, Scheme


def sized(name: str, size: int) -> Scheme:
    return PRESETS[name].with_group_size(size)


def in_16_bits(tensors: QuantTensors) -> QuantTensors:
    return tensors._replace(scale=tensors.scale.half().float())


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        (sized("W4A16", 32), Kind.Q4_0),
        (sized("W4A16", 64), Kind.Q4_0),
        (sized("W4A16", -1), Kind.Q4_0),
        (sized("W3A16", 32), Kind.Q4_0),
        (sized("W2A16", 32), Kind.Q4_0),
        (sized("W8A16", 32), Kind.Q8_0),
        (PRESETS["W8A16"], Kind.Q8_0),
        (PRESETS["W8A8"], Kind.Q8_0),
    ],
    ids=lambda value: value.name,
)
def test_symmetric_integers_are_transcribed(scheme: Scheme, kind: Kind) -> None:
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    tensors = in_16_bits(quantize(weight, scheme))
    assert block_type(scheme) is kind
    blocks = to_blocks(tensors, kind, scheme.weights.num_bits)
    assert torch.equal(torch.from_numpy(gguf.dequantize(blocks.numpy(), kind)), tensors.dense())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_become_offsets_that_float16_holds(bits: int) -> None:
    weights = {"num_bits": bits, "strategy": "group", "group_size": 32, "symmetric": False}
    scheme = Scheme.model_validate({"weights": weights})
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0)) + 0.3
    tensors = in_16_bits(quantize(weight, scheme))
    assert block_type(scheme) is Kind.Q4_1
    found = torch.from_numpy(gguf.dequantize(to_blocks(tensors, Kind.Q4_1, bits).numpy(), Kind.Q4_1))
    # Within the rounding of the offset, of at most 15 steps, to the 11 bits of float16.
    assert ((found - tensors.dense()).abs() <= 15 * tensors.scale.max() * 2**-11).all()


def test_a_block_begins_with_its_scale_and_halves_share_bytes() -> None:
    values = torch.arange(32, dtype=torch.int8)[None] % 16 - 8
    tensors = QuantTensors(values, torch.tensor([[1.0]]), None)
    block = to_blocks(tensors, Kind.Q4_0, 4)[0].tolist()
    assert block[:2] == [0x00, 0x3C]  # 1.0 in float16
    assert block[2:] == [number | number << 4 for number in range(16)]


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        (sized("W4A16", 16), None, "another grid"),
        (PRESETS["FP8_DYNAMIC"], None, "another grid"),
        (Scheme.model_validate({"weights": {"num_bits": 8, "strategy": "channel", "symmetric": False}}), None, "grid"),
        (PRESETS["W8A16"], (8, 48), "this weight has 48"),
        (PRESETS["W8A16"], (48, 64), None),
    ],
    ids=str,
)
def test_other_grids_are_refused(scheme: Scheme, shape, reason: str | None) -> None:
    found = refusal(scheme, shape)
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)
