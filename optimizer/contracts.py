"""What a pass, a graph pass and an exporter are, and what they are handed."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict

from llmopt.optimizer.errors import PassError
from llmopt.optimizer.scheme import Scheme
from llmopt.optimizer.target import Target

if TYPE_CHECKING:
    import onnx_ir as ir

    from llmopt.optimizer.manifest import Checkpoint, EncoderEngine, Engine, PassRecord
    from llmopt.optimizer.model import Model, Weight
    from llmopt.optimizer.tokens import Tokens

__all__ = [
    "ACTIVATION_BYTES",
    "CalibrationText",
    "Exporter",
    "Feature",
    "GraphPass",
    "PassContext",
    "QuantPass",
    "WeightPass",
]


Feature = Literal["an online rotation", "an int8 cache", "an int8 cache with a scale per channel"]
"""What a pass may add to a model that not everything an exporter writes has a place for."""

ACTIVATION_BYTES = 1 << 30
"""Of a text's activations, twice in passes that look at two models: kept in memory where a recipe sets no limit."""


class CalibrationText(Protocol):
    """The text that passes look at: known by its digest before any of it is read as tokens."""

    @property
    def digest(self) -> str:
        """Of everything that determines the windows; hexadecimal."""

    def tokens(self) -> "Tokens":
        """The windows, made once."""


def _no_calibration() -> "Tokens":
    """Where nobody gave a pass any text.

    Raises:
        PassError: Always.
    """
    raise PassError("a pass asked for calibration text and was given none", hint="set needs_calibration in its class")


@dataclass(frozen=True, slots=True)
class PassContext:
    """What a pass may use besides the model. Handed in, never global.

    Attributes:
        seed: The recipe's seed; the only source of randomness.
        strict: Whether a fallback is an error.
        verify: How thoroughly results are checked.
        threads: Of every library that computes; None keeps the process's numbers.
        activation_bytes: Activations of a whole text lie in memory up to this size, beyond it in a file in ``work``.
        calibration: Makes the calibration text, for passes that say ``needs_calibration``.
        work: A directory for finished parts, such as layers: what a killed pass left in it is there when the same pass
            runs on the same input again, and it is removed when the pass is done. None: nothing is kept.
        shared: The directory for what several passes can use, such as those with another budget on the same input and
            text, by what else it depends on; it outlives the build. Calls may run at the same time: write whole files.
        note: Records a fact in the manifest.
        fallback: Records that something less than asked for was done; raises under ``strict: true``.
        detail: Records one named value of the pass record, such as a count or a per-layer error.
        progress: Called with (finished, total) steps.
        keep: Writes finished weights to the work directory and returns them memory-mapped, so that a pass
            never holds more than the layer it works on.
    """

    seed: int = 0
    strict: bool = False
    verify: Literal["none", "quick", "full"] = "quick"
    threads: int | None = None
    activation_bytes: int = ACTIVATION_BYTES
    calibration: "Callable[[], Tokens]" = _no_calibration
    work: Path | None = None
    shared: Callable[..., Path | None] = field(default=lambda *what: None)
    note: Callable[[str], None] = field(default=lambda text: None)
    fallback: Callable[[str], None] = field(default=lambda text: None)
    detail: Callable[[str, Any], None] = field(default=lambda name, value: None)
    progress: Callable[[int, int], None] = field(default=lambda done, total: None)
    keep: "Callable[[Mapping[str, Weight]], Mapping[str, Weight]]" = field(default=lambda weights: weights)


class _Options(BaseModel, ABC):
    """The fields are the recipe's options; there is no other state."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def defined_in(self) -> Path | None:
        """The file with its class, which may be another distribution's; None where there is none."""
        file = getattr(sys.modules.get(type(self).__module__), "__file__", None)
        return Path(file) if file else None


