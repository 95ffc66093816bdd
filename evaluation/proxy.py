"""Measures engines for other machines by the graph they were compiled from, which ONNX Runtime executes on the CPU."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import onnx_ir as ir

from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.graph_precision import set_precision
from llmopt.optimizer.manifest import EncoderEngine, Engine, PassRecord
from llmopt.optimizer.progress import Progress
from llmopt.optimizer.tokens import Tokens
from llmopt.runtime.backends import encoder, onnxruntime
from llmopt.runtime.backends.base import Backend
from llmopt.runtime.backends.encoder import EncoderBackend
from llmopt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from llmopt.runtime.backends.opening import (
    Executor,
    open_backend,
    open_encoder_backend,
    runs_here,
    slot_capacity,
)
from llmopt.runtime.backends.session import open_session

__all__ = ["Measured", "check_range", "measurable", "measurable_encoder"]

Opened = TypeVar("Opened", Backend, EncoderBackend)

_LARGEST = {"float16": 65504.0}
"""The largest number of a type that activations can reach; bfloat16's is as large as float32's."""
_NEAR = 0.5
"""The share of it that an activation may take: another text can have one that is larger."""
_WINDOWS = 8
"""Windows of text that the largest activations are looked for in."""
_BEYOND_LAYERS = "outside of the layers"


@dataclass(frozen=True, slots=True)
class Measured(Generic[Opened]):
    """What measurements are taken of.

    Attributes:
        open: Opens it.
        proxy: In words, what it is where it is not the engine itself.
        target: What the engine was built for.
    """

    open: Callable[[], Opened]
    proxy: str | None
    target: str

    def tell(self, progress: Progress) -> None:
        """Say so where something else than the engine itself is measured."""
        if self.proxy is not None:
            progress.note(f"measuring {self.proxy}: this machine does not execute {self.target}")


def measurable(
    directory: Path,
    engine: Engine,
    executor: Executor | None = None,
    *,
    longest: int,
    threads: int,
    packed: bool = True,
) -> Measured[Backend]:
    """The engine itself where this machine executes it, else its graph in ONNX Runtime.

    Args:
        directory: The build.
        engine: One of its engines.
        executor: What somebody wants it to be executed by.
        longest: Tokens of the longest window.
        threads: Of ONNX Runtime.
        packed: See ``onnxruntime.open_backend``.
    """
    executor = executor or Executor()
    is_asked_for = executor.engine is not None or executor.provider not in (None, "cpu")
    if engine.target == "cpu" or is_asked_for or (executor.provider is None and runs_here(engine, executor)):
        opened = partial(
            open_backend,
            directory,
            engine,
            executor,
            slots=1,
            capacity=slot_capacity(engine, longest),
            threads=threads,
            packed=packed,
        )
        return Measured(opened, None, engine.target)
    return Measured(partial(_open_graph, directory, engine, longest, threads), _proxy_of(engine), engine.target)


def measurable_encoder(
    directory: Path, engine: EncoderEngine, executor: Executor | None = None, *, threads: int
) -> Measured[EncoderBackend]:
    """The same of an encoder; arguments are those of ``measurable``."""
    executor = executor or Executor()
    if engine.target == "cpu" or executor.engine is not None or runs_here(engine, executor):
        opened = partial(open_encoder_backend, directory, engine, executor, threads=threads)
        return Measured(opened, None, engine.target)
    return Measured(partial(_open_encoder_graph, directory, engine, threads), _proxy_of(engine), engine.target)


def _proxy_of(engine: Engine | EncoderEngine) -> str:
    """In words, what is measured in the engine's place."""
    how = "its graph, executed by ONNX Runtime on a CPU"
    return f"{how} in float32, for want of kernels for bfloat16" if _precision(engine) == "bfloat16" else how


def _open_encoder_graph(directory: Path, engine: EncoderEngine, threads: int) -> EncoderBackend:
    """The encoder's graph in ONNX Runtime; one of bfloat16 in float32."""
    if engine.dtype != "bfloat16":
        return encoder.open_encoder_backend(directory, engine.model_copy(update={"target": "cpu"}), threads=threads)
    with _twin(directory, engine) as path:
        twin = engine.model_copy(update={"target": "cpu", "path": path.name})
        return encoder.open_encoder_backend(path.parent, twin, threads=threads)


