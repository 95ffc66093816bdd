"""Rounding against a loop over single numbers, and the bounds it promises."""

import itertools
import math

import pytest
import torch

from llmopt.optimizer.grid import from_grid, to_grid
from llmopt.optimizer.rounding import joined, quantize, quantize_on
from llmopt.optimizer.scheme import PRESETS, QuantSpec, Scheme


def scheme(bits=8, group=None, *, symmetric=True):
    strategy = "channel" if group is None else "group"
    return Scheme(weights=QuantSpec(num_bits=bits, strategy=strategy, group_size=group, symmetric=symmetric))


SCHEMES = [scheme(b, g, symmetric=s) for b in (2, 3, 4, 8) for g in (None, 16) for s in (True, False)]
by_name = pytest.mark.parametrize("chosen", SCHEMES, ids=lambda s: s.name)


def weights(rows=6, columns=48, *, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def naive(weight, chosen):
    """The same, one number at a time, in Python's floats rounded to float32 where the tensors are."""
    spec = chosen.weights
    low_limit, high_limit = -(2 ** (spec.num_bits - 1)), 2 ** (spec.num_bits - 1) - 1
    f32 = lambda number: float(torch.tensor(number, dtype=torch.float32))  # noqa: E731
    size = spec.group_size or weight.shape[1]
    values, scales, zeros = [], [], []
    for row in weight.tolist():
        for start in range(0, len(row), size):
            group = row[start : start + size]
            if spec.symmetric:
                scale, zero = f32(max(abs(w) for w in group) / ((high_limit - low_limit) / 2)), 0
            else:
                low, high = min(0.0, *group), max(0.0, *group)
                scale = f32(f32(high - low) / (high_limit - low_limit))
                zero = min(max(round(low_limit - f32(low / (scale or 1))), low_limit), high_limit)
            scale = scale or 1.0
            values += [min(max(round(f32(w / scale)) + zero, low_limit), high_limit) for w in group]
            scales.append(scale)
            zeros.append(zero)
    return (
        torch.tensor(values).reshape(weight.shape),
        *(torch.tensor(x).reshape(len(weight), -1) for x in (scales, zeros)),
    )


def steps_off(weight, rounded):
    """The largest error of each group in steps of that group."""
    rows, groups = rounded.scale.shape
    off = (rounded.dense() - weight).abs().reshape(rows, groups, -1).amax(-1)
    return off / rounded.scale


@by_name
def test_it_agrees_with_a_loop_over_numbers(chosen):
    weight = weights()
    values, scales, zeros = naive(weight, chosen)
    found = quantize(weight, chosen)
    torch.testing.assert_close(found.scale, scales, rtol=1e-6, atol=0)
    assert found.values.long().equal(values)
    if found.zero is not None:
        assert found.zero.long().equal(zeros)
    else:
        assert chosen.weights.symmetric


@by_name
@pytest.mark.parametrize("seed", range(5))
def test_no_number_moves_by_more_than_it_may(chosen, seed):
    weight = weights(seed=seed) * 10.0 ** (seed - 2) + (0.5 * seed if seed > 2 else 0)
    rounded = quantize(weight, chosen)
    limit = 0.5 if chosen.weights.symmetric else 1.0
    assert steps_off(weight, rounded).max() <= limit * (1 + 1e-4)  # float32 division and product around the integer


@by_name
def test_types_shapes_and_range(chosen):
    rounded = quantize(weights(), chosen)
    spec = chosen.weights
    groups = 3 if spec.group_size else 1
    assert (rounded.values.dtype, rounded.scale.dtype) == (torch.int8, torch.float32)
    assert (tuple(rounded.values.shape), tuple(rounded.scale.shape)) == ((6, 48), (6, groups))
    assert rounded.values.min() >= spec.quant_min
    assert rounded.values.max() <= spec.quant_max
    assert (rounded.zero is None) == spec.symmetric
    if rounded.zero is not None:
        assert (rounded.zero.dtype, tuple(rounded.zero.shape)) == (torch.int8, (6, groups))
        assert rounded.zero.min() >= spec.quant_min
        assert rounded.zero.max() <= spec.quant_max


@by_name
def test_groups_of_zeros_stay_zeros(chosen):
    weight = weights()
    weight[2] = 0
    rounded = quantize(weight, chosen)
    assert (rounded.dense()[2] == 0).all()
    assert (rounded.scale > 0).all()


@by_name
@pytest.mark.parametrize("value", [1.0, -1.0, 3e-5, -7e4])
def test_groups_of_one_value_keep_it_within_half_a_step(chosen, value):
    weight = torch.full((2, 32), value)
    assert steps_off(weight, quantize(weight, chosen)).max() <= 0.5 * (1 + 1e-4)


@by_name
def test_an_outlier_costs_only_its_own_group(chosen):
    weight = weights()
    weight[1, 5] = 1e6
    plain, rounded = quantize(weights(), chosen), quantize(weight, chosen)
    assert rounded.dense()[1, 5] == pytest.approx(1e6, rel=1 / 2**chosen.weights.num_bits * 2)
    hit = torch.zeros(6, 48, dtype=torch.bool)
    hit[1, : chosen.weights.group_size or 48] = True
    assert rounded.dense()[~hit].equal(plain.dense()[~hit])
    assert torch.isfinite(rounded.dense()).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_is_always_representable(symmetric):
    weight = weights() + 5
    weight[:, ::7] = 0
    dense = quantize(weight, scheme(4, 16, symmetric=symmetric)).dense()
    assert (dense[:, ::7] == 0).all()


@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e38])
def test_the_ends_of_float32_stay_finite(value):
    weight = torch.tensor([[value, -value, 0.0, value / 2] * 8])
    for chosen in SCHEMES:
        dense = quantize(weight, chosen).dense()
        assert torch.isfinite(dense).all(), chosen.name


