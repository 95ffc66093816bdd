"""GPTQ's arithmetic: rounding the columns of a weight one after the other, each making up for those before it."""

import torch
from torch import Tensor

from llmopt.optimizer.grid import from_grid, to_grid
from llmopt.optimizer.model import QuantTensors
from llmopt.optimizer.scheme import QuantSpec

__all__ = ["SingularHessianError", "corrected", "inverse_factor", "output_error", "sweep"]

_BLOCK = 128
"""Columns whose errors are pushed onto the columns behind the block at once, as one matrix product."""

_TRIANGLE = 128
"""Columns of a triangle that is inverted at once."""

_LARGEST_DAMPING = 1.0


class SingularHessianError(Exception):
    """A Hessian that is not positive definite even when its diagonal is doubled: it has values that are not finite."""


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """The upper Cholesky factor U of the damped inverse: ``U^T U = (H + d mean(diag H) I)^-1``.

    With the order of rows and columns reversed, the lower factor of H becomes an upper R with ``H = R R^T``; U is the
    inverse of R. That is half the work of factorizing the inverse, and never forms it.

    Args:
        hessian: float64 ``[in, in]``, symmetric and positive semidefinite.
        damping: d. It is multiplied by ten until the factorization succeeds.

    Returns:
        U, float64 ``[in, in]``, and the damping that was needed.

    Raises:
        SingularHessianError: It does not succeed with a damping of 1.
    """
    while True:
        lower, info = torch.linalg.cholesky_ex(_damped(hessian, damping).flip(0, 1))
        if info == 0 and lower.isfinite().all():
            return _inverted_upper(lower.flip(0, 1)), damping
        if damping >= _LARGEST_DAMPING:
            raise SingularHessianError
        damping = min(_LARGEST_DAMPING, max(10 * damping, 1e-6))


def corrected(weight: Tensor, cross: Tensor, factor: Tensor, *, order: Tensor, share: float) -> Tensor:
    """The weight that on the quantized layers' output gives most nearly what the original gives on the float model's.

    ``W + share * W C (H + d I)^-1`` with C the sum of (x' - x) x^T: the least-squares solution for share 1.

    Source: Arai and Ichikawa 2025, QEP, arXiv:2504.09629, equation 9.

    Args:
        weight: float32 ``[out, in]``.
        cross: C, float64 ``[in, in]``.
        factor: Of ``inverse_factor`` for H, the sum of x x^T, with its rows and columns in ``order``.
        order: int64 ``[in]``, a permutation.
        share: 0 leaves the weight alone.
    """
    change = cross.new_empty(weight.shape)
    change[:, order] = (weight.to(torch.float64) @ cross[:, order]) @ factor.T @ factor
    return weight + share * change.to(torch.float32)


def sweep(
    weight: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec, *, order: Tensor
) -> QuantTensors:
    """Round the columns in ``order``, pushing the error of each onto those not yet rounded.

    Source: Frantar et al. 2022, GPTQ, arXiv:2210.17323, Algorithm 1. The grid is given beforehand, so that the order of
    the columns changes which errors are made up for, but not which columns share a scale: MatMulNBits and every other
    kernel takes the result without ``g_idx``.

    Args:
        weight: float32 ``[out, in]``; not modified.
        factor: Of ``inverse_factor`` for the Hessian with its rows and columns in ``order``.
        scale: float32, as ``grids`` gives it.
        zero: int8 of its shape; None for symmetric schemes.
        spec: How the weight is quantized.
        order: int64 ``[in]``, a permutation.

    Returns:
        The rounded weight, its columns where they were.
    """
    columns = weight.shape[1]
    factor = factor.to(torch.float32)
    # A column of the weight is a row here, so that each step reads and writes memory in order.
    rest = weight.T[order].contiguous()
    each = QuantTensors(weight, scale, zero, block=spec.block_structure).by_row()
    scales, zeros = each.scale.T.contiguous(), None if each.zero is None else each.zero.T.contiguous()
    width = spec.block_structure[1] if spec.block_structure else columns // len(scales)
    group, diagonal = (order // width).tolist(), factor.diagonal().tolist()
    values = torch.empty(rest.shape, dtype=torch.float8_e4m3fn if spec.type == "float" else torch.int8)
    for first in range(0, columns, _BLOCK):
        past = min(first + _BLOCK, columns)
        errors = torch.empty(past - first, rest.shape[1])
        for j in range(first, past):
            step, zero_point = scales[group[j]], None if zeros is None else zeros[group[j]]
            values[j] = to_grid(rest[j], step, zero_point, spec)
            error = torch.sub(rest[j], from_grid(values[j], step, zero_point), out=errors[j - first])
            error /= diagonal[j]
            rest[j + 1 : past].addr_(factor[j, j + 1 : past], error, alpha=-1)
        rest[past:].addmm_(factor[first:past, past:].T, errors, alpha=-1)
    back = torch.empty_like(values)
    back[order] = values
    return QuantTensors(back.T.contiguous(), scale, zero, block=spec.block_structure)


def output_error(difference: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """How far the outputs move, relative to them: ``sqrt(tr(D H D^T) / tr(W H W^T))``.

    Args:
        difference: D, float32 ``[out, in]``: rounded minus original.
        weight: W, float32 ``[out, in]``.
        hessian: float64 ``[in, in]``.
    """
    matrix = hessian.to(torch.float32)
    moved, whole = (float(((each @ matrix) * each).sum(dtype=torch.float64)) for each in (difference, weight))
    return (max(moved, 0.0) / whole) ** 0.5 if whole > 0 else 0.0


def _damped(hessian: Tensor, damping: float) -> Tensor:
    damped = hessian.clone()
    damped.diagonal().add_(damping * hessian.diagonal().mean())
    return damped


def _inverted_upper(matrix: Tensor) -> Tensor:
    """``matrix``, an upper triangle, inverted in place: halves by themselves, then the block that joins them."""
    columns = len(matrix)
    if columns <= _TRIANGLE:
        identity = torch.eye(columns, dtype=matrix.dtype)
        return matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=True))
    half = columns // 2
    first, last = _inverted_upper(matrix[:half, :half]), _inverted_upper(matrix[half:, half:])
    matrix[:half, half:] = (first @ matrix[:half, half:]) @ last.neg()
    return matrix