def check_range(
    directory: Path,
    engine: Engine | EncoderEngine,
    texts: Sequence[Tokens],
    *,
    layers: Sequence[str],
    threads: int,
) -> PassRecord:
    """Find the largest activation of every layer, computed in float32, where no number is too large.

    On a CPU float16 is computed through float32, so that the graph itself would not show what overflows on a GPU.

    Args:
        directory: The build.
        engine: Whose graph it is.
        texts: What to read.
        layers: The model's layers by name, in order.
        threads: Of ONNX Runtime.

    Returns:
        ``details``: ``layers.{i}`` -> the largest absolute value that any operator of it gives.

    Raises:
        UnsupportedError: One is near the largest number of the engine's type.
    """
    with _twin(directory, engine, _with_maxima) as path:
        session = open_session(path, threads)
    found: dict[str, float] = {}
    windows = [ids[:length].numpy() for text in texts for ids, length in zip(text.ids, text.mask.sum(1), strict=True)]
    windows = windows[:_WINDOWS]
    for window in windows:
        for name, value in _maxima(session, engine, window):
            place = _layer_of(name, layers)
            found[place] = max(found.get(place, 0.0), value)
    worst, end = max(found, key=found.__getitem__), _LARGEST.get(_precision(engine), float("inf"))
    if not found[worst] <= end * _NEAR:
        raise UnsupportedError(
            f"{worst} has an activation of {found[worst]:,.0f}, and {_precision(engine)} ends at {end:,.0f}",
            hint="precision: bf16, or a pass that makes activations smaller, such as rotate",
        )
    details = {place: float(f"{value:.4g}") for place, value in sorted(found.items(), key=_order)}
    return PassRecord(name="largest_activations", options={"windows": len(windows)}, changed=False, details=details)


def _open_graph(directory: Path, engine: Engine, longest: int, threads: int) -> OnnxRuntimeBackend:
    """The engine's graph as a backend; one of bfloat16 in float32."""
    capacity = slot_capacity(engine, longest)
    if engine.kv_dtype != "bfloat16":
        return onnxruntime.open_backend(directory, engine, slots=1, capacity=capacity, threads=threads)
    with _twin(directory, engine) as path:
        session = open_session(path, threads)
    return OnnxRuntimeBackend(session, engine.model_copy(update={"kv_dtype": "float32"}), slots=1, capacity=capacity)


def _precision(engine: Engine | EncoderEngine) -> str:
    return engine.dtype if isinstance(engine, EncoderEngine) else engine.kv_dtype


@contextmanager
def _twin(
    directory: Path, engine: Engine | EncoderEngine, change: Callable[[ir.Model], None] = lambda graph: None
) -> Iterator[Path]:
    """The engine's graph in float32, in a file that is gone afterwards; a session has what it needs by then."""
    graph = ir.load(directory / engine.path)
    set_precision(graph, "float32")
    change(graph)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(graph, path, external_data="model.onnx.data")
        yield path


def _with_maxima(graph: ir.Model) -> None:
    """Replace the outputs that are no caches by the largest absolute value of each float that is computed."""
    made = []
    for node in list(graph.graph):
        value = node.outputs[0]
        is_weight = all(each is None or each.is_initializer() for each in node.inputs)
        if value.dtype != ir.DataType.FLOAT or is_weight or str(value.name).startswith("present."):
            continue
        magnitude = ir.node("Abs", [value])
        largest = ir.node("ReduceMax", magnitude.outputs, {"keepdims": 0})
        graph.graph.insert_after(node, [magnitude, largest])
        (maximum,) = largest.outputs
        maximum.name, maximum.type, maximum.shape = f"{node.name}.maximum", value.type, ir.Shape([])
        made.append(maximum)
    caches = [value for value in graph.graph.outputs if str(value.name).startswith("present.")]
    graph.graph.outputs[:] = [*made, *caches]


def _maxima(session: Any, engine: Engine | EncoderEngine, window: np.ndarray) -> Iterator[tuple[str, float]]:
    """Each maximum of a window, chunk by chunk; of a text, all of whose tokens are of the first type."""
    if isinstance(engine, EncoderEngine):
        ids = window[None, : engine.capacity]
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        taken = {value.name: feeds[value.name] for value in session.get_inputs()}
        names = [value.name for value in session.get_outputs()]
        yield from zip(names, map(float, session.run(None, taken)), strict=True)
        return
    sizes = {value.name: value.shape for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    varying = {"batch": 1, "capacity": len(window)}
    caches = {
        name: np.zeros([varying.get(dim, dim) for dim in dims], np.float32)
        for name, dims in sizes.items()
        if name.startswith("past.")
    }
    ends = [*range(0, len(window), engine.max_chunk), len(window)]
    for first, past_end in pairwise(ends):
        piece = window[first:past_end]
        feeds = {
            "input_ids": piece[None],
            "past_lengths": np.array([first]),
            "logit_rows": np.arange(len(piece)),
            **caches,
        }
        for name, value in zip(names, session.run(None, feeds), strict=True):
            past = name.replace("present.", "past.", 1)
            if past in caches:
                caches[past] = value
            else:
                yield name, float(value)


def _layer_of(name: str, layers: Sequence[str]) -> str:
    """``layers.3`` for what is computed in that layer, by its name."""
    number = next((i for i, each in enumerate(layers) if name.startswith((f"{each}.", f"present.{i}."))), None)
    return _BEYOND_LAYERS if number is None else f"layers.{number}"


def _order(item: tuple[str, float]) -> tuple[int, str]:
    number = item[0].rpartition(".")[2]
    return (int(number) if number.isdigit() else -1, item[0])
