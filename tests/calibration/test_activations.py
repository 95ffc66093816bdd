"""Rounding of activations against loops over rows, groups and single numbers."""

import pytest
import torch

from llmopt.calibration.activations import quantize_activations, quantize_per_token
from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.scheme import PRESETS, QuantSpec

DYNAMIC = {name: PRESETS[name].input_activations for name in ("W8A8", "FP8_DYNAMIC", "FP8_BLOCK")}
STATIC = {"int8": QuantSpec(num_bits=8, strategy="tensor"), "fp8": PRESETS["FP8"].input_activations}


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def naive_per_token(x):
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        m = row.abs().max()
        rows.append(row if m == 0 else torch.round(row / m * 127) * m / 127)
    return torch.stack(rows).reshape(x.shape)


def test_per_token_rounding_is_the_naive_one():
    x = torch.randn(4, 7, 33, generator=torch.Generator().manual_seed(1))
    x[1, 2] = 0
    rounded = quantize_per_token(x)
    torch.testing.assert_close(rounded, naive_per_token(x))
    half_step = x.abs().amax(-1, keepdim=True) / 254
    assert ((rounded - x).abs() <= half_step * (1 + 1e-5)).all()
    assert (rounded[1, 2] == 0).all()


@pytest.mark.parametrize("columns", [100, 128, 256, 300])
@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "FP8_BLOCK"])
def test_fp8_has_a_scale_for_each_token_or_group(name, columns):
    x = numbers(2, 3, columns) * 30
    found = quantize_activations(x, DYNAMIC[name])
    size = DYNAMIC[name].group_size or columns
    for row, rounded in zip(x.reshape(-1, columns), found.reshape(-1, columns), strict=True):
        for start in range(0, columns, size):
            group = row[start : start + size]
            scale = group.abs().max() / 448
            expected = (group / scale).to(torch.float8_e4m3fn).float() * scale
            torch.testing.assert_close(rounded[start : start + size], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_token_is_rounded_alone_and_zeros_stay_zeros(name):
    x = numbers(3, 4, 300)
    x[1, 2] = 0
    x[0, 1] = 1e20
    found = quantize_activations(x, DYNAMIC[name])
    assert found.isfinite().all()
    assert (found[1, 2] == 0).all()
    assert found[2, 3].equal(quantize_activations(x[2, 3], DYNAMIC[name]))


@pytest.mark.parametrize("kind", STATIC)
def test_a_static_scale_is_taken_as_it_is_and_larger_numbers_go_to_its_end(kind):
    x = numbers(5, 40)
    scale = torch.tensor([0.01])
    found = quantize_activations(x, STATIC[kind], scale)
    for number, rounded in zip(x.flatten().tolist(), found.flatten().tolist(), strict=True):
        if kind == "int8":
            expected = min(max(round(number / 0.01), -128), 127) * 0.01
            assert rounded == pytest.approx(expected, abs=1e-6) or abs(number / 0.01 % 1 - 0.5) < 1e-4
        else:
            assert abs(rounded - number) <= max(abs(number) / 16, 0.01 * 2**-10) * (1 + 1e-5)
    most = STATIC[kind].quant_max * 0.01
    huge = quantize_activations(torch.tensor([1e6]), STATIC[kind], scale)
    assert huge.item() == pytest.approx(most, rel=1e-6)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(num_bits=4, strategy="token", dynamic=True),
        QuantSpec(num_bits=8, strategy="tensor", dynamic=True),
        QuantSpec(num_bits=8, strategy="token", dynamic=True, symmetric=False),
        QuantSpec(num_bits=8, strategy="group", group_size=16, dynamic=True),
        QuantSpec(num_bits=8, strategy="tensor"),
    ],
)
def test_what_no_engine_does_is_refused(spec):
    with pytest.raises(UnsupportedError, match="activations cannot be quantized"):
        quantize_activations(numbers(2, 16), spec)
