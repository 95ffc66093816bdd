"""From the standard graph to a target's, one graph pass after the other."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from llmopt.exporters.onnx.adapter_inputs import GivenAdapters
from llmopt.exporters.onnx.lora import LoraOptions
from llmopt.exporters.onnx.standard import standard_graph
from llmopt.optimizer import loader
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.decoder import Decoder
from llmopt.optimizer.manifest import PassRecord
from llmopt.optimizer.model import Model
from llmopt.optimizer.records import Recorder
from llmopt.optimizer.target import Target

__all__ = ["Stage", "finished", "passed", "stages"]


@dataclass(frozen=True, slots=True)
class Stage:
    """The graph at one point of its lowering.

    Attributes:
        name: ``standard``, or the graph pass that has just run.
        graph: One and the same object at every stage, changed in place by the next.
        record: What the graph pass did; None for the standard graph.
    """

    name: str
    graph: ir.Model
    record: PassRecord | None


def stages(
    model: Model,
    target: Target,
    *,
    capacity: int,
    strict: bool = False,
    decoder: Decoder | None = None,
    lora: LoraOptions | GivenAdapters | None = None,
) -> Iterator[Stage]:
    """The standard graph, then the graph behind each of ``target``'s graph passes.

    Args:
        model: Its large weights are read only when the graph is saved.
        target: Whose graph passes run.
        capacity: Positions the rope tables cover.
        strict: Whether a fallback is an error.
        decoder: What to compute with these weights; by default what the model's own config says.
        lora: Which linears take adapters.
    """
    graph = standard_graph(model, capacity=capacity, decoder=decoder, lora=lora)
    yield from passed(graph, target.graph_passes, options=target.options, strict=strict)


def passed(
    graph: ir.Model,
    names: Sequence[str],
    *,
    options: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    strict: bool = False,
) -> Iterator[Stage]:
    """``graph`` as it is, then behind each of the graph passes called ``names``.

    Args:
        graph: A standard graph; changed in place.
        names: Files in ``passes/graph/``.
        options: Of those that need some, by name.
        strict: Whether a fallback is an error.
    """
    common.ShapeInferencePass()(graph)
    yield Stage("standard", graph, None)
    for name in names:
        chosen = dict(options.get(name, {}))
        recorder = Recorder(name, chosen, strict=strict)
        before = _operators(graph)
        context = PassContext(note=recorder.note, fallback=recorder.fallback, detail=recorder.detail)
        loader.load("passes.graph", name)(**chosen).run(graph, context)
        recorder.detail("operators", {"before": before, "after": _operators(graph)})
        yield Stage(name, graph, recorder.record(changed=bool(recorder.details["applied"])))


def finished(steps: Iterator[Stage]) -> tuple[ir.Model, list[PassRecord]]:
    """The graph of the last stage, with a record per graph pass."""
    records = []
    for stage in steps:
        if stage.record is not None:
            records.append(stage.record)
    return stage.graph, records


def _operators(graph: ir.Model) -> dict[str, int]:
    """How often each operator occurs; those outside of ai.onnx as ``domain::operator``."""
    names = (f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.graph)
    return dict(sorted(Counter(names).items()))
