"""Finds the node at which two graphs of one computation part: a graph pass keeps the names of what it keeps."""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir

from llmopt.exporters.onnx.calls import open_session, run_calls
from llmopt.optimizer.decoder import Decoder

__all__ = ["first_divergence"]


def first_divergence(before: bytes, after: bytes, decoder: Decoder, *, call: int, seed: int, limit: float) -> str:
    """The first node of ``after`` whose value differs from the value of that name in ``before``, in words.

    Args:
        before: An engine of one layer, serialized.
        after: The same behind a graph pass.
        decoder: Of the layer.
        call: Which of ``CALLS`` shows the difference.
        seed: Of its token ids.
        limit: Accepted ``rms(difference) / std(value)``.
    """
    graphs = [ir.from_proto(onnx.ModelProto.FromString(data)) for data in (before, after)]
    makers = {str(value.name): node for node in graphs[1].graph for value in node.outputs if _is_telling(value)}
    kept = {str(value.name) for node in graphs[0].graph for value in node.outputs if _is_telling(value)}
    names = [name for name in makers if name in kept and not name.startswith("present.")]
    runs = [run_calls(open_session(_exposing(graph, names)), decoder, seed, names)[call] for graph in graphs]
    for name in names:
        if _differ(*(run[name] for run in runs), limit=limit):
            node = makers[name]
            return f"{node.domain + '::' if node.domain else ''}{node.op_type} {name}"
    return "the logits"


def _is_telling(value: ir.Value) -> bool:
    """Whether a value's name is its own: names that a builder counted up may mean something else in the other graph."""
    return value.dtype == ir.DataType.FLOAT and bool(value.name) and not str(value.name).startswith("val_")


def _exposing(graph: ir.Model, names: Sequence[str]) -> bytes:
    """The graph with these values as outputs besides its own caches."""
    values = {str(value.name): value for node in graph.graph for value in node.outputs}
    caches = [value for value in graph.graph.outputs if str(value.name).startswith("present.")]
    graph.graph.outputs[:] = [*(values[name] for name in names), *caches]
    data: bytes = ir.to_proto(graph).SerializeToString()
    return data


def _differ(expected: np.ndarray, found: np.ndarray, *, limit: float) -> bool:
    """Whether two values of one shape differ; those of a pass that picks rows may not have one."""
    if expected.shape != found.shape:
        return False
    rms = np.sqrt(np.mean((expected - found) ** 2, dtype=np.float64))
    return not float(rms / max(float(expected.std()), 1e-30)) <= limit
