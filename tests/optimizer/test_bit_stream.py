"""Streams of bits: compressed-tensors' own examples, and the plain definition."""

import pytest
import torch

from llmopt.optimizer.bit_stream import packed, signed, unpacked, unsigned


def words(values: list[int], bits: int) -> list[int]:
    shifted = torch.tensor([values]) + (1 << (bits - 1))
    return [word & 0xFFFFFFFF for word in packed(shifted.to(torch.uint8), bits)[0].tolist()]


@pytest.mark.parametrize(
    ("bits", "values", "expected"),
    [  # computed with compressed-tensors' pack_to_int32
        (4, list(range(-8, 8)), [0x76543210, 0xFEDCBA98]),
        (3, [-4, -3, -2, -1, 0, 1, 2, 3, 3, 2, 1, 0, -1, -2, -3, -4], [0x77FAC688, 0x00000539]),
        (8, [-128, -1, 0, 127], [0xFF807F00]),
        (4, [-8, -7, 0, 7, 1, 2, 3, 4, 5], [0xCBA9F810, 0x0000000D]),
    ],
)
def test_known_words(bits: int, values: list[int], expected: list[int]) -> None:
    assert words(values, bits) == expected


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 32, 45])
def test_every_number_lies_at_its_place_in_the_stream(bits: int, count: int) -> None:
    values = torch.randint(0, 1 << bits, (3, count), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    for row, numbers in zip(packed(values, bits).tolist(), values.tolist(), strict=True):
        stream = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(row))
        assert stream == sum(number << (bits * place) for place, number in enumerate(numbers))
        assert len(row) == -(-count * bits // 32)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 32, 45])
def test_what_was_packed_is_unpacked(bits: int, count: int) -> None:
    values = torch.randint(0, 1 << bits, (3, count), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    found = unpacked(packed(values, bits), bits, count)
    assert found.dtype == torch.uint8
    assert torch.equal(found, values)


def test_columns_are_unpacked_as_rows_are() -> None:
    values = torch.arange(32, dtype=torch.uint8).reshape(2, 16) % 8
    assert torch.equal(unpacked(packed(values, 3).T.contiguous().T, 3, 16), values)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_signed_numbers_begin_at_the_lowest(bits: int) -> None:
    every = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1)).to(torch.int8)
    assert unsigned(every, bits).tolist() == list(range(1 << bits))
    assert torch.equal(signed(unsigned(every, bits), bits), every)
