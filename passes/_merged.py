"""Weights with adapters in them, made when they are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.lora.adapter import Adapter
from llmopt.optimizer.lora.changes import Change
from llmopt.optimizer.lora.factors import LoraFactors, factors_of
from llmopt.optimizer.model import DenseWeight, Model, Weight
from llmopt.passes._combining import Combination

__all__ = ["merged_weights", "untied"]

_Weighted = tuple[float, Change]


def merged_weights(
    model: Model, adapters: Sequence[tuple[float, Adapter]], combination: Combination
) -> dict[str, DenseWeight]:
    """Every weight that an adapter changes, in float32 whatever the model's dtype, by parameter.

    Nothing is read before one of them is. The head of a tied model has an entry of its own where it is changed. A model
    that passes have changed since its checkpoint gets the changes that fit it.
    """
    by_name: dict[str, list[_Weighted]] = {}
    for weight, adapter in adapters:
        changes = _in_bases(factors_of(adapter, model), model) if model.bases else adapter.changes
        for name, change in changes.items():
            by_name.setdefault(name, []).append((weight, change))
    head = f"{model.arch.head}.weight"
    bases = {name: model.weights[model.weight_of(model.arch.head) if name == head else name] for name in by_name}
    return {
        name: DenseWeight(base.shape, torch.float32, _Merged(name, base, tuple(by_name[name]), combination))
        for name, base in bases.items()
    }


def untied(
    model: Model, merged: Mapping[str, DenseWeight], context: PassContext
) -> tuple[Model, Mapping[str, DenseWeight]]:
    """The model and its merged weights, with a table for the head where that is no longer the embedding's.

    Adapters see one of the two uses of a shared table. Only where they were tied as well do both change alike.
    """
    embedding, head = f"{model.arch.embedding}.weight", f"{model.arch.head}.weight"
    changed = {embedding, head} & merged.keys()
    if not model.is_tied or not changed:
        return model, merged
    if len(changed) == 2 and torch.equal(merged[embedding].load(), merged[head].load()):
        return model, {name: weight for name, weight in merged.items() if name != head}
    rows, columns = model.weights[embedding].shape
    which = "the two differently" if len(changed) == 2 else f"{changed.pop()} alone"
    context.note(f"{model.arch.head} has a table of its own now, {rows} x {columns}: adapters change {which}")
    return model.with_weights({head: model.weights[embedding]}), merged


@dataclass(frozen=True, slots=True)
class _Merged:
    """Loads a weight with its changes."""

    name: str
    base: Weight
    changes: tuple[_Weighted, ...]
    combination: Combination

    def __call__(self) -> Tensor:
        """Float32, of the base's shape.

        Raises:
            PassError: A value is not finite.
        """
        base = self.base.dense()
        changes = [change.of(base) for _, change in self.changes]
        merged = base + self.combination.of(self.name, changes, [weight for weight, _ in self.changes])
        if not merged.isfinite().all():
            raise PassError(
                f"{self.name} has values that are not finite with the adapters in it",
                hint="the weights given to adapters are too large, or the model is damaged",
            )
        return merged


@dataclass(frozen=True, slots=True)
class _Fixed:
    """A change that does not depend on the base's values."""

    value: Tensor

    def of(self, base: Tensor) -> Tensor:  # noqa: ARG002 - see above
        """See ``Change``."""
        return self.value


@dataclass(frozen=True, slots=True)
class _Product:
    """The product of two factors."""

    factors: LoraFactors

    def of(self, base: Tensor) -> Tensor:  # noqa: ARG002 - it does not depend on it
        """See ``Change``."""
        return self.factors.up @ self.factors.down


def _in_bases(factors: Mapping[str, LoraFactors], model: Model) -> dict[str, Change]:
    """What factors change in a model that has other bases than its checkpoint."""
    changes: dict[str, Change] = {}
    for module, each in factors.items():
        changes[f"{module}.weight"] = _Product(each)
        if each.bias is not None:
            assert f"{module}.bias" in model.weights  # where a norm's bias went
            changes[f"{module}.bias"] = _Fixed(each.bias)
    return changes
