"""The two factors of an adapter for a model that passes have changed since its checkpoint."""

from dataclasses import dataclass

from torch import Tensor

from llmopt.optimizer.basis import Basis
from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.lora.adapter import Adapter
from llmopt.optimizer.lora.changes import LowRank, Stored
from llmopt.optimizer.model import DenseWeight, Model
from llmopt.optimizer.weight_rounding import relative_error

__all__ = ["LoraFactors", "factors_of"]


_SAME = 0.01
"""Relative difference of a table that was saved in bfloat16 from the same in float32, with room."""


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """What is added to a linear: ``y = W x + up (down x)``, where ``x`` is what the model's own weight reads.

    Attributes:
        down: Float32 ``[rank, in]``.
        up: Float32 ``[out, rank]``, with the scaling in it.
        bias: Float32 ``[out]``, added as well; None where nothing is.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None


def factors_of(adapter: Adapter, model: Model) -> dict[str, LoraFactors]:
    """The factors for every linear and table that ``adapter`` changes, by module.

    Args:
        adapter: Trained on the checkpoint that the model was made from.
        model: As passes left it; its ``bases`` say what they did.

    Raises:
        InputError: The table that the adapter was saved with is not the model's.
        UnsupportedError: The adapter does more than low-rank products.
    """
    found: dict[str, LoraFactors] = {}
    for name, change in adapter.changes.items():
        if not isinstance(change, LowRank):
            kind = "DoRA" if adapter.config.use_dora else "weights that were trained whole"
            raise UnsupportedError(
                f"{adapter.folder} has {kind}, which are no product of two factors: {name}",
                hint="merge_lora merges it into the checkpoint, in front of all other passes",
            )
        module = name.removesuffix(".weight")
        basis = model.bases.get(module, Basis())
        if change.table is not None:
            _check_table(change.table, basis, module, model)
        down, up, bias = basis.factors(*change.factors())
        found[module] = LoraFactors(down.float(), up.float(), None if bias is None else bias.float())
    return found


def _check_table(table: Stored, basis: Basis, module: str, model: Model) -> None:
    """PEFT saves an adapted table along: the base's, which tells another base. A rounded one is not compared."""
    weight = model.weights[model.weight_of(module)]
    if not isinstance(weight, DenseWeight):
        return
    expected, _ = basis.linear(table.read().double())
    if relative_error(weight.dense(), expected) > _SAME:
        raise InputError(
            f"{table.tensor.path}: {table.name} is not the table of {model.source.spec}",
            hint="the adapter was trained on another base",
        )
