"""The one judge of all rows: our float32 reference on dequantized weights, against the float model on the same text."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llmopt.calibration.reference import Reference
from llmopt.evaluation.measure import compare_states
from llmopt.optimizer.model import DenseWeight, Model, QuantTensors, Weight
from llmopt.optimizer.scheme import PRESETS
from llmopt.optimizer.weight_rounding import round_weight
from llmopt.optimizer.weight_store import read_weights

__all__ = [
    "Figures",
    "Judge",
    "Size",
    "Theirs",
    "size_of",
    "with_our_weights",
    "with_rounded_tables",
    "with_their_weights",
]

_TABLES = PRESETS["W8A16"].with_group_size(32)


@dataclass(frozen=True, slots=True)
class Figures:
    """What a quantized model lost.

    Attributes:
        perplexity: On the text.
        source_perplexity: The float model's.
        kl: KL(float || quantized), nats per token.
        top1: Share of tokens with the same most likely successor.
    """

    perplexity: float
    source_perplexity: float
    kl: float
    top1: float

    @property
    def increase(self) -> float:
        """Of the perplexity, as a share of the float model's."""
        return self.perplexity / self.source_perplexity - 1

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "increase": self.increase}


@dataclass(frozen=True, slots=True)
class Size:
    """Of the decoder's linears, without the head, as a 16-bit checkpoint stores them.

    Attributes:
        bits: Of values, scales and zero points.
        weights: How many numbers they stand for.
    """

    bits: int
    weights: int

    @property
    def bytes(self) -> int:
        """In whole bytes."""
        return -(-self.bits // 8)

    @property
    def bits_per_weight(self) -> float:
        """On average."""
        return self.bits / self.weights


@dataclass(frozen=True, slots=True)
class Theirs:
    """What another program wrote.

    Attributes:
        weights: By parameter name.
        bits: What a linear takes, where its weight is in float only because its own format is none that is read here.
    """

    weights: Mapping[str, Weight]
    bits: Mapping[str, int] = field(default_factory=dict)


class Judge:
    """Holds what leaves the float model's last layer, computed once for all rows.

    Args:
        model: The float model.
        ids: The text, int64 ``[windows, tokens]``.
        threads: Of PyTorch.
    """

    def __init__(self, model: Model, ids: Tensor, *, threads: int) -> None:
        self._ids = ids
        self._threads = threads
        self._source = Reference(model, threads=threads)
        self._states = self._source.hidden_states(ids)

    def figures(self, model: Model) -> Figures:
        """Run ``model`` on the text."""
        reference = Reference(model, threads=self._threads)
        states = reference.hidden_states(self._ids)
        distance = compare_states(self._source, self._states, reference, states, self._ids)
        perplexity, source_perplexity = distance.perplexities
        return Figures(perplexity, source_perplexity, distance.mean_kl, distance.top1)


def with_our_weights(model: Model, directory: Path) -> Model:
    """The model with the weights that ``run_passes`` left; scales of groups are what float16 holds of them."""
    return model.with_weights({name: _as_stored(weight) for name, weight in read_weights(directory).items()})


def with_their_weights(model: Model, theirs: Theirs) -> Model:
    """The model with the weights of another program, but for embedding and head, which the judge treats alike.

    Scales of groups are what float16 holds of them.
    """
    names = model.weights.keys() - _tables(model)
    return model.with_weights({name: _as_stored(weight) for name, weight in theirs.weights.items() if name in names})


def with_rounded_tables(model: Model) -> Model:
    """Embedding and head in W8A16 with groups of 32, where they are in float."""
    changed: dict[str, Weight] = {}
    for name in _tables(model):
        weight = model.weights[name]
        if isinstance(weight, DenseWeight):
            changed[name], _ = round_weight(name, weight, _TABLES)
    return model.with_weights(changed)


def size_of(model: Model, theirs: Theirs | None = None) -> Size:
    """What the decoder's linears take; ``theirs`` says so where another program packed them in its own way.

    Scales of groups take 16 bits, others 32; what is in float takes 16 bits a number.
    """
    bits = weights = 0
    for module in model.linears():
        if module == model.arch.head:
            continue
        weight = model.weights[model.weight_of(module)]
        count = weight.shape[0] * weight.shape[1]
        weights += count
        packed = None if theirs is None else theirs.bits.get(module)
        bits += _bits(weight, count) if packed is None else packed
    return Size(bits, weights)


def _bits(weight: Weight, count: int) -> int:
    if isinstance(weight, DenseWeight):
        return 16 * count
    spec = weight.scheme.weights
    rows, groups = spec.scale_shape(weight.shape[0], weight.shape[1])
    scale = 16 if spec.strategy == "group" else 32
    index = 32 * weight.shape[1] if weight.has_group_index else 0
    return count * spec.num_bits + rows * groups * (scale + (0 if spec.symmetric else spec.num_bits)) + index


def _tables(model: Model) -> set[str]:
    """The names of the embedding's and the head's weights, which may be one."""
    return {f"{model.arch.embedding}.weight", model.weight_of(model.arch.head)}


def _as_stored(weight: Weight) -> Weight:
    if isinstance(weight, DenseWeight) or weight.scheme.weights.strategy != "group":
        return weight

    def load() -> QuantTensors:
        tensors = weight.load()
        return tensors._replace(scale=tensors.scale.half().float())

    return replace(weight, load=load)
