"""Safetensors written by parts: what safetensors itself reads back, in one file and in several."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmopt.exporters.checkpoint.shards import Part, write_checkpoint_files

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([[-1, 2], [3, 4]], dtype=torch.int8),
    "c": torch.tensor([1.5, 2.5]).to(torch.bfloat16),
    "d": torch.tensor([0.5, -448.0]).to(torch.float8_e4m3fn),
    "e": torch.tensor(7.0),
    "f": torch.tensor([2, 3]),
    "g": torch.arange(5, dtype=torch.int32),
}


def part(*names: str) -> Part:
    return Part(
        {name: (TENSORS[name].dtype, tuple(TENSORS[name].shape)) for name in names},
        lambda: [TENSORS[name] for name in names],
    )


def parts() -> list[Part]:
    rows = Part({"a": (torch.float32, (2, 3))}, lambda: list(TENSORS["a"].split(1)))
    return [rows, part("b", "c"), part("d"), part("e", "f", "g")]


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found.float(), expected.float())


def test_one_file_holds_what_was_given_in_blocks(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_checkpoint_files(parts(), tmp_path, progress=lambda *each: seen.append(each))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(same(found[name], TENSORS[name]) for name in TENSORS)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_shards_are_named_and_indexed_and_a_part_stays_together(tmp_path: Path) -> None:
    write_checkpoint_files(parts(), tmp_path, shard_bytes=30)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 1
    assert index["weight_map"]["b"] == index["weight_map"]["c"]
    for name, file in index["weight_map"].items():
        assert same(load_file(tmp_path / file)[name], TENSORS[name])


def test_contents_that_are_not_as_announced_are_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="8 bytes, not 12"):
        write_checkpoint_files([Part({"x": (torch.float32, (3,))}, lambda: [torch.zeros(2)])], tmp_path)
