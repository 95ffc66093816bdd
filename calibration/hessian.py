"""What calibration says about a linear: the weighted second moments of its inputs, in one place for every pass."""

from typing import Literal

import torch
from torch import Tensor

from llmopt.calibration.reference import fast_dtype

__all__ = ["Moments", "TokenWeighting"]

TokenWeighting = Literal["none", "inverse_norm", "unit_norm"]
"""The weight of a token's row x: 1, 1/|x|, or 1/|x|^2, which makes all rows equally long."""

_BLOCK = 192
"""Columns whose products are taken together."""

_POWER = {"none": 0.0, "inverse_norm": 0.5, "unit_norm": 1.0}


class Moments:
    """Second moments of a linear's input: ``matrix``, H, the sum of w x x^T over tokens, float64 ``[in, in]``.

    In the first tokens of a text a few channels are hundreds of times larger than anywhere else (attention sinks). With
    equal weights these tokens are all that H knows; weighting by the norm makes every token count.

    ``largest`` is the largest magnitude of each column, float32 ``[in]``. With pairs it also holds ``cross``, the sum
    of w (x' - x) x^T, where x' is the same row in the float model. It only says where to move a weight before it is
    rounded, so it is multiplied in bfloat16 where the CPU is faster at that.

    Args:
        columns: Width of the input.
        weighting: See ``TokenWeighting``; the norm is that of x.
        paired: Whether ``add`` is given the float model's rows.
    """

    def __init__(self, columns: int, *, weighting: TokenWeighting = "none", paired: bool = False) -> None:
        self._matrix = torch.zeros(columns, columns, dtype=torch.float64)
        self.cross = torch.zeros(columns, columns, dtype=torch.float64) if paired else None
        self.largest = torch.zeros(columns)
        self._power = _POWER[weighting]

    def add(self, rows: Tensor, exact: Tensor | None = None) -> None:
        """Count some tokens.

        Args:
            rows: float32 ``[tokens, in]``, multiplied in float32 and summed in float64.
            exact: The float model's rows, where this is paired.
        """
        if len(rows):
            self.largest = torch.maximum(self.largest, rows.abs().amax(dim=0))
        # A root mean square instead of a norm keeps H in the range of float32 whatever the width.
        size = rows.square().mean(dim=1, keepdim=True).sqrt_().pow_(self._power)
        size[size == 0] = 1
        weighted = rows / size
        # The product is symmetric: of each block of rows, what lies left of the diagonal is not computed.
        for first in range(0, len(self._matrix), _BLOCK):
            block = weighted[:, first : first + _BLOCK]
            self._matrix[first : first + _BLOCK, first:] += block.T @ weighted[:, first:]
        if self.cross is not None:
            assert exact is not None
            self.cross += _fast_product(exact.sub(rows).div_(size), weighted)

    @property
    def matrix(self) -> Tensor:
        """H; what ``add`` left out is filled in."""
        for first in range(0, len(self._matrix), _BLOCK):
            past = first + _BLOCK
            self._matrix[past:, first:past] = self._matrix[first:past, past:].T
        return self._matrix

    @property
    def importance(self) -> Tensor:
        """The diagonal of H: how much each input column counts, float32 ``[in]``."""
        return self._matrix.diagonal().to(torch.float32)


def _fast_product(first: Tensor, second: Tensor) -> Tensor:
    """``first.T @ second``, multiplied in the dtype that the CPU is fastest at and summed in float32."""
    dtype = fast_dtype()
    return (first.to(dtype).T @ second.to(dtype)).to(torch.float32)