class WeightPass(_Options):
    """One step of a recipe: a model in, a model out."""

    keeps_function: ClassVar[bool] = False
    """Whether the result computes what the input does, up to the rounding of float32; then it is verified."""

    needs_calibration: ClassVar[bool] = False
    """Whether the pass looks at text; its result then depends on that text too."""

    dequantizes: ClassVar[bool] = False
    """Whether nothing is quantized behind it, whatever the model was before."""

    for_encoders: ClassVar[bool] = False
    """Whether it takes encoders too."""

    trained_on_source: ClassVar[bool] = False
    """Whether it brings in what was trained on the source model: passes before it may only change that if they record
    how."""

    records_bases: ClassVar[bool] = False
    """Whether all that it changes is recorded in the model's ``bases``."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Files besides the model that the result depends on."""
        return ()

    @property
    def adds(self) -> frozenset[Feature]:
        """What the model has afterwards that not every exporter can write."""
        return frozenset()

    def fits(self, model: "Model") -> None:
        """Raise ``PassError`` when this pass is for no model with the names and widths of ``model``.

        Passes before it change neither, so all of a recipe's are asked about the source model, before any work.
        """

    def requires(self, model: "Model") -> None:
        """Raise ``PassError`` when ``model`` cannot be given to this pass as it is. Cheap: no tensor is read."""
        self.fits(model)

    def yardstick(self, source: "Model", seed: int) -> "Model":  # noqa: ARG002 - for those that change what is wanted
        """What a build with this pass is measured against: ``source``, unless the pass is there to change that."""
        return source

    @abstractmethod
    def run(self, model: "Model", context: PassContext) -> "Model":
        """The changed model, or ``model`` itself when there was nothing to do. Never mutates the input."""


class QuantPass(WeightPass):
    """A weight pass that quantizes linears; the recipe checks its schemes against the targets before any work."""

    @property
    def leaves_floats(self) -> bool:
        """Whether it only prepares weights for another quantizer."""
        return False

    @abstractmethod
    def schemes(self) -> dict[str, Scheme]:
        """Every scheme this pass may apply, by the option path that names it, as ``overrides.0.scheme``."""

    @abstractmethod
    def deciding(self, model: "Model") -> dict[str, str]:
        """Each linear of ``model``, in data order, with the option that decides about it.

        That option is among those of ``schemes()``, unless it keeps the linear in floating point.
        """

    def possible(self, model: "Model") -> dict[str, tuple[str, ...]]:
        """Each linear of ``model`` with every option that may decide about it: several where the pass chooses."""
        return {module: (option,) for module, option in self.deciding(model).items()}


class GraphPass(_Options):
    """One rewrite of a graph. It records how often it applied and why it declined a near-match."""

    @abstractmethod
    def run(self, graph: "ir.Model", context: PassContext) -> "ir.Model":
        """The rewritten graph: ``graph`` itself, changed in place, as onnx_ir's own passes do."""


class Exporter(_Options):
    """Writes an engine or a checkpoint."""

    @property
    @abstractmethod
    def folder(self) -> str:
        """Where below the build directory it writes; a build has one export for each."""

    @property
    def holds(self) -> frozenset[Feature]:
        """What it can write of a model beside its weights."""
        return frozenset(get_args(Feature))

    for_encoders: ClassVar[bool] = False
    """Whether it writes encoders too."""

    @abstractmethod
    def check(self, model: "Model") -> None:
        """Raise ``UnsupportedError`` or ``PassError`` when ``model`` cannot be exported. Cheap."""

    @abstractmethod
    def executors(self) -> list[Target]:
        """What executes the result; empty for checkpoints."""

    def refusal(
        self,
        scheme: Scheme,
        *,
        experts: bool = False,
        shape: tuple[int, ...] | None = None,  # noqa: ARG002 - for those that care
    ) -> str | None:
        """Why the result cannot have ``scheme`` in a linear, or in the experts of a mixture; None when it can.

        Args:
            scheme: Of the linear.
            experts: Whether it is an expert.
            shape: Its weight's; None before a model is known.
        """
        reasons = (target.refusal(scheme, experts=experts) for target in self.executors())
        return next((reason for reason in reasons if reason is not None), None)

    def longest(self, model: "Model") -> int | None:  # noqa: ARG002 - for those that have an engine
        """Tokens of the longest sequence the engine takes; None where there is no engine."""
        return None

    @abstractmethod
    def estimate(self, model: "Model") -> int:
        """Bytes the files will take, nearly; asked before any work, to find a disk that is too full."""

    @abstractmethod
    def export(
        self, model: "Model", directory: Path, context: PassContext
    ) -> "tuple[Engine | EncoderEngine | Checkpoint, list[PassRecord]]":
        """Write the engine or checkpoint below ``directory`` and describe it, with a record per graph pass."""
