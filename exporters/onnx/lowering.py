"""From the standard graph to a target's: runs its graph passes and tidies up after them."""

import onnx_ir as ir
from onnx_ir.passes import common

from llmopt.exporters.onnx.standard import standard_graph
from llmopt.optimizer import loader
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.decoder import Decoder
from llmopt.optimizer.manifest import PassRecord
from llmopt.optimizer.model import Model
from llmopt.optimizer.records import Recorder
from llmopt.optimizer.target import Target

__all__ = ["lowered_graph"]

_TIDY = (
    common.InlinePass,
    common.CommonSubexpressionEliminationPass,
    common.RemoveUnusedNodesPass,
    common.RemoveUnusedFunctionsPass,
    common.RemoveUnusedOpsetsPass,
    common.TopologicalSortPass,
    common.NameFixPass,
)


def lowered_graph(
    model: Model, target: Target, *, capacity: int, strict: bool = False, decoder: Decoder | None = None
) -> tuple[ir.Model, list[PassRecord]]:
    """The graph ``target`` executes, with a record per graph pass.

    Args:
        model: Its weights are read only when the graph is saved.
        target: Whose graph passes run.
        capacity: Positions the rope tables cover.
        strict: Whether a fallback is an error.
        decoder: What to compute with these weights; by default what the model's own config says.
    """
    graph = standard_graph(model, capacity=capacity, decoder=decoder)
    common.ShapeInferencePass()(graph)
    records = []
    for name in target.graph_passes:
        step = loader.load("passes.graph", name)()
        recorder = Recorder(name, {}, strict=strict)
        step.run(graph, PassContext(note=recorder.note, fallback=recorder.fallback, detail=recorder.detail))
        records.append(recorder.record(changed=bool(recorder.details.get("applied"))))
    for tidy in _TIDY:
        tidy()(graph)
    return graph, records
