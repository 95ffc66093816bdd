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
    makers = {str(value.name): node for node in graphs[1].graph for value in node.outputs if _is_float(value)}
    kept = {str(value.name) for node in graphs[0].graph for value in node.outputs if _is_float(value)}
    names = [name for name in makers if name in kept and not name.startswith("present.")]
    runs = [run_calls(open_session(_exposing(graph, names)), decoder, seed, names)[call] for graph in graphs]
    differing = [name for name in names if _differ(*(run[name] for run in runs), limit=limit)]
    if not differing:
        return "the logits"
    node = makers[differing[0]]
    first = f"{node.domain + '::' if node.domain else ''}{node.op_type} {differing[0]}"
    # What a fusion has made has no telling name; what follows it has.
    told = next((name for name in differing if "." in name), differing[0])
    return first if told == differing[0] else f"{first}, before {told}"


def _is_float(value: ir.Value) -> bool:
    return bool(value.name) and value.dtype == ir.DataType.FLOAT


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
