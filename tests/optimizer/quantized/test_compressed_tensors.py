"""compressed-tensors' checkpoints: every format's numbers, and configs that do not describe the tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.model import QuantWeight
from llmopt.optimizer.scheme import PRESETS
from llmopt.optimizer.sources import load_model

MODULE, ROWS, COLUMNS, SIZE = "model.layers.1.mlp.down_proj", 64, 128, 32


def config(
    weights: Mapping[str, Any], inputs: Mapping[str, Any] | None = None, form: str = "pack-quantized", **more: Any
):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        **more,
    }


def integers(bits: int = 4, **changes: Any) -> dict[str, Any]:
    spec = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": SIZE}
    return {**spec, "block_structure": None, "dynamic": False, "actorder": None, "observer": "minmax", **changes}


@pytest.fixture
def packed(packer):
    """Tensors of ``pack-quantized`` and the floats they stand for."""

    def make(bits: int, *, symmetric: bool = True) -> tuple[dict[str, Tensor], Tensor]:
        groups, half = COLUMNS // SIZE, 1 << (bits - 1)
        numbers, scales = packer.numbers(bits, ROWS, COLUMNS), packer.scales(ROWS, groups)
        zeros = packer.numbers(bits, ROWS, groups, seed=2)
        parts = {
            "weight_packed": packer.by_rows(numbers, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor([ROWS, COLUMNS]),
        }
        if not symmetric:
            parts["weight_zero_point"] = packer.by_columns(zeros, bits)
        index = torch.arange(COLUMNS) // SIZE
        middle = torch.full_like(zeros, half) if symmetric else zeros
        return parts, (numbers - middle[:, index]) * scales.float()[:, index]

    return make


def weight(directory: Path, tmp_path: Path) -> QuantWeight:
    found = load_model(str(directory), cache=tmp_path).weights[f"{MODULE}.weight"]
    assert isinstance(found, QuantWeight)
    return found


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_integers_are_what_they_stand_for(bits, symmetric, packed, checkpoint, tmp_path: Path) -> None:
    parts, expected = packed(bits, symmetric=symmetric)
    found = weight(checkpoint(parts, config(integers(bits, symmetric=symmetric))), tmp_path)
    assert torch.equal(found.dense(), expected)


@pytest.mark.parametrize(
    ("preset", "kind", "shape"),
    [
        ("W8A8", torch.int8, (ROWS, 1)),
        ("FP8", torch.float8_e4m3fn, (1,)),
        ("FP8_DYNAMIC", torch.float8_e4m3fn, (ROWS, 1)),
    ],
)
def test_numbers_of_8_bits_lie_in_tensors_of_their_own(preset, kind, shape, packer, checkpoint, tmp_path: Path) -> None:
    scheme = PRESETS[preset].model_dump(mode="json")
    numbers = (packer.numbers(7, ROWS, COLUMNS) - 64).to(kind)
    parts = {"weight": numbers, "weight_scale": packer.scales(*shape), "input_scale": torch.tensor([0.5])}
    if preset != "FP8":
        del parts["input_scale"]
    form = "int-quantized" if kind is torch.int8 else "float-quantized"
    found = weight(checkpoint(parts, config(scheme["weights"], scheme["input_activations"], form)), tmp_path)
    assert found.scheme.name == preset
    assert torch.equal(found.dense(), numbers.float() * parts["weight_scale"].float())
    entering = found.load().input_scale
    assert (None if entering is None else entering.tolist()) == ([0.5] if preset == "FP8" else None)


def test_a_name_decides_before_an_expression_and_that_before_a_class(packed, checkpoint, tmp_path: Path) -> None:
    parts, expected = packed(8)
    found = config(integers(2))
    by_name = {"targets": [MODULE], "weights": integers(8)}
    by_expression = {"targets": ["re:.*down_proj"], "weights": integers(4)}
    found["config_groups"] |= {"group_1": by_expression, "group_2": by_name}
    assert torch.equal(weight(checkpoint(parts, found), tmp_path).dense(), expected)


def test_a_missing_strategy_follows_from_the_group_size(packed, checkpoint, tmp_path: Path) -> None:
    parts, expected = packed(4)
    spec = {name: value for name, value in integers().items() if name != "strategy"}
    assert torch.equal(weight(checkpoint(parts, config(spec)), tmp_path).dense(), expected)


def test_scales_of_a_quantized_cache_are_left_out_and_named(packed, checkpoint, tmp_path: Path) -> None:
    parts, _ = packed(4)
    directory = checkpoint({**parts, "k_scale": torch.ones(1)}, config(integers()))
    model = load_model(str(directory), cache=tmp_path)
    assert any("cache" in note and "k_scale" in note for note in model.source.notes)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (config(integers(8)), InputError, r"weight_packed is \[64, 16\], not \[64, 32\]"),
        (config(integers(group_size=48)), InputError, "group_size 48 does not divide"),
        (config(integers(group_size=64)), InputError, r"weight_scale is \[64, 4\], not \[64, 2\]"),
        (config(integers(symmetric=False)), InputError, "lacks .*weight_zero_point"),
        (config(integers(5)), UnsupportedError, r"num_bits: Input should be 2, 3, 4 or 8"),
        (config(integers(), form="nvfp4-pack-quantized"), UnsupportedError, "format 'nvfp4-pack-quantized'"),
        (config(integers(), ignore=["re:.*down_proj"]), InputError, r"ignore has 're:\.\*down_proj'"),
        (config(integers(), config_groups={}), InputError, "no group of quantization_config speaks of it"),
        (config(integers(), sparsity_config={"format": "sparse"}), UnsupportedError, "sparsity_config"),
        (config(integers(), transform_config={"R1": {}}), UnsupportedError, "transform_config"),
    ],
    ids=[
        "bits", "odd groups", "groups", "zero points", "five bits", "format", "ignored", "no group", "sparsity",
        "transform",
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(changed, error, message, packed, checkpoint, tmp_path: Path) -> None:
    parts, _ = packed(4)
    with pytest.raises(error, match=message):
        load_model(str(checkpoint(parts, changed)), cache=tmp_path)
