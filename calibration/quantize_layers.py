"""Quantizing a decoder layer by layer with data: what every such pass shares, so that it only has to quantize linears.

Each layer is quantized from what enters it behind the quantized ones before it, and every finished layer is on disk:
a build that was killed continues at the layer it was in.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llmopt.calibration.coverage import Coverage
from llmopt.calibration.hessian import Moments, TokenWeighting
from llmopt.calibration.layerwise import Layerwise, observe_both
from llmopt.calibration.observe import Observer, finite_rows
from llmopt.optimizer.cache import publish
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.decoder import Layer
from llmopt.optimizer.memory_limit import return_memory
from llmopt.optimizer.model import Model, Weight
from llmopt.optimizer.weight_store import WeightStore, read_weights

__all__ = ["LinearFacts", "Plan", "Stage", "observed_moments", "quantize_layers"]

LinearFacts = dict[str, Any]
"""What is recorded about a linear: name of the fact -> value that JSON can hold."""

_FACTS = "facts.json"

_MOMENTS_BYTES = 2 << 30
"""Of the second moments of experts that are shown at once: those of a whole layer of Mixtral take 14 GB."""

_Readers = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """How the layers are gone through.

    Attributes:
        modules: The linears to quantize.
        follow: Whether a layer's input comes from the quantized layers before it; else from the float model.
        true_sequential: Whether within a layer, too, a linear is quantized behind those before it, as a stage of its
            own; else all linears of a layer are one stage.
        twin: Whether stages are also shown what enters in the float model. Experts get other tokens there, so those of
            a layer are then a stage of their own, which is not shown it.
        divisible: Whether a quantizer looks at what enters each linear by itself. Experts are then a stage of their own
            too, and shown a few at a time, as many as ``_MOMENTS_BYTES`` allow.
    """

    modules: Collection[str]
    follow: bool = True
    true_sequential: bool = True
    twin: bool = False
    divisible: bool = False


@dataclass(frozen=True, slots=True)
class Stage:
    """Linears that are quantized at the same time.

    Attributes:
        readers: Their names, those that read the same rows together, in data order.
        working: The text in front of their layer.
        exact: The same in the float model, where the plan says so.
        is_last: Whether it is the layer's last stage.
        tokens: How many rows were shown, by the first of each of ``readers``.
    """

    readers: tuple[tuple[str, ...], ...]
    working: Layerwise
    exact: Layerwise | None
    is_last: bool
    tokens: Counter[str] = field(default_factory=Counter)

    @property
    def index(self) -> int:
        """The layer's number."""
        return self.working.index

    @property
    def is_paired(self) -> bool:
        """Whether the float model's rows can be shown too: not for experts, which get other tokens there."""
        experts = self.working.reference.model.decoder.expert_linears
        return self.exact is not None and experts.isdisjoint(name for each in self.readers for name in each)

    def observe(self, observer: Observer) -> None:
        """Show what enters the first of each of ``readers``; see ``Layerwise.observe``."""

        def count(module: str, rows: Tensor) -> None:
            self.tokens[module] += len(rows)
            observer(module, rows)

        self.working.observe([each[0] for each in self.readers], count)

    def observe_both(self, observer: Callable[[str, Tensor, Tensor], None]) -> None:
        """Show it beside what enters in the float model; see ``layerwise.observe_both``."""
        assert self.exact is not None

        def count(module: str, rows: Tensor, exact: Tensor) -> None:
            self.tokens[module] += len(rows)
            observer(module, rows, exact)

        modules = [each[0] for each in self.readers]
        observe_both(self.working, self.exact, modules, count, exact_leaves=self.is_last)


Quantize = Callable[[Stage], tuple[dict[str, Weight], dict[str, LinearFacts]]]


def quantize_layers(
    model: Model, plan: Plan, context: PassContext, quantize: Quantize
) -> tuple[dict[str, Weight], dict[str, LinearFacts]]:
    """Go through all layers in order.

    Args:
        model: The float model.
        plan: See ``Plan``.
        context: Its calibration text is what is run; finished layers lie in its work directory.
        quantize: Called for each stage; returns the new weights by parameter name, and facts by linear: ``unreached``
            is that no token activates it, so that it was rounded to nearest.

    Returns:
        All new weights, mapped from the context's store, and all facts.

    Raises:
        PassError: No token reached one of the linears; or under ``strict`` none activates it.
    """
    runs = _Runs(model, plan, context)
    weights: dict[str, Weight] = {}
    facts: dict[str, LinearFacts] = {}
    for index, layer in enumerate(model.decoder.layers):
        made, found = _finished(context.work, index) or _new_layer(layer, plan, runs, quantize, context.work, index)
        weights |= context.keep(made)
        facts |= found
        for module, about in found.items():
            if about.pop("unreached", False):
                context.fallback(f"no calibration token activates {module}: it is rounded to nearest")
        if index + 1 < model.num_layers:
            runs.advance(made)
        return_memory()
        context.progress(index + 1, model.num_layers)
    coverage = Coverage(model.decoder, context.calibration(), plan.modules)
    for module, about in facts.items():
        if "tokens" in about:
            coverage.add(module, about.pop("tokens"))
    coverage.record(context)
    return weights, facts


