"""Tensors of a safetensors file: what is read is what was written, and costs memory only while it is in use."""

import os
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from llmopt.optimizer.errors import InputError
from llmopt.optimizer.tensor_file import DTYPES, read_header


def test_every_type_comes_back_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(-99, 99, (5, 3, 7), generator=generator).to(dtype).contiguous()
        for name, dtype in DTYPES.items()
    }
    save_file({**tensors, "vector": torch.ones(4)}, tmp_path / "it", metadata={"format": "pt"})
    found = read_header(tmp_path / "it")
    assert found.keys() == {*tensors, "vector"}
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (name, (5, 3, 7))
        assert found[name]().dtype == tensor.dtype
        assert torch.equal(found[name](), tensor)
        assert torch.equal(found[name].rows(1, 4), tensor[1:4])


def test_writing_to_what_was_read_does_not_reach_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(8)}, tmp_path / "it")
    tensor = read_header(tmp_path / "it")["a"]
    tensor().fill_(1)
    assert not tensor().any()


def test_memory_is_given_back_when_a_tensor_is_dropped(tmp_path: Path) -> None:
    size = 64 << 20
    save_file({name: torch.ones(size, dtype=torch.int8) for name in "abc"}, tmp_path / "it")
    process = psutil.Process()
    tensors = read_header(tmp_path / "it")
    before = process.memory_info().rss
    for tensor in tensors.values():
        loaded = tensor()
        assert int(loaded.count_nonzero()) == size
        held = process.memory_info().rss - before
        # One tensor of the three; the allowance is for torch's first use of its threads.
        assert size <= held < 1.5 * size
        del loaded
    assert process.memory_info().rss - before < 0.5 * size
    assert int(tensors["b"].rows(0, size // 8).count_nonzero()) == size // 8


@pytest.mark.parametrize("change", ["replaced", "touched", "shortened"])
def test_a_file_that_changed_meanwhile_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "it"
    save_file({"a": torch.zeros(8)}, path)
    tensor = read_header(path)["a"]
    if change == "replaced":
        save_file({"a": torch.ones(8)}, tmp_path / "other")
        (tmp_path / "other").replace(path)
    elif change == "touched":
        os.utime(path, ns=(0, 0))
    else:
        os.truncate(path, 16)
    with pytest.raises(InputError, match="it changed while it was in use"):
        tensor()
