"""Safetensors checkpoints: lazily read, and refused at once when damaged or contradictory."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt.optimizer.checkpoint import as_floats, fit_to_shapes, open_checkpoint, weight_files
from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.model import DenseWeight
from llmopt.optimizer.sources import load_model


def weights_in(directory: Path) -> dict[str, DenseWeight]:
    return as_floats(open_checkpoint(directory))


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a checkpoint, so that a test may damage it."""
    return lambda directory: Path(shutil.copytree(directory, tmp_path / "copy"))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def set_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_every_tensor_is_read_as_it_was_saved(tiny_llama: Path) -> None:
    expected = load_file(tiny_llama / "model.safetensors")
    weights = weights_in(tiny_llama)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert (weight.shape, weight.dtype) == (tuple(expected[name].shape), torch.float32)
        assert torch.equal(weight.load(), expected[name])


def test_shards_give_the_same_weights_as_one_file(tiny_llama: Path, tiny_llama_sharded: Path) -> None:
    single, sharded = weights_in(tiny_llama), weights_in(tiny_llama_sharded)
    assert len(weight_files(tiny_llama_sharded)) == 5
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[name].load(), sharded[name].load()) for name in single)


def test_bfloat16_stays_bfloat16(tiny_llama_bf16: Path) -> None:
    weight = weights_in(tiny_llama_bf16)["model.norm.weight"]
    assert weight.load().dtype is weight.dtype is torch.bfloat16


def test_listing_and_loading_half_a_gigabyte_reads_only_what_is_touched(tmp_path: Path) -> None:
    # A sparse file: one tensor of 512 MiB and one of 1 KiB behind it.
    large, small = 512 << 20, 1 << 10
    header = {
        "large": {"dtype": "F32", "shape": [large // 4], "data_offsets": [0, large]},
        "small": {"dtype": "F32", "shape": [small // 4], "data_offsets": [large, large + small]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + large + small)
    process = psutil.Process()
    before = process.memory_info().rss
    weights = weights_in(tmp_path)
    assert weights["large"].nbytes == large
    assert float(weights["small"].load().sum()) == 0.0
    tensor = weights["large"].load()
    # Far below 512 MiB; the allowance is for the libraries' own first use.
    assert process.memory_info().rss - before < 64 << 20
    assert len(tensor) == large // 4


@pytest.mark.parametrize("length", [0, 4, 8, 100, 3000, -1])
def test_a_truncated_file_is_refused_when_opened(
    length: int, tiny_llama: Path, copy_of: Callable[[Path], Path]
) -> None:
    directory = copy_of(tiny_llama)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"model\.safetensors \([\d,]+ bytes\) is truncated or not a safetensors file"):
        weights_in(directory)


def test_a_header_longer_than_the_file_is_refused(tiny_llama: Path, copy_of: Callable[[Path], Path]) -> None:
    directory = copy_of(tiny_llama)
    path = directory / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])
    with pytest.raises(InputError, match="truncated"):
        weights_in(directory)


def test_a_missing_shard_is_named(tiny_llama_sharded: Path, copy_of: Callable[[Path], Path]) -> None:
    directory = copy_of(tiny_llama_sharded)
    (directory / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(InputError, match=r"names model-00002-of-00004\.safetensors, which is not there"):
        weights_in(directory)


def test_an_index_entry_that_its_shard_lacks_is_named(
    tiny_llama_sharded: Path, copy_of: Callable[[Path], Path]
) -> None:
    directory = copy_of(tiny_llama_sharded)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00004.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"do not hold: model\.norm\.weight \(in model-00001"):
        weights_in(directory)


def test_an_index_cannot_point_out_of_its_directory(tiny_llama_sharded: Path, copy_of: Callable[[Path], Path]) -> None:
    directory = copy_of(tiny_llama_sharded)
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"model.norm.weight": "../other.safetensors"}}))
    with pytest.raises(InputError, match="outside its own directory"):
        weights_in(directory)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(text: str, tiny_llama_sharded: Path, copy_of: Callable[[Path], Path]) -> None:
    directory = copy_of(tiny_llama_sharded)
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match="is not a safetensors index"):
        weights_in(directory)


def test_pickled_weights_are_refused_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match="loading a pickle runs code") as caught:
        weights_in(tmp_path)
    assert "save_pretrained" in (caught.value.hint or "")


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        weights_in(tmp_path)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    save_file({"layer.weight": torch.zeros(2, 2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"layer\.weight has dtype I8"):
        weights_in(tmp_path)


def test_buffers_of_older_checkpoints_are_left_out(tiny_llama: Path, copy_of: Callable[[Path], Path]) -> None:
    directory = copy_of(tiny_llama)
    rewrite(directory, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert weights_in(directory).keys() == weights_in(tiny_llama).keys()


def test_missing_weights_are_counted_and_the_first_are_named(
    tiny_llama: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    directory = copy_of(tiny_llama)
    rewrite(directory, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1." in name])
    with pytest.raises(InputError, match=r"lacks 9 of the 29 weights.*model\.layers\.1\..* and 5 more"):
        load_model(str(directory), cache=tmp_path / "cache")


def test_weights_that_the_config_has_no_place_for_are_refused(
    tiny_llama_biased: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    directory = copy_of(tiny_llama_biased)
    set_config(directory, attention_bias=False)
    with pytest.raises(InputError, match=r"holds 12 weights that its config has no place for.*_proj\.bias"):
        load_model(str(directory), cache=tmp_path / "cache")


def test_shapes_are_compared_with_the_config(tiny_llama: Path, copy_of: Callable[[Path], Path], tmp_path: Path) -> None:
    directory = copy_of(tiny_llama)
    set_config(directory, intermediate_size=160)
    with pytest.raises(InputError, match=r"gate_proj\.weight is \[128, 64\], not \[160, 64\]"):
        load_model(str(directory), cache=tmp_path / "cache")


def test_weights_come_in_the_order_of_the_architecture() -> None:
    weights = {name: DenseWeight.of(torch.from_numpy(np.zeros(1, np.float32))) for name in ("b", "a")}
    assert list(fit_to_shapes(weights, {"a": (1,), "b": (1,)}, "here")) == ["a", "b"]
