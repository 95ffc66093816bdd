"""Finds the node at which two graphs of one computation part: a graph pass keeps the names of what it keeps."""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir

from llmopt.exporters.onnx.calls import CALLS, Call, run_calls
from llmopt.exporters.onnx.sessions import Sessions
from llmopt.optimizer.decoder import Decoder

__all__ = ["first_divergence", "relative_errors"]

_PICKED = ".rows"
"""What the graph pass select_rows adds to the names of values of which it has picked rows."""


def first_divergence(
    sessions: Sessions, graphs: tuple[bytes, bytes], decoder: Decoder, *, call: int, seed: int, limit: float
) -> str:
    """The first node of a graph whose value differs from the value of that name in the graph before, in words.

    Args:
        sessions: Whose graphs they are.
        graphs: An engine of one layer before and after a graph pass.
        decoder: Of the layer.
        call: Which of ``CALLS`` shows the difference.
        seed: Of its token ids.
        limit: Accepted ``rms(difference) / std(value)``, as a median over a value's rows.
    """
    before, after = (_values(ir.from_proto(onnx.ModelProto.FromString(data))) for data in graphs)
    # What select_rows has moved works on rows of what had the name without the suffix.
    counterparts = {
        name: base for name in after if (base := name if name in before else name.removesuffix(_PICKED)) in before
    }
    names = (list(dict.fromkeys(counterparts.values())), list(counterparts))
    expected, found = (
        _run(sessions, data, wanted, decoder, seed)[call] for data, wanted in zip(graphs, names, strict=True)
    )
    for name, base in counterparts.items():
        same = expected[base] if name == base else _rows(expected[base], CALLS[call])
        if same.shape == found[name].shape and not np.median(relative_errors(same, found[name])) <= limit:
            node = after[name].producer()
            assert node is not None
            return f"{node.domain + '::' if node.domain else ''}{node.op_type} {name}"
    return "the logits"


def relative_errors(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Of each row, the last axis, ``rms(difference) / std(expected)``: float64, of the other axes' shape."""
    expected = expected.astype(np.float32, copy=False)
    rms = np.sqrt(np.mean((expected - found) ** 2, axis=-1, dtype=np.float64))
    # A row of equal numbers has no spread; then the whole value's is the measure.
    spread = expected.std(axis=-1, dtype=np.float64)
    return rms / np.where(spread > 0, spread, max(float(expected.std()), 1e-30))


def _values(graph: ir.Model) -> dict[str, ir.Value]:
    """What the nodes make, in their order, under names of its own.

    Names that a builder counted up may mean something else in the other graph.
    """
    # ONNX's inference does not know the types of other domains' operators.
    kinds = (ir.DataType.FLOAT, ir.DataType.FLOAT16, None)
    made = [value for node in graph.graph for value in node.outputs if value.dtype in kinds]
    names = [(str(value.name), value) for value in made]
    return {name: value for name, value in names if name and not name.startswith(("val_", "present."))}


def _rows(value: np.ndarray, call: Call) -> np.ndarray:
    """The rows of ``[batch, tokens, columns]`` that a call asks for."""
    flat = value.reshape(-1, value.shape[-1])
    return flat[list(call.rows)] if call.rows else flat


def _run(
    sessions: Sessions, data: bytes, names: Sequence[str], decoder: Decoder, seed: int
) -> list[dict[str, np.ndarray]]:
    """These values in each call; they become outputs besides the caches."""
    graph = ir.from_proto(onnx.ModelProto.FromString(data))
    values = _values(graph)
    caches = [value for value in graph.graph.outputs if str(value.name).startswith("present.")]
    graph.graph.outputs[:] = [*(values[name] for name in names), *caches]
    return run_calls(sessions.open(ir.to_proto(graph).SerializeToString()), decoder, seed, names)