@by_name
def test_what_is_on_the_grid_stays_and_is_found_again(chosen):
    dense = quantize(weights(), chosen).dense()
    again = quantize(dense, chosen)
    assert steps_off(dense, again).max() <= (0.5 if chosen.weights.symmetric else 1.0) * (1 + 1e-4)


def test_rounding_halves_goes_to_even():
    weight = torch.tensor([[127.5, 0.5, 1.5, 2.5, -0.5, -1.5, -127.5]])  # the scale is 1
    assert quantize(weight, scheme(8)).values.tolist() == [[127, 0, 2, 2, 0, -2, -128]]


def test_more_bits_and_smaller_groups_err_less():
    weight = weights(64, 256)

    def error(chosen):
        return float((quantize(weight, chosen).dense() - weight).norm())

    assert error(scheme(8)) < error(scheme(4, 32)) < error(scheme(4, 128)) < error(scheme(3, 128))


def test_zero_points_err_less_on_numbers_of_one_sign():
    weight = weights().abs() + 1
    symmetric, asymmetric = (quantize(weight, scheme(4, 16, symmetric=s)) for s in (True, False))
    assert (asymmetric.dense() - weight).norm() < (symmetric.dense() - weight).norm()


def test_the_input_is_left_alone():
    weight = weights()
    quantize(weight, scheme(4, 16, symmetric=False))
    assert weight.equal(weights())


def test_a_transposed_input_gives_the_same():
    weight = weights(48, 6).T
    assert not weight.is_contiguous()
    assert quantize(weight, scheme(4, 16)).values.equal(quantize(weight.contiguous(), scheme(4, 16)).values)


def tile(height, width, *, bits=8, kind="int", symmetric=True):
    spec = QuantSpec(num_bits=bits, type=kind, symmetric=symmetric, strategy="block", block_structure=(height, width))
    return Scheme(weights=spec)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("height", "width"), [(4, 16), (4, 20), (5, 48), (1, 16), (6, 1), (128, 128)])
