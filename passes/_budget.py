"""What the weights of a model may cost, and what each linear costs in a scheme."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from llmopt.optimizer.model import Model
from llmopt.optimizer.scheme import Scheme, name_of
from llmopt.passes._cost import checkpoint_bits, engine_bytes, other_engine_bytes
from llmopt.passes._linear_times import linear_milliseconds

__all__ = ["Budget", "Costs", "Times"]

Times = Mapping[str, Mapping[str, float]]
"""Shape as ``ROWSxCOLUMNS`` -> name of a scheme -> measured milliseconds."""


class Budget(BaseModel):
    """What may be spent; exactly one of these."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    bits: float | None = Field(
        None, gt=0, description="Bits per weight, on average over the linears of the decoder's layers as a checkpoint "
        "stores them: values, 16-bit scales, zero points.",
    )  # fmt: skip
    bytes: PositiveInt | None = Field(None, description="Bytes of all weights in the engine for the CPU.")
    milliseconds: float | None = Field(
        None, gt=0, description="Time of the linears of the decoder's layers for one token, measured on this machine "
        "while the pass runs; another machine may choose otherwise.",
    )  # fmt: skip

    @model_validator(mode="after")
    def _is_one(self) -> "Budget":
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("a budget is exactly one of bits, bytes and milliseconds")
        return self

    @property
    def kind(self) -> Literal["bits", "bytes", "milliseconds"]:
        """Which one it is."""
        return "bits" if self.bits is not None else "bytes" if self.bytes is not None else "milliseconds"

    @property
    def limit(self) -> float:
        """Its value."""
        return float(getattr(self, self.kind))

    def words(self, value: float) -> str:
        """An amount of what it is about, for people."""
        if self.kind == "bits":
            return f"{value:.3f} bits"
        return f"{value / 1e6:.2f} MB" if self.kind == "bytes" else f"{value:.3f} ms"


class Costs:
    """What linears cost, in the unit of a budget; times are measured when they are first asked for.

    Attributes:
        times: All that were measured.

    Args:
        budget: Whose unit it is.
        model: The model.
        head: The scheme of its head, which counts among the bytes of an engine only.
        threads: That times are measured with.
        times: Those that were measured before.
    """

    def __init__(
        self,
        budget: Budget,
        model: Model,
        head: Scheme | None,
        *,
        threads: int | None = None,
        times: Times = MappingProxyType({}),
    ) -> None:
        self._budget = budget
        self._model = model
        self._threads = threads
        self.times = {shape: dict(each) for shape, each in times.items()}
        inside = model.linears()[:-1]
        self.weights = sum(rows * columns for rows, columns in map(self._shape, inside))
        self.other = other_engine_bytes(model, head) if budget.kind == "bytes" else 0

    @property
    def limit(self) -> float:
        """What the linears of the decoder's layers may cost together."""
        limit = self._budget.limit
        return limit * self.weights if self._budget.kind == "bits" else limit - self.other

    def of(self, modules: Sequence[str], scheme: Scheme | None) -> float:
        """The cost of some linears in one scheme; None keeps them in float."""
        return sum(self._one(self._shape(module), scheme) for module in modules)

    def shown(self, total: float) -> float:
        """The sum of all linears' costs in the words of the budget: bits per weight, bytes of an engine, or ms."""
        return total / self.weights if self._budget.kind == "bits" else total + self.other

    def _shape(self, module: str) -> tuple[int, int]:
        rows, columns = self._model.weights[self._model.weight_of(module)].shape
        return rows, columns

    def _one(self, shape: tuple[int, int], scheme: Scheme | None) -> float:
        if self._budget.kind == "bits":
            return checkpoint_bits(shape, scheme)
        if self._budget.kind == "bytes":
            return engine_bytes(shape, scheme)
        known, name = self.times.setdefault(f"{shape[0]}x{shape[1]}", {}), name_of(scheme)
        if name not in known:
            known[name] = linear_milliseconds(shape, scheme, threads=self._threads)
        return known[name]
