"""What becomes of one norm, one linear or one table when what enters and leaves it is rotated."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.optimizer.basis import Basis, Scaled, Shifted, Turned
from llmopt.optimizer.decoder import Norm
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import DenseWeight, Model
from llmopt.optimizer.rotation import Rotation

__all__ = ["Turn", "norm_values", "turned_linear", "turned_norm", "turned_table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """How one linear changes. All of it is computed in float64 and stored in float32.

    Attributes:
        norm: The norm before it, whose weight goes into the linear's columns.
        takes_shift: Whether the norm's bias goes into the linear's, as well.
        columns: How what enters is rotated, in blocks over all columns.
        rows: How what leaves is rotated, in blocks over ``spans``.
        spans: Which outputs that are, as (first, past the end); None: all.
    """

    norm: Norm | None = None
    takes_shift: bool = False
    columns: Rotation | None = None
    rows: Rotation | None = None
    spans: tuple[tuple[int, int], ...] | None = None

    def basis(self, model: Model) -> Basis:
        """What that does to the linear; the norm is read."""
        columns: list[Scaled | Turned | Shifted] = []
        if self.norm is not None:
            scale, shift = norm_values(model, self.norm)
            columns += [Shifted(shift)] if self.takes_shift and shift is not None else []
            columns.append(Scaled(scale))
        if self.columns is not None:
            columns.append(Turned(self.columns))
        rows = () if self.rows is None else (Turned(self.rows, self.spans),)
        return Basis(columns=tuple(columns), rows=rows)


def turned_linear(model: Model, module: str, basis: Basis) -> dict[str, DenseWeight]:
    """The linear's new weight and, where it has one, bias, when ``basis`` happens to it."""
    name, bias_name = f"{module}.weight", f"{module}.bias"
    bias = model.weights[bias_name].dense().to(torch.float64) if bias_name in model.weights else None
    weight, bias = basis.linear(model.weights[name].dense().to(torch.float64), bias)
    changed = {name: weight} if bias is None else {name: weight, bias_name: bias}
    return {key: _stored(value) for key, value in changed.items()}


def turned_norm(model: Model, norm: Norm, rotation: Rotation, *, keeps_shift: bool) -> dict[str, DenseWeight]:
    """The norm with a weight of ones: what it was is in the linears behind it.

    Args:
        model: Holds its weight and bias.
        norm: One that only linears read.
        rotation: Of what these linears read.
        keeps_shift: Whether its bias stays here, divided by the weight that the linears multiply with; else it is 0.

    Raises:
        PassError: A channel has a bias, which must stay, and a weight of nearly 0.
    """
    scale, shift = norm_values(model, norm)
    changed = {f"{norm.name}.weight": torch.full_like(scale, 1 - norm.offset)}
    if shift is not None:
        kept = torch.zeros_like(shift)
        if keeps_shift:
            has_one = shift != 0
            if (scale[has_one].abs() < 1e-6 * scale.abs().max()).any():
                raise PassError(
                    f"{norm.name} has a channel with a bias and no weight, and linears without biases read it",
                    hint="residual: false leaves the norms as they are",
                )
            kept[has_one] = shift[has_one] / scale[has_one]
        changed[f"{norm.name}.bias"] = rotation.apply(kept)
    return {name: _stored(value) for name, value in changed.items()}


def turned_table(weight: DenseWeight, rotation: Rotation, *, scale: Tensor | None = None) -> DenseWeight:
    """A table ``[rows, columns]`` with its columns multiplied by ``scale`` and rotated, made when it is read."""
    return DenseWeight(weight.shape, torch.float32, _TurnedTable(weight, rotation, scale))


def norm_values(model: Model, norm: Norm) -> tuple[Tensor, Tensor | None]:
    """What a norm multiplies with and what it adds, float64 ``[width]``; None where it adds nothing."""
    scale = model.weights[f"{norm.name}.weight"].dense().to(torch.float64) + norm.offset
    shift = model.weights.get(f"{norm.name}.bias")
    return scale, None if shift is None else shift.dense().to(torch.float64)


@dataclass(frozen=True, slots=True)
class _TurnedTable:
    """Loads a table a few rows at a time; a ``RowLoader``."""

    weight: DenseWeight
    rotation: Rotation
    scale: Tensor | None

    def __call__(self) -> Tensor:
        table, first = torch.empty(self.weight.shape), 0
        for block in self.weight.blocks():
            table[first : first + len(block)] = self._turned(block)
            first += len(block)
        return table

    def rows(self, first: int, past_end: int) -> Tensor:
        """See ``RowLoader.rows``."""
        return self._turned(self.weight.rows(first, past_end))

    def _turned(self, rows: Tensor) -> Tensor:
        values = rows.to(torch.float64)
        return self.rotation.apply(values if self.scale is None else values * self.scale).to(torch.float32)


def _stored(values: Tensor) -> DenseWeight:
    return DenseWeight.of(values.to(torch.float32).contiguous())
