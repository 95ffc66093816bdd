"""Orthogonal matrices made of small factors, applied without being formed."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rotation"]


@dataclass(frozen=True, slots=True)
class Rotation:
    """An orthogonal matrix R of order ``size``: signs and a Kronecker product F of small orthogonal factors.

    ``R = diag(signs) F``, the randomized Hadamard transform of QuaRot (Ashkboos et al. 2024, arXiv:2404.00456, section
    3) where the factors are Hadamard matrices.

    With ``keeps_mean`` it is ``R = F diag(signs) F^T`` with the first sign 1. As F's first column is constant, the row
    of ones is an eigenvector: a vector's mean is that of its rotation, which is what LayerNorm subtracts. Not in the
    paper.

    Attributes:
        signs: Float64 ``[size]``, of 1 and -1.
        factors: Float64, square, orthogonal, each with a constant first column.
        keeps_mean: Which of the two.
    """

    signs: Tensor
    factors: tuple[Tensor, ...]
    keeps_mean: bool = False

    @property
    def size(self) -> int:
        """Its order."""
        return len(self.signs)

    def apply(self, x: Tensor) -> Tensor:
        """``x R``, block by block where ``x`` is wider: float64 ``[..., width]``, ``width`` a multiple of ``size``."""
        blocks = x.to(torch.float64).reshape(-1, self.size)
        if self.keeps_mean:
            blocks = self._product(self._product(blocks) * self.signs, transposed=True)
        else:
            blocks = self._product(blocks * self.signs)
        return blocks.reshape(x.shape)

    def matrix(self) -> Tensor:
        """R itself, float64 ``[size, size]``."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))

    def _product(self, rows: Tensor, *, transposed: bool = False) -> Tensor:
        """``rows`` times F, or times its transpose: each factor turns one of the axes that the columns are split in."""
        orders = [len(factor) for factor in self.factors]
        split = rows.reshape(len(rows), *orders)
        for axis, factor in enumerate(self.factors, start=1):
            turned = split.movedim(axis, -1) @ (factor.T if transposed else factor)
            split = turned.movedim(-1, axis)
        return split.reshape(rows.shape)
