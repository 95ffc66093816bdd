"""AWQ checkpoints: the layout's own example, and refusals of what it is not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.model import QuantWeight
from llmopt.optimizer.sources import load_model

MODULE, ROWS, COLUMNS, SIZE = "model.layers.1.mlp.down_proj", 64, 128, 32
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": SIZE, "zero_point": True, "version": "gemm"}


def words(numbers: torch.Tensor) -> torch.Tensor:
    """int32 ``[rows, columns / 8]``; from the lowest bits, a word holds its columns 0, 2, 4, 6, 1, 3, 5, 7."""
    found = torch.zeros(len(numbers), numbers.shape[1] // 8, dtype=torch.int64)
    for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        found |= numbers[:, column::8] << (4 * place)
    return torch.where(found >= 1 << 31, found - (1 << 32), found).to(torch.int32)


@pytest.fixture
def parts(packer) -> dict[str, torch.Tensor]:
    return {
        "qweight": words(packer.numbers(4, COLUMNS, ROWS)),
        "qzeros": words(packer.numbers(4, COLUMNS // SIZE, ROWS, seed=2)),
        "scales": packer.scales(COLUMNS // SIZE, ROWS),
    }


def weight(directory: Path, tmp_path: Path) -> QuantWeight:
    found = load_model(str(directory), cache=tmp_path).weights[f"{MODULE}.weight"]
    assert isinstance(found, QuantWeight)
    return found


def test_the_words_here_are_the_formats_own_example() -> None:
    assert words(torch.arange(8)[None]).tolist() == [[0x75316420]]


def test_packed_integers_are_what_they_stand_for(parts, packer, checkpoint, tmp_path: Path) -> None:
    found = weight(checkpoint(parts, CONFIG), tmp_path)
    index = torch.arange(COLUMNS) // SIZE
    zeros = packer.numbers(4, COLUMNS // SIZE, ROWS, seed=2)
    expected = (packer.numbers(4, COLUMNS, ROWS) - zeros[index]) * parts["scales"].float()[index]
    assert found.scheme.name == "W4A16_ASYM g32"
    assert torch.equal(found.dense(), expected.T)


def test_older_checkpoints_spell_the_config_otherwise(parts, checkpoint, tmp_path: Path) -> None:
    older = {"w_bit": 4, "q_group_size": SIZE, "zero_point": True, "version": "GEMM"}
    found = weight(checkpoint(parts, None, {"quant_config.json": older}), tmp_path)
    assert torch.equal(found.dense(), weight(checkpoint(parts, CONFIG), tmp_path).dense())


def test_autoround_packs_as_awq_does(parts, checkpoint, tmp_path: Path) -> None:
    config = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "sym": False}
    found = weight(checkpoint(parts, {**config, "group_size": SIZE}), tmp_path)
    assert torch.equal(found.dense(), weight(checkpoint(parts, CONFIG), tmp_path).dense())


def test_symmetric_ones_have_zero_points_of_8_only(parts, checkpoint, tmp_path: Path) -> None:
    symmetric = {**CONFIG, "zero_point": False}
    middle = words(torch.full((COLUMNS // SIZE, ROWS), 8))
    assert weight(checkpoint({**parts, "qzeros": middle}, symmetric), tmp_path).scheme.name == "W4A16 g32"
    with pytest.raises(InputError, match="zero points other than 8 under zero_point: false"):
        load_model(str(checkpoint(parts, symmetric)), cache=tmp_path)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"version": "gemv"}, UnsupportedError, "version: gemv"),
        ({"bits": 8}, UnsupportedError, "bits: 8"),
        ({"group_size": 48}, InputError, "group_size 48 does not divide"),
        ({"group_size": 64}, InputError, r"scales is \[4, 64\], not \[2, 64\]"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:ark"}, UnsupportedError, "auto_round:ark"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(config: dict[str, Any], error, message, parts, checkpoint, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        load_model(str(checkpoint(parts, {**CONFIG, **config})), cache=tmp_path)