def test_each_block_is_rounded_like_a_tensor_of_its_own(height, width, symmetric):
    weight, chosen = weights(), tile(height, width, bits=4, symmetric=symmetric)
    alone = Scheme(weights=QuantSpec(num_bits=4, symmetric=symmetric, strategy="tensor"))
    found = quantize(weight, chosen)
    dense = found.dense()
    assert tuple(found.scale.shape) == chosen.weights.scale_shape(6, 48)
    for i, top in enumerate(range(0, 6, height)):
        for j, left in enumerate(range(0, 48, width)):
            part = (slice(top, top + height), slice(left, left + width))
            expected = quantize(weight[part], alone)
            assert expected.scale.item() == found.scale[i, j]
            assert expected.dense().equal(dense[part])


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_tensors_scale_is_the_one_of_its_largest_value(symmetric):
    weight, chosen = weights(), Scheme(weights=QuantSpec(num_bits=8, strategy="tensor", symmetric=symmetric))
    found, flat = quantize(weight, chosen), quantize(weight.reshape(1, -1), scheme(8, symmetric=symmetric))
    assert tuple(found.scale.shape) == (1, 1)
    assert found.dense().equal(flat.dense().reshape(6, 48))


FP8 = [PRESETS[name] for name in ("FP8", "FP8_DYNAMIC", "FP8_BLOCK")] + [tile(4, 20, kind="float")]
E4M3 = sorted({(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)} | {m * 2.0**-9 for m in range(8)})[:-1]
"""Every magnitude of E4M3; the last one of the formula, 480, is not a number."""


def nearest_e4m3(x):
    """The nearest magnitude, of two equally near ones that with an even last bit, which is that at an even index."""
    off = [abs(abs(x) - magnitude) for magnitude in E4M3]
    return math.copysign(min((error, i % 2, E4M3[i]) for i, error in enumerate(off))[2], x)


def test_fp8_numbers_are_the_nearest_of_the_format():
    x = torch.cat([weights().flatten() * 10.0**e for e in range(-4, 3)])
    ties = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(E4M3)])
    x = torch.cat([x, ties, -ties, torch.tensor([0.0, 448, 449, 1e9, -1e9])])
    found = to_grid(x, torch.ones(()), None, PRESETS["FP8"].weights)
    assert found.dtype == torch.float8_e4m3fn
    assert found.float().tolist() == [nearest_e4m3(number) for number in x.tolist()]


@pytest.mark.parametrize("chosen", FP8, ids=lambda s: s.name)
@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
def test_no_fp8_number_moves_by_more_than_half_a_step(chosen, factor):
    weight = weights() * factor
    found = quantize(weight, chosen)
    scale = found.by_row().scale.repeat_interleave(-(-48 // found.scale.shape[1]) if found.block is None else 1, 1)
    if found.block is not None:
        scale = scale.repeat_interleave(found.block[1], 1)[:, :48]
    limit = torch.maximum(weight.abs() / 16, scale * 2.0**-10)  # half of an eighth of the leading power, and of 2^-9
    assert (found.dense() - weight).abs().le(limit * (1 + 1e-5)).all()
    assert found.dense().abs().max() == pytest.approx(float(weight.abs().max()), rel=1e-6)


def test_numbers_on_a_given_grid_are_found_again():
    scale, zero = torch.rand(6, 1) + 0.1, torch.randint(-3, 3, (6, 1)).to(torch.int8)
    spec = scheme(4, symmetric=False).weights
    values = torch.randint(-8, 8, (6, 48)).to(torch.int8)
    assert to_grid(from_grid(values, scale, zero), scale, zero, spec).equal(values)
    given = quantize_on(from_grid(values, scale, zero), scale, zero, scheme(4, symmetric=False))
    assert given.values.equal(values)


@pytest.mark.parametrize("chosen", [*SCHEMES, *FP8, tile(2, 16, symmetric=False)], ids=lambda s: s.name)
def test_parts_of_rows_make_up_the_whole(chosen):
    whole = quantize(weights(128 + 6), chosen)
    each = whole.by_row()
    assert each.dense().equal(whole.dense())
    assert whole.rows(torch.tensor([130, 2, 2])).dense().equal(whole.dense()[[130, 2, 2]])
    assert whole.rows(slice(127, 131)).dense().equal(whole.dense()[127:131])
    if chosen.weights.strategy == "tensor":
        parts = [quantize_on(part, whole.scale, whole.zero, chosen) for part in weights(128 + 6).split(128)]
    else:
        parts = [quantize(part, chosen) for part in weights(128 + 6).split(128)]
    again = joined(parts, chosen.weights)
    assert again.dense().equal(whole.dense())
    assert again.scale.equal(whole.scale)
