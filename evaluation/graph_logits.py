"""Runs a graph that is not an engine yet: any stage between the standard graph and the last graph pass."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from llmopt.optimizer import kernels
from llmopt.optimizer.errors import MissingExtraError, VerificationError, is_out_of_memory

__all__ = ["graph_logits"]

_LOGITS = 1 << 25
"""Floats of one call's logits, unless one window has more: 134 MB."""


def graph_logits(graph: ir.Model, ids: Tensor, *, name: str, threads: int) -> Iterator[Tensor]:
    """What a graph that follows the engine contract predicts, in ONNX Runtime without its own optimizations.

    Those would rewrite a graph between two passes in other ways than the next pass does. Windows of one call are
    prompts of equal length without a past, which the contract allows.

    Args:
        graph: Saved to a temporary directory; not changed.
        ids: int64 ``[windows, tokens]``.
        name: Which graph it is, for errors.
        threads: Of ONNX Runtime.

    Yields:
        Blocks of windows in order, float32 ``[some windows, tokens, vocabulary]``.

    Raises:
        VerificationError: ONNX Runtime cannot load or run the graph.
        MissingExtraError: onnxruntime is not installed.
    """
    session = _session(graph, name, threads)
    windows, tokens = ids.shape
    [vocabulary] = (output.shape[-1] for output in session.get_outputs() if output.name == "logits")
    batch = max(1, _LOGITS // (tokens * vocabulary))
    for first in range(0, windows, batch):
        part = ids[first : first + batch]
        feeds = {
            "input_ids": part.numpy(),
            "past_lengths": np.zeros(len(part), np.int64),
            "logit_rows": np.arange(part.numel()),
            **_empty_cache(session, len(part), tokens),
        }
        with _failing_as(name):
            [logits] = session.run(["logits"], feeds)
        yield torch.from_numpy(logits).reshape(len(part), tokens, -1)


def _empty_cache(session: Any, windows: int, tokens: int) -> dict[str, np.ndarray]:
    """Zeros for every past key and value, with room for ``tokens``."""
    sizes = {"batch": windows, "capacity": tokens}
    return {
        value.name: np.zeros(
            [sizes.get(size, size) for size in value.shape], np.int8 if value.type == "tensor(int8)" else np.float32
        )
        for value in session.get_inputs()
        if value.name.startswith("past.")
    }


def _session(graph: ir.Model, name: str, threads: int) -> Any:
    try:
        import onnxruntime as ort
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnxruntime", "cpu") from error
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    kernels.register(options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(graph, path, external_data="model.onnx.data")
        with _failing_as(name):
            return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@contextmanager
def _failing_as(name: str) -> Iterator[None]:
    """Name the graph that ONNX Runtime refuses; its exceptions have no common base."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise VerificationError(
            f"ONNX Runtime cannot run the graph behind {name}: {error}", hint="this is a bug in that graph pass"
        ) from error
