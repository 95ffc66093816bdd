"""Random rotations that spread every channel over all others."""

import torch
from torch import Tensor

from llmopt.optimizer.rotation import Rotation
from llmopt.passes._hadamard import hadamard_factors

__all__ = ["random_rotation"]


def random_rotation(size: int, generator: torch.Generator, *, keeps_mean: bool = False) -> Rotation:
    """One of order ``size``: of Hadamard matrices, and where it has none, of one random orthogonal matrix as well."""
    factors, rest = hadamard_factors(size)
    factors = [factor / len(factor) ** 0.5 for factor in factors]
    if rest > 1:
        factors.append(_random_orthogonal(rest, generator))
    signs = torch.randint(0, 2, (size,), generator=generator).to(torch.float64) * 2 - 1
    if keeps_mean:
        signs[0] = 1.0
    return Rotation(signs, tuple(factors), keeps_mean)


def _random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Float64 ``[size, size]``, uniformly random but for its first column, which is constant."""
    columns = torch.randn(size, size, generator=generator, dtype=torch.float64)
    columns[:, 0] = 1.0
    orthogonal, triangle = torch.linalg.qr(columns)
    signed: Tensor = orthogonal * triangle.diagonal().sign()
    return signed
