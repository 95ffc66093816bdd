"""Calls of an engine of one layer, within the engine contract, for comparing two graphs of it."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from llmopt.optimizer.decoder import Decoder
from llmopt.optimizer.errors import MissingExtraError

__all__ = ["CALLS", "CAPACITY", "Call", "open_session", "run_calls"]

CAPACITY = 32


@dataclass(frozen=True, slots=True)
class Call:
    """One run of an engine.

    Attributes:
        tokens: New tokens of each sequence.
        lengths: Cached tokens of each sequence before.
        rows: Which positions of all reach the head, in this order; by default all.
    """

    tokens: int
    lengths: tuple[int, ...]
    rows: tuple[int, ...] = ()

    def __str__(self) -> str:
        plural = "" if self.tokens == 1 else "s"
        return f"{self.tokens} token{plural} behind {', '.join(map(str, self.lengths))} cached ones"


CALLS = (
    Call(tokens=11, lengths=(0,)),
    Call(tokens=8, lengths=(11,), rows=(7, 5, 3, 1)),
    Call(tokens=1, lengths=(19, 15, 4), rows=(2, 0, 1)),
    Call(tokens=5, lengths=(0, 0)),
)
"""A prompt in two chunks, a step over three sequences that share its beginning, and a batch without a past."""


def run_calls(
    session: Any, decoder: Decoder, seed: int, names: Sequence[str] = ("logits",)
) -> list[dict[str, np.ndarray]]:
    """The named outputs of each of ``CALLS``; its caches are those that the calls before have left.

    Args:
        session: An engine of one layer.
        decoder: Of that layer.
        seed: Of the token ids.
        names: Of the outputs wanted.
    """
    generator = np.random.default_rng(seed)
    shape = (1, decoder.kv_heads, CAPACITY, decoder.head_dim)
    caches = [np.zeros(shape, np.float32), np.zeros(shape, np.float32)]
    results = []
    for call in CALLS:
        batch = len(call.lengths)
        caches = [np.repeat(cache[:1], batch, axis=0) for cache in caches]
        feeds = {
            "input_ids": generator.integers(0, decoder.vocab_size, (batch, call.tokens)),
            "past_lengths": np.array(call.lengths),
            "logit_rows": np.array(call.rows or range(batch * call.tokens)),
            "past.0.key": caches[0],
            "past.0.value": caches[1],
        }
        *outputs, key, value = session.run([*names, "present.0.key", "present.0.value"], feeds)
        caches = [key, value]
        results.append(dict(zip(names, outputs, strict=True)))
    return results


def open_session(graph: ir.Model | bytes) -> Any:
    """The graph in ONNX Runtime without its own optimizations, which would rewrite what is compared.

    Args:
        graph: Or its serialized form, below 2 GB.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    try:
        import onnxruntime as ort
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnxruntime", "cpu") from error
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    # A packed copy of every weight would double the layer's memory.
    options.add_session_config_entry("session.disable_prepacking", "1")
    if isinstance(graph, bytes):
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(graph, path, external_data="model.onnx.data")
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
