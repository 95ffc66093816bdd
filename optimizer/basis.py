"""What passes did to the inputs and outputs of a linear, so that an adapter trained on the checkpoint can follow.

Rotating, smoothing and folding norms multiply a linear's weight by a matrix from the right, where what it reads was
changed, and from the left, where what it makes was. A low-rank change of that weight is the product of two matrices:
the first takes what happens to the columns, the second what happens to the rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from llmopt.optimizer.rotation import Rotation

__all__ = ["Basis", "Scaled", "Shifted", "Turned", "followed"]


@dataclass(frozen=True, slots=True)
class Scaled:
    """Each channel multiplied by its factor, float ``[channels]``."""

    factors: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Of float64 ``[..., channels]``."""
        return x * self.factors


@dataclass(frozen=True, slots=True)
class Turned:
    """Channels rotated, in blocks over ``spans`` of (first, past the end), or over all of them."""

    rotation: Rotation
    spans: tuple[tuple[int, int], ...] | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Of float64 ``[..., channels]``."""
        if self.spans is None:
            return self.rotation.apply(x)
        turned = x.clone()
        for first, past_end in self.spans:
            turned[..., first:past_end] = self.rotation.apply(x[..., first:past_end])
        return turned


@dataclass(frozen=True, slots=True)
class Shifted:
    """A constant, float ``[in]``, that is no longer added to the input: the linear's bias takes its product."""

    values: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """All that happened to one linear ``[out, in]`` since its checkpoint, in order; a table's rows are outputs too.

    Attributes:
        columns: To what it reads.
        rows: To what it makes.
    """

    columns: tuple[Scaled | Turned | Shifted, ...] = ()
    rows: tuple[Scaled | Turned, ...] = ()

    def then(self, later: "Basis") -> "Basis":
        """Both, one behind the other."""
        return Basis(columns=self.columns + later.columns, rows=self.rows + later.rows)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """A linear as the model has it now.

        Args:
            weight: Float64 ``[out, in]``, the checkpoint's.
            bias: Float64 ``[out]``.

        Returns:
            The same of the model; a bias also where there was none and a constant input was taken out.
        """
        weight, product = self._read(weight)
        if product is not None:
            bias = product if bias is None else bias + product
        return self._made(weight, bias)

    def factors(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """A change ``up @ down`` of the checkpoint's weight as a change of the model's.

        Args:
            down: Float64 ``[rank, in]``.
            up: Float64 ``[out, rank]``.

        Returns:
            ``down`` and ``up`` of the model, and what has to be added to its bias, ``[out]``: None where nothing has.
        """
        down, product = self._read(down)
        up, bias = self._made(up, None if product is None else up @ product)
        return down, up, bias

    def _read(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """``weight`` with other columns, and its product with the constants that were taken out of its input."""
        product = None
        for change in self.columns:
            if isinstance(change, Shifted):
                found = weight @ change.values
                product = found if product is None else product + found
            else:
                weight = change.apply(weight)
        return weight, product

    def _made(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for change in self.rows:
            weight = change.apply(weight.T).T
            bias = None if bias is None else change.apply(bias)
        return weight, bias


def followed(bases: Mapping[str, Basis], later: Mapping[str, Basis]) -> dict[str, Basis]:
    """Module -> basis, with what happened later behind what had happened."""
    return {**bases, **{module: bases.get(module, Basis()).then(basis) for module, basis in later.items()}}
