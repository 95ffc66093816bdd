"""Rounded weights of a model, and the scale of inputs that goes with them."""

import pytest
import torch

from llmopt.optimizer.model import DenseWeight
from llmopt.optimizer.scheme import PRESETS
from llmopt.optimizer.weight_rounding import round_weight

WEIGHT = DenseWeight.of(torch.randn(6, 32, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("name", "steps"), [("W8A8_STATIC", 127.5), ("FP8", 448)])
def test_a_static_scale_of_inputs_covers_the_largest(name, steps) -> None:
    rounded, error = round_weight("it", WEIGHT, PRESETS[name], torch.tensor([3.0, 51.0]))
    assert rounded.load().input_scale.tolist() == pytest.approx([51 / steps])
    plain, error_without = round_weight("it", WEIGHT, PRESETS[name])
    assert plain.load().input_scale is None
    assert torch.equal(rounded.dense(), plain.dense())
    assert error == error_without


def test_other_schemes_have_no_scale_of_inputs() -> None:
    rounded, _ = round_weight("it", WEIGHT, PRESETS["W8A8"], torch.tensor(51.0))
    assert rounded.load().input_scale is None
