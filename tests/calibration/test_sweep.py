"""GPTQ's sweep against the plain algorithm of the paper, and what its result must be."""

import pytest
import torch

from llmopt.calibration import sweep as module
from llmopt.calibration.sweep import SingularHessianError, corrected, inverse_factor, output_error, sweep
from llmopt.optimizer.rounding import grid, grids, quantize
from llmopt.optimizer.scheme import PRESETS, QuantSpec, Scheme

OUT, IN = 10, 48


def spec_of(bits=4, group=16, *, symmetric=True):
    return QuantSpec(num_bits=bits, strategy="group", group_size=group, symmetric=symmetric)


@pytest.fixture
def weight():
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def hessian():
    rows = torch.randn(200, IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows = rows @ torch.randn(IN, IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return rows.T @ rows


def grid_of(weight, spec):
    return grid(weight.reshape(len(weight), -1, spec.group_size or weight.shape[1]), spec)


def naive(weight, hessian, spec, order, damping):
    """Optimal brain quantization in a fixed order: after each column all others are solved again exactly."""
    scale, zero = grid_of(weight, spec)
    size = spec.group_size or weight.shape[1]
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    rest, values = weight.double().clone(), torch.zeros_like(weight)
    left = order.tolist()
    for j in order.tolist():
        inverse = torch.linalg.inv(damped[left][:, left])
        for row in range(len(weight)):
            step = scale[row, j // size].double()
            shift = 0 if zero is None else int(zero[row, j // size])
            q = torch.clamp(torch.round(rest[row, j] / step) + shift, spec.quant_min, spec.quant_max)
            values[row, j] = q
            error = (rest[row, j] - (q - shift) * step) / inverse[0, 0]
            rest[row, left] -= error * inverse[0]
        left = left[1:]
    return values.to(torch.int8)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_is_the_plain_algorithm(weight, hessian, bits, symmetric) -> None:
    spec = spec_of(bits, symmetric=symmetric)
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(4))
    factor, damping = inverse_factor(hessian[order][:, order], 0.01)
    found = sweep(weight, factor, *grid_of(weight, spec), spec, order=order)
    expected = naive(weight, hessian, spec, order, damping)
    # Float32 and float64 part where a value lies on the border of two steps; what is behind it in the row follows.
    same_rows = (found.values == expected).all(dim=1)
    assert same_rows.float().mean() >= 0.8


def test_blocks_do_not_change_the_result(weight, hessian, monkeypatch) -> None:
    spec, order = spec_of(8), torch.arange(IN)
    factor, _ = inverse_factor(hessian, 0.01)
    whole = sweep(weight, factor, *grid_of(weight, spec), spec, order=order)
    monkeypatch.setattr(module, "_BLOCK", 5)
    blocks = sweep(weight, factor, *grid_of(weight, spec), spec, order=order)
    assert (whole.values - blocks.values).abs().max() <= 1
    assert (whole.values == blocks.values).float().mean() > 0.97


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [16, 48])
def test_outputs_move_less_than_with_plain_rounding(weight, hessian, group, act_order) -> None:
    spec = spec_of(4, group)
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(IN)
    factor, _ = inverse_factor(hessian[order][:, order], 0.01)
    swept = sweep(weight, factor, *grid_of(weight, spec), spec, order=order)
    plain = quantize(weight, Scheme(weights=spec))
    errors = [output_error(each.dense() - weight, weight, hessian) for each in (swept, plain)]
    assert errors[0] < 0.75 * errors[1]
    assert swept.values.abs().max() <= 8
    assert torch.equal(swept.scale, plain.scale)


def test_with_independent_inputs_it_is_plain_rounding(weight) -> None:
    spec = spec_of()
    factor, _ = inverse_factor(torch.eye(IN, dtype=torch.float64) * 3, 0.01)
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(4))
    swept = sweep(weight, factor, *grid_of(weight, spec), spec, order=order)
    assert torch.equal(swept.values, quantize(weight, PRESETS["W4A16"].with_group_size(16)).values)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(num_bits=4, strategy="channel"),
        QuantSpec(num_bits=4, strategy="tensor"),
        QuantSpec(num_bits=8, type="float", strategy="channel"),
        QuantSpec(num_bits=8, type="float", strategy="tensor"),
        QuantSpec(num_bits=8, type="float", strategy="block", block_structure=(4, 20)),
    ],
    ids=str,
)
def test_every_way_of_sharing_a_scale(weight, hessian, spec) -> None:
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(4))
    factor, _ = inverse_factor(hessian[order][:, order], 0.01)
    scheme = Scheme(weights=spec)
    swept = sweep(weight, factor, *grids(weight, spec), spec, order=order)
    plain = quantize(weight, scheme)
    errors = [output_error(each.dense() - weight, weight, hessian) for each in (swept, plain)]
    assert errors[0] < 0.85 * errors[1]
    assert swept.values.dtype == plain.values.dtype
    assert torch.equal(swept.scale, plain.scale)


@pytest.mark.parametrize("triangle", [5, 128])
def test_the_factor_is_of_the_damped_inverse(hessian, triangle, monkeypatch) -> None:
    monkeypatch.setattr(module, "_TRIANGLE", triangle)
    factor, damping = inverse_factor(hessian, 0.05)
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    assert damping == 0.05
    assert torch.equal(factor, factor.triu())
    expected = torch.linalg.inv(damped)
    torch.testing.assert_close(factor.T @ factor, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


def test_damping_grows_until_a_singular_matrix_can_be_factored() -> None:
    column = torch.ones(IN, dtype=torch.float64)
    singular = torch.outer(column, column) - 1e-3 * torch.eye(IN, dtype=torch.float64)
    _, damping = inverse_factor(singular, 0.0)
    assert damping == pytest.approx(1e-2)


def test_a_matrix_with_values_that_are_not_finite_is_refused(hessian) -> None:
    hessian[3, 3] = torch.nan
    with pytest.raises(SingularHessianError):
        inverse_factor(hessian, 0.01)


def test_a_corrected_weight_gives_on_disturbed_inputs_most_nearly_the_original_outputs(weight) -> None:
    generator = torch.Generator().manual_seed(5)
    exact = torch.randn(300, IN, generator=generator)
    rows = exact + 0.3 * torch.randn(300, IN, generator=generator) + 0.2 * exact.roll(1, dims=1)
    hessian, cross = (rows.T @ rows).double(), ((exact - rows).T @ rows).double()
    order = torch.randperm(IN, generator=generator)
    factor, _ = inverse_factor(hessian[order][:, order], 0.0)
    found = corrected(weight, cross, factor, order=order, share=1.0)
    expected = torch.linalg.lstsq(rows, exact @ weight.T).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(corrected(weight, cross, factor, order=order, share=0.0), weight)


def test_the_output_error_is_that_of_the_outputs(weight) -> None:
    rows = torch.randn(100, IN, generator=torch.Generator().manual_seed(6))
    difference = 0.1 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(7))
    expected = (rows @ difference.T).norm() / (rows @ weight.T).norm()
    assert output_error(difference, weight, (rows.T @ rows).double()) == pytest.approx(float(expected), rel=1e-5)
    assert output_error(difference, torch.zeros_like(weight), torch.eye(IN).double()) == 0
