"""Back to floats: the values that the integers stand for, and nothing else changed."""

from pathlib import Path

import torch

from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.model import DenseWeight
from llmopt.optimizer.sources import load_model
from llmopt.passes.dequantize import Dequantize
from llmopt.passes.round_to_nearest import RoundToNearest


def test_every_quantized_weight_becomes_its_floats(tiny_llama: Path, tmp_path: Path) -> None:
    quantized = RoundToNearest(scheme="W4A16", group_size=16).run(
        load_model(str(tiny_llama), cache=tmp_path), PassContext()
    )
    found = Dequantize().run(quantized, PassContext())
    for name, weight in found.weights.items():
        assert isinstance(weight, DenseWeight)
        assert torch.equal(weight.load().float(), quantized.weights[name].dense())
        if isinstance(quantized.weights[name], DenseWeight):
            assert weight is quantized.weights[name]


def test_it_can_be_quantized_otherwise_then(tiny_llama: Path, tmp_path: Path) -> None:
    quantized = RoundToNearest(scheme="W8A16").run(load_model(str(tiny_llama), cache=tmp_path), PassContext())
    other = RoundToNearest(scheme="W4A16", group_size=16)
    again = Dequantize().run(quantized, PassContext())
    other.requires(again)
    assert other.run(again, PassContext()).weights["model.layers.0.mlp.up_proj.weight"].scheme.name == "W4A16 g16"


def test_a_model_in_float_is_left_as_it_is_and_that_is_noted(tiny_llama: Path, tmp_path: Path) -> None:
    model, notes = load_model(str(tiny_llama), cache=tmp_path), []
    assert Dequantize().run(model, PassContext(note=notes.append)) is model
    assert notes == ["no weight of this model was quantized"]
