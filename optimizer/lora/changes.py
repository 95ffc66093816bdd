"""What an adapter does to one weight: low-rank products, DoRA's directions with their lengths, and whole tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from llmopt.optimizer.errors import InputError
from llmopt.optimizer.tensor_file import FileTensor

__all__ = ["Added", "Change", "Dora", "LowRank", "Replaced", "Stored"]


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of an adapter's file, or a part of it, read when it is asked for.

    Attributes:
        name: In the file.
        tensor: Where it lies.
        part: Which part of it, and how that stands; None: all, as it is.
    """

    name: str
    tensor: FileTensor
    part: Callable[[Tensor], Tensor] | None = None

    def read(self) -> Tensor:
        """Its values, float32.

        Raises:
            InputError: One of them is not finite, or the file has changed.
        """
        values = self.tensor().to(torch.float32)
        if not values.isfinite().all():
            raise InputError(
                f"{self.tensor.path}: {self.name} has values that are not finite",
                hint="the file is damaged, or the training diverged: take an earlier checkpoint of it",
            )
        return values if self.part is None else self.part(values)


class Change(Protocol):
    """What becomes of one weight."""

    def of(self, base: Tensor) -> Tensor:
        """What is added to the base's weight, float32 of its shape; ``base`` is float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """``scaling * up @ down`` is added to a weight ``[out, in]``; an embedding's rows are its outputs.

    Attributes:
        down: ``[rank, in]``.
        up: ``[out, rank]``.
        scaling: alpha / rank, or alpha / sqrt(rank).
        table: The weight that the adapter was saved with, and which it is added to instead of the base's.
    """

    down: Stored
    up: Stored
    scaling: float
    table: Stored | None = None

    def of(self, base: Tensor) -> Tensor:
        """See ``Change``."""
        product = self.up.read() @ self.down.read() * self.scaling
        return product if self.table is None else product + (self.table.read() - base)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Float64 ``down``, and ``up`` with the scaling in it."""
        return self.down.read().double(), self.up.read().double() * self.scaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Dora:
    """The direction of what LoRA makes of a weight, with lengths of its own.

    Source: Liu et al. 2024, DoRA, arXiv:2402.09353, equation 5. There, and in PEFT, lengths are those of a linear's
    rows ``[out]``; in PEFT they are those of an embedding's columns.

    Attributes:
        product: LoRA's change.
        lengths: ``[out]`` or ``[in]``.
        along: What has a length.
    """

    product: LowRank
    lengths: Stored
    along: Literal["rows", "columns"]

    def of(self, base: Tensor) -> Tensor:
        """See ``Change``."""
        moved = base + self.product.of(base)
        axis = 1 if self.along == "rows" else 0
        norms = torch.linalg.vector_norm(moved, dim=axis, keepdim=True, dtype=torch.float64).clamp_(min=1e-30)
        factors = self.lengths.read().double().unsqueeze(axis) / norms
        change: Tensor = moved * factors.to(torch.float32) - base
        return change


@dataclass(frozen=True, slots=True)
class Replaced:
    """A weight that was trained whole: ``modules_to_save``, and biases."""

    value: Stored

    def of(self, base: Tensor) -> Tensor:
        """See ``Change``."""
        return self.value.read() - base


@dataclass(frozen=True, slots=True)
class Added:
    """A bias ``[out]`` behind LoRA's second factor, which is added to the linear's, or to ``trained`` in its place."""

    value: Stored
    scaling: float
    trained: Stored | None = None

    def of(self, base: Tensor) -> Tensor:
        """See ``Change``."""
        added = self.value.read() * self.scaling
        return added if self.trained is None else added + (self.trained.read() - base)
