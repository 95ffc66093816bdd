"""Hadamard matrices by construction, for orders that are no power of two as well."""

import torch
from torch import Tensor

__all__ = ["hadamard", "hadamard_factors"]

_LARGEST_POWER = 64
"""Powers of two are split into factors up to this order: applying them costs the sum of their orders."""


def hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix, float64 ``[order, order]`` of 1 and -1 with orthogonal rows, its first column all 1.

    Source: Sylvester 1867 (doubling) and Paley 1933, constructions I (order q + 1 for a prime q = 3 mod 4) and II
    (order 2q + 2 for a prime q = 1 mod 4). Not in the paper here: prime powers.

    Returns:
        None where none of these constructions, nor doubling one of them, has that order.
    """
    matrix = _paley(order)
    if matrix is None and order % 2 == 0 and (half := hadamard(order // 2)) is not None:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)
    return None if matrix is None else matrix * matrix[:, :1]


def hadamard_factors(size: int) -> tuple[list[Tensor], int]:
    """Small Hadamard matrices whose Kronecker product is one, of the largest order found that divides ``size``.

    Returns:
        Float64 factors, and what of ``size`` is left: the product of their orders times the rest is ``size``.
    """
    twos = size & -size
    odd = size // twos
    for part in sorted(_divisors(odd), reverse=True):
        order = part
        while order <= part * twos:
            base = _paley(order)
            if base is not None:
                base = base * base[:, :1]
                return [*([base] if order > 1 else []), *_powers(part * twos // order)], odd // part
            order *= 2
    raise AssertionError("order 1 is always there")


def _paley(order: int) -> Tensor | None:
    """An order that is not made by doubling: 1, 2, and Paley's."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if order % 4:
        return None
    if _is_prime(order - 1):  # 3 mod 4, as order is 0 mod 4
        return torch.eye(order, dtype=torch.float64) + _bordered(order - 1, left=-1.0)
    q = order // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        conference = _bordered(q, left=1.0)
        signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        turned = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, signs) + torch.kron(torch.eye(q + 1, dtype=torch.float64), turned)
    return None


def _bordered(q: int, *, left: float) -> Tensor:
    """The matrix of quadratic residues of differences modulo the prime ``q``, with a row and a column of ones."""
    numbers = torch.arange(q)
    is_square = torch.zeros(q, dtype=torch.bool)
    is_square[numbers[1:] ** 2 % q] = True
    residue = torch.where(is_square, 1.0, -1.0).to(torch.float64)
    residue[0] = 0.0
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = left
    matrix[1:, 1:] = residue[(numbers[:, None] - numbers[None]) % q]
    return matrix


def _powers(order: int) -> list[Tensor]:
    """Sylvester matrices of at most ``_LARGEST_POWER`` whose orders multiply to ``order``, a power of two."""
    factors = []
    while order > 1:
        part = min(order, _LARGEST_POWER)
        matrix = hadamard(part)
        assert matrix is not None
        factors.append(matrix)
        order //= part
    return factors


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))