def observed_moments(stage: Stage, *, weighting: TokenWeighting) -> dict[str, Moments]:
    """The moments of what enters each group of linears that read the same rows, by the first of them.

    Those of the float model are paired with them where the stage is.

    Raises:
        PassError: Something that enters is not finite.
    """
    model = stage.working.reference.model
    moments = {
        readers[0]: Moments(
            model.weights[model.weight_of(readers[0])].shape[1], weighting=weighting, paired=stage.is_paired
        )
        for readers in stage.readers
    }

    def add(module: str, rows: Tensor, exact: Tensor | None = None) -> None:
        moments[module].add(finite_rows(module, rows), exact)

    if stage.is_paired:
        stage.observe_both(add)
    else:
        stage.observe(add)
    return moments


class _Runs:
    """The text in front of a layer: in the model as it is being made, and where wanted in the float model."""

    def __init__(self, model: Model, plan: Plan, context: PassContext) -> None:
        self._follow = plan.follow
        self.working = Layerwise.of(model, context)
        self.exact = Layerwise.of(model, context) if plan.twin else None

    def take(self, weights: dict[str, Weight]) -> None:
        """Have later stages see quantized weights."""
        if self._follow:
            self.working.update(weights)

    def advance(self, weights: dict[str, Weight]) -> None:
        """Go on to the next layer."""
        self.take(weights)
        self.working.advance()
        if self.exact is not None:
            self.exact.advance()


def _new_layer(
    layer: Layer, plan: Plan, runs: _Runs, quantize: Quantize, work: Path | None, index: int
) -> tuple[dict[str, Weight], dict[str, LinearFacts]]:
    weights: dict[str, Weight] = {}
    facts: dict[str, LinearFacts] = {}
    for parts in _stages(layer, plan, runs):
        stage_weights: dict[str, Weight] = {}
        for part in parts:
            made, found = quantize(part)
            stage_weights |= made
            facts |= found
            for readers in part.readers:
                for module in readers:
                    facts[module] = {**facts.get(module, {}), "tokens": part.tokens[readers[0]]}
        weights |= stage_weights
        runs.take(stage_weights)
    if work is None:
        return weights, facts
    with publish(work / f"layer-{index:05d}") as partial:
        store = WeightStore(partial)
        if weights:
            store.keep(weights)
        store.close()
        (partial / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
    return _read(work / f"layer-{index:05d}")


def _finished(work: Path | None, index: int) -> tuple[dict[str, Weight], dict[str, LinearFacts]] | None:
    """A layer that a build which was killed had finished."""
    if work is None or not (directory := work / f"layer-{index:05d}").is_dir():
        return None
    return _read(directory)


def _read(directory: Path) -> tuple[dict[str, Weight], dict[str, LinearFacts]]:
    return read_weights(directory), json.loads((directory / _FACTS).read_text(encoding="utf-8"))


def _stages(layer: Layer, plan: Plan, runs: _Runs) -> Iterator[list[Stage]]:
    """The layer's stages, each in the parts that are shown to a quantizer one after the other."""
    model = runs.working.reference.model
    stages = [
        tuple(readers for each in stage if (readers := tuple(name for name in each if name in plan.modules)))
        for stage in layer.stages
    ]
    if not plan.true_sequential:
        everything = [readers for stage in stages for readers in stage]
        stages = _without_experts(everything, model) if plan.twin or plan.divisible else [tuple(everything)]
    parts = [_parts(stage, model) if plan.divisible else [stage] for stage in stages if stage]
    for stage in parts:
        yield [
            Stage(part, runs.working, runs.exact, is_last=stage is parts[-1] and part is stage[-1]) for part in stage
        ]


def _without_experts(everything: Sequence[_Readers], model: Model) -> list[tuple[_Readers, ...]]:
    """Two stages: what is no expert, and experts."""
    experts = model.decoder.expert_linears
    return [
        tuple(readers for readers in everything if experts.isdisjoint(readers) is outside) for outside in (True, False)
    ]


def _parts(stage: tuple[_Readers, ...], model: Model) -> list[tuple[_Readers, ...]]:
    """Experts in parts whose second moments take ``_MOMENTS_BYTES`` at most; what is no expert in one."""
    if model.decoder.expert_linears.isdisjoint(stage[0]):
        return [stage]
    parts: list[list[_Readers]] = []
    taken = 0
    for readers in stage:
        size = 8 * model.weights[model.weight_of(readers[0])].shape[1] ** 2
        if not parts or taken + size > _MOMENTS_BYTES:
            parts.append([])
            taken = 0
        parts[-1].append(readers)
        taken += size
    return [tuple(part) for part in parts]
