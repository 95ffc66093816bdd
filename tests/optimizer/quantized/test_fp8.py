"""FP8 checkpoints of Hugging Face, AutoFP8 and ModelOpt."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.model import QuantWeight
from llmopt.optimizer.sources import load_model

MODULE, ROWS, COLUMNS = "model.layers.1.mlp.down_proj", 64, 128
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BLOCKS = {**FP8, "weight_block_size": [32, 32]}
MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}}


@pytest.fixture
def numbers(packer) -> torch.Tensor:
    return (packer.numbers(7, ROWS, COLUMNS) - 64).to(torch.float8_e4m3fn)


def weight(directory: Path, tmp_path: Path) -> QuantWeight:
    found = load_model(str(directory), cache=tmp_path).weights[f"{MODULE}.weight"]
    assert isinstance(found, QuantWeight)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e8m0fnu], ids=str)
def test_a_scale_of_each_block_is_multiplied_with(dtype, numbers, packer, checkpoint, tmp_path: Path) -> None:
    scale = packer.scales(2, 4).float().to(dtype)
    found = weight(checkpoint({"weight": numbers, "weight_scale_inv": scale}, BLOCKS), tmp_path)
    expected = numbers.float() * scale.float().repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert torch.equal(found.dense(), expected)
    inputs = found.scheme.input_activations
    assert inputs is not None
    assert (inputs.strategy, inputs.group_size, inputs.dynamic) == ("group", 32, True)


@pytest.mark.parametrize("scale", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("entering", ["activation_scale", "input_scale"])
def test_one_scale_is_called_by_either_name(scale, entering, numbers, checkpoint, tmp_path: Path) -> None:
    parts = {"weight": numbers, scale: torch.tensor(0.25), entering: torch.tensor(0.5)}
    found = weight(checkpoint(parts, {**FP8, "activation_scheme": "static"}), tmp_path)
    assert found.scheme.name == "FP8"
    assert torch.equal(found.dense(), numbers.float() / 4)
    assert found.load().input_scale.tolist() == [0.5]


@pytest.mark.parametrize("own", [True, False], ids=["config.json", "hf_quant_config.json"])
def test_modelopts_fp8(own, numbers, checkpoint, tmp_path: Path) -> None:
    parts = {"weight": numbers, "weight_scale": torch.tensor(0.25), "input_scale": torch.tensor(0.5)}
    quantization = {"quant_method": "modelopt", **MODELOPT["quantization"]} if own else None
    found = weight(checkpoint(parts, quantization, {} if own else {"hf_quant_config.json": MODELOPT}), tmp_path)
    assert found.scheme.name == "FP8"
    assert torch.equal(found.dense(), numbers.float() / 4)


def test_modelopts_scales_of_channels(numbers, packer, checkpoint, tmp_path: Path) -> None:
    scale = packer.scales(ROWS)
    config = {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    found = weight(checkpoint({"weight": numbers, "weight_scale": scale}, config), tmp_path)
    assert found.scheme.name == "FP8_DYNAMIC"
    assert torch.equal(found.dense(), numbers.float() * scale.float()[:, None])


@pytest.mark.parametrize(
    ("config", "parts", "error", "message"),
    [
        ({"activation_scheme": "static"}, {}, UnsupportedError, "fp8 in blocks with static activations"),
        ({"activation_scheme": "other"}, {}, UnsupportedError, "activation_scheme: other"),
        ({"weight_block_size": [64, 64]}, {}, InputError, r"weight_scale_inv is \[2, 4\], not \[1, 2\]"),
        ({}, {"weight_scale": torch.ones(2, 4)}, InputError, "weight_scale_inv and .*weight_scale"),
        ({}, {"weight": torch.zeros(ROWS, COLUMNS)}, InputError, "has dtype F32, not F8_E4M3"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, {}, UnsupportedError, "quant_algo NVFP4"),
    ],
    ids=["static blocks", "activations", "blocks", "two scales", "floats", "nvfp4"],
)
def test_what_does_not_fit_is_named(
    config: dict[str, Any], parts, error, message, numbers, packer, checkpoint, tmp_path: Path
) -> None:
    stored = {"weight": numbers, "weight_scale_inv": packer.scales(2, 4).float(), **parts}
    with pytest.raises(error, match=message):
        load_model(str(checkpoint(stored, {**BLOCKS, **config})), cache=tmp_path)
