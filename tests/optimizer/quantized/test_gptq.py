"""GPTQ checkpoints: the integers that were packed, whatever the bits, the version and the order of columns."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.model import QuantWeight
from llmopt.optimizer.sources import load_model

MODULE, ROWS, COLUMNS, SIZE = "model.layers.1.mlp.down_proj", 64, 128, 32
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": SIZE, "sym": True, "desc_act": False}


class Linear:
    """One linear as the format says, and what it stands for; ``order`` are the columns as they were quantized."""

    def __init__(self, packer, bits: int = 4, *, symmetric: bool = True, added: int = 1, order: Tensor | None = None):
        groups = COLUMNS // SIZE
        middle = torch.full((groups, ROWS), 1 << (bits - 1))
        self.index = torch.arange(COLUMNS, dtype=torch.int32) // SIZE
        if order is not None:
            self.index = torch.empty_like(self.index).scatter_(0, order, self.index)
        self.numbers, self.scales = packer.numbers(bits, COLUMNS, ROWS), packer.scales(groups, ROWS)
        self.zeros = middle if symmetric else packer.numbers(bits, groups, ROWS, seed=2).clamp(1)
        self.parts = {
            "qweight": packer.by_columns(self.numbers, bits),
            "qzeros": packer.by_rows(self.zeros - added, bits),
            "scales": self.scales,
            "g_idx": self.index,
        }

    @property
    def dense(self) -> Tensor:
        """``(q - zero) * scale`` by the definition, float32 ``[out, in]``."""
        return ((self.numbers - self.zeros[self.index]) * self.scales.float()[self.index]).T


@pytest.fixture
def linear(packer) -> Callable[..., Linear]:
    return lambda *bits, **options: Linear(packer, *bits, **options)


def weight(directory: Path, tmp_path: Path) -> QuantWeight:
    found = load_model(str(directory), cache=tmp_path).weights[f"{MODULE}.weight"]
    assert isinstance(found, QuantWeight)
    return found


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_packed_integers_are_what_they_stand_for(bits, symmetric, version, linear, checkpoint, tmp_path: Path) -> None:
    stored = linear(bits, symmetric=symmetric, added=1 if version == "gptq" else 0)
    config = {**CONFIG, "bits": bits, "sym": symmetric, "checkpoint_format": version}
    found = weight(checkpoint(stored.parts, config), tmp_path)
    assert found.scheme.weights.num_bits == bits
    assert found.scheme.weights.symmetric is symmetric
    assert found.scheme.weights.group_size == SIZE
    assert not found.has_group_index
    assert torch.equal(found.dense(), stored.dense)


def test_columns_in_the_order_of_activations_keep_their_groups(linear, checkpoint, tmp_path: Path) -> None:
    stored = linear(order=torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(5)))
    found = weight(checkpoint(stored.parts, {**CONFIG, "desc_act": True}), tmp_path)
    assert found.has_group_index
    assert torch.equal(found.dense(), stored.dense)
    beside, order = found.load().by_group()
    assert torch.equal(beside.dense(), stored.dense[:, order])


def test_a_scale_per_channel_is_group_size_minus_one(packer, linear, checkpoint, tmp_path: Path) -> None:
    stored, scales = linear(), packer.scales(1, ROWS)
    zeros = packer.by_rows(torch.full((1, ROWS), 7), 4)
    parts = {**stored.parts, "scales": scales, "qzeros": zeros, "g_idx": torch.zeros(COLUMNS, dtype=torch.int32)}
    found = weight(checkpoint(parts, {**CONFIG, "group_size": -1}), tmp_path)
    assert found.scheme.weights.strategy == "channel"
    assert torch.equal(found.dense(), (stored.numbers - 8).T * scales.float().T)


def test_settings_of_one_module_are_in_dynamic(linear, checkpoint, tmp_path: Path) -> None:
    dynamic, stored = {"+:.*down_proj": {"bits": 8}, ".*": {"bits": 2}}, linear(8)
    found = weight(checkpoint(stored.parts, {**CONFIG, "dynamic": dynamic}), tmp_path)
    assert torch.equal(found.dense(), stored.dense)


def test_older_checkpoints_say_it_in_a_file_of_their_own(linear, checkpoint, tmp_path: Path) -> None:
    directory = checkpoint(linear().parts, None, {"quantize_config.json": {"bits": 4, "group_size": SIZE, "sym": True}})
    assert weight(directory, tmp_path).scheme.weights.num_bits == 4
    assert "quantize_config.json" in load_model(str(directory), cache=tmp_path).source.files


def test_autoround_packs_as_gptq_does(linear, checkpoint, tmp_path: Path) -> None:
    stored = linear(8)
    config = {**CONFIG, "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "data_type": "int"}
    found = weight(checkpoint(stored.parts, {**config, "extra_config": {MODULE: {"bits": 8}}}), tmp_path)
    assert torch.equal(found.dense(), stored.dense)


def test_biases_of_zeros_that_older_programs_wrote_are_left_out(linear, checkpoint, tmp_path: Path) -> None:
    model = load_model(str(checkpoint({**linear().parts, "bias": torch.zeros(ROWS)}, CONFIG)), cache=tmp_path)
    assert f"{MODULE}.bias" not in model.weights
    assert any("biases of zeros" in note and MODULE in note for note in model.source.notes)


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda stored: {key: tensor for key, tensor in stored.items() if key != name}


@pytest.mark.parametrize(
    ("change", "config", "error", "message"),
    [
        (without("g_idx"), {}, InputError, "lacks model.layers.1.mlp.down_proj.g_idx"),
        (without("scales"), {}, InputError, "lacks model.layers.1.mlp.down_proj.scales"),
        (lambda p: p, {"group_size": 64}, InputError, r"scales is \[4, 64\], not \[2, 64\]"),
        (lambda p: p, {"bits": 8}, InputError, r"scales is \[4, 64\], not \[2, 64\]"),
        (lambda p: p, {"bits": 5}, UnsupportedError, "has bits: 5"),
        (lambda p: p, {"bits": None}, UnsupportedError, "has bits: None"),
        (lambda p: p, {"group_size": 48}, UnsupportedError, "128 columns, which group_size 48 does not divide"),
        (lambda p: p, {"group_size": 0}, InputError, "group_size: 0"),
        (lambda p: p, {"checkpoint_format": "marlin"}, UnsupportedError, "checkpoint_format 'marlin'"),
        (lambda p: p, {"checkpoint_format": "gptq_v2"}, InputError, r"qzeros holds 7 under sym: true"),
        (lambda p: p, {"dynamic": {"-:.*down_proj": {}}}, InputError, "leaves model.layers.1.mlp.down_proj in float"),
        (lambda p: {**p, "g_idx": p["g_idx"] + 1}, {}, InputError, "names group 4, but there are 4"),
        (lambda p: {**p, "g_idx": p["g_idx"].clamp(max=2)}, {}, UnsupportedError, "have 0 to 64 columns"),
        (lambda p: {**p, "qweight": p["qweight"].float()}, {}, InputError, "qweight has dtype F32, not I32"),
        (
            lambda p: {**p, "qzeros": torch.full_like(p["qzeros"], -1)},
            {"sym": False},
            UnsupportedError,
            "zero point of 0 to some programs and of 16 to others",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    change, config: dict[str, Any], error, message, linear, checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        load_model(str(checkpoint(change(linear().parts), {**CONFIG, **config})), cache=tmp_path)
    assert caught.value.hint


def test_two_configs_that_contradict_each_other_are_named(linear, checkpoint, tmp_path: Path) -> None:
    directory = checkpoint(linear().parts, CONFIG, {"quantize_config.json": {"bits": 8, "group_size": SIZE}})
    with pytest.raises(InputError, match=r"contradict each other: bits is 4 and 8"):
        load_model(str(directory), cache=tmp_path)


def test_a_checkpoint_that_mixes_formats_is_named(linear, checkpoint, tmp_path: Path) -> None:
    directory = checkpoint(linear().parts, CONFIG)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_packed"] = torch.zeros(4, 4, dtype=torch.int32)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(InputError, match=r"of no linear of that format: model\.layers\.0\.mlp\.up_proj\.weight_packed"):
        load_model(str(directory), cache=tmp_path)


def test_a_config_without_quantized_tensors_is_named(checkpoint, tmp_path: Path) -> None:
    directory = checkpoint({"weight": torch.zeros(ROWS, COLUMNS)}, CONFIG)
    with pytest.raises(InputError, match="as its config says, but holds no qweight"):
        load_model(str(directory), cache=tmp_path)


def test_a_method_that_nobody_reads_is_named(linear, checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="quant_method aqlm") as caught:
        load_model(str(checkpoint(linear().parts, {"quant_method": "aqlm"})), cache=tmp_path)
    assert "gptq, awq, compressed-tensors" in str(caught.value.hint)
    assert json.loads((tmp_path / "quantized/config.json").read_text())["quantization_config"]
