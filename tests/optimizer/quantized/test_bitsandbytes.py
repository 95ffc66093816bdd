"""bitsandbytes' checkpoints: values of a table times scales that are themselves quantized."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmopt.optimizer.errors import InputError
from llmopt.optimizer.model import DenseWeight, QuantWeight
from llmopt.optimizer.sources import load_model

MODULE, ROWS, COLUMNS = "model.layers.1.mlp.down_proj", 64, 128
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
STATE = "weight.quant_state.bitsandbytes__nf4"


def as_bytes(value: object) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


@pytest.fixture
def stored(packer):
    """Tensors with blocks of 64 values and of 16 scales, and what they stand for, value by value."""

    def make(*, nested: bool) -> tuple[dict[str, Tensor], Tensor]:
        numbers = packer.numbers(4, ROWS * COLUMNS)
        levels = torch.linspace(-1, 1, 16) ** 3
        count = ROWS * COLUMNS // 64
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [ROWS, COLUMNS]}
        absmax = packer.scales(count).float()
        parts = {"weight": (numbers[0::2] << 4 | numbers[1::2]).to(torch.uint8)[:, None], "weight.quant_map": levels}
        if nested:
            table, indices = torch.linspace(-1, 1, 256), packer.numbers(8, count, seed=3).to(torch.uint8)
            outer = packer.scales(count // 16).float()
            absmax = torch.tensor(
                [float(table[int(index)]) * float(outer[place // 16]) + 0.5 for place, index in enumerate(indices)]
            )
            state |= {"nested_blocksize": 16, "nested_offset": 0.5, "nested_dtype": "float32"}
            parts |= {"weight.absmax": indices, "weight.nested_absmax": outer, "weight.nested_quant_map": table}
        else:
            parts["weight.absmax"] = absmax
        values = [float(levels[int(number)]) * float(absmax[place // 64]) for place, number in enumerate(numbers)]
        return {**parts, STATE: as_bytes(state)}, torch.tensor(values).reshape(ROWS, COLUMNS)

    return make


@pytest.mark.parametrize("nested", [True, False])
def test_four_bit_numbers_are_read_as_floats(nested, stored, checkpoint, tmp_path: Path) -> None:
    parts, expected = stored(nested=nested)
    found = load_model(str(checkpoint(parts, CONFIG)), cache=tmp_path).weights[f"{MODULE}.weight"]
    assert isinstance(found, DenseWeight)
    torch.testing.assert_close(found.load(), expected, rtol=1e-6, atol=1e-7)  # the test computes in float64


def test_eight_bit_numbers_are_integers_with_a_scale_a_channel(packer, checkpoint, tmp_path: Path) -> None:
    numbers, largest = (packer.numbers(8, ROWS, COLUMNS) - 128).to(torch.int8), packer.scales(ROWS).float()
    parts = {"weight": numbers, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    directory = checkpoint(parts, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    found = load_model(str(directory), cache=tmp_path).weights[f"{MODULE}.weight"]
    assert isinstance(found, QuantWeight)
    assert found.scheme.name == "W8A16"
    torch.testing.assert_close(found.dense(), numbers.float() * largest[:, None] / 127, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight.quant_map": None}, "lacks .*quant_map"),
        ({STATE: None}, "lacks .*quant_state"),
        ({STATE: torch.zeros(4, dtype=torch.uint8)}, "cannot be read"),
        ({"weight": torch.zeros(8, 1, dtype=torch.uint8)}, r"weight is \[8, 1\], not \[4096, 1\]"),
        ({"weight.nested_absmax": torch.ones(3)}, r"nested_absmax is \[3\], not \[8\]"),
    ],
    ids=["table", "state", "damaged state", "size", "scales"],
)
def test_what_does_not_fit_is_named(changes, message, stored, checkpoint, tmp_path: Path) -> None:
    parts, _ = stored(nested=True)
    changed = {name: tensor for name, tensor in {**parts, **changes}.items() if tensor is not None}
    with pytest.raises(InputError, match=message):
        load_model(str(checkpoint(changed, CONFIG)), cache=tmp_path)
