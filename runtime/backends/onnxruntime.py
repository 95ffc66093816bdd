"""Runs an ONNX engine in ONNX Runtime, with the KV cache bound in place on a pool of slots.

Past and present of a layer are the same memory, so a step writes only the new tokens. A prefill call binds one slot of
the pool by pointer; a decode call binds the slots ``0 .. n-1``, which lie one behind the other. Neither copies.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmopt.optimizer import kernels
from llmopt.optimizer.errors import InputError, MissingExtraError, UnsupportedError
from llmopt.optimizer.instructions import VNNI, host_instructions
from llmopt.optimizer.manifest import Engine, TensorInfo
from llmopt.runtime.backends.base import ExecutionError, FloatArray, IntArray

__all__ = ["OnnxRuntimeBackend", "check_features", "missing_tokens", "open_backend", "open_session", "ort_errors"]

_KNOWN_FEATURES = frozenset({"int8_kv", kernels.FEATURE, VNNI})
_IDS, _LENGTHS, _ROWS, _LOGITS = "input_ids", "past_lengths", "logit_rows", "logits"


def open_backend(
    directory: Path, engine: Engine, *, slots: int, capacity: int, threads: int, packed: bool = True
) -> "OnnxRuntimeBackend":
    """Load ``engine`` of the build in ``directory`` and allocate its pool.

    Args:
        directory: The build.
        engine: One of its manifest's engines.
        slots: Sequences held at the same time.
        capacity: Tokens per slot, at most ``engine.capacity``.
        threads: Threads one run works with.
        packed: Whether ONNX Runtime copies the weights into its kernels' own layout: faster, but both copies are in
            memory while it loads. Without, integer kernels give the same bits; those of weight-only schemes do not.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        InputError: A capacity the engine does not have.
        UnsupportedError: The engine needs something this version of llmopt or of ONNX Runtime cannot do.
    """
    if not 0 < capacity <= engine.capacity:
        raise InputError(f"a context of {capacity} tokens was asked for, the engine has {engine.capacity}")
    if slots < 1:
        raise InputError(f"at least one slot is needed, not {slots}")
    check_features(engine.features)
    session = open_session(directory / engine.path, engine.target, threads, packed=packed)
    return OnnxRuntimeBackend(session, engine, slots=slots, capacity=capacity)


def check_features(features: Sequence[str]) -> None:
    """Refuse an engine that needs something else than this llmopt and this machine have.

    Raises:
        UnsupportedError: Naming what.
    """
    if unknown := sorted(set(features) - _KNOWN_FEATURES):
        raise UnsupportedError(
            f"the engine needs what this llmopt does not know: {', '.join(unknown)}", hint="install a newer llmopt"
        )
    if kernels.FEATURE in features and kernels.library() is None:
        raise UnsupportedError(
            "the engine uses llmopt's kernels, and this llmopt was installed without them",
            hint="install a C++ compiler and llmopt again, or build the engine with kernels: onnxruntime",
        )
    if VNNI in features and host_instructions() != VNNI:
        raise UnsupportedError(
            "the engine was lowered for a CPU with VNNI: on this one its integer products would overflow, or its rows "
            "depend on what shares their batch",
            hint="build it on a machine like this one: what is built here runs there too",
        )


def open_session(path: Path, target: str, threads: int, *, packed: bool = True) -> Any:
    """An ONNX Runtime session of the graph in ``path``; see ``open_backend``.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        UnsupportedError: It cannot load the graph.
    """
    try:
        import onnxruntime as ort
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnxruntime", "gpu" if target == "cuda" else "cpu") from error
    if target != "cpu":
        raise UnsupportedError(f"this version executes engines for the target cpu, not {target}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails is raised, and said once
    # The lowering has fused what gains by it, and was verified. ONNX Runtime's own fusions would follow unverified, to
    # kernels of which some are slower (BiasGelu, SkipLayerNormalization).
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    # FP8 weights have no kernel: without this they would be turned into floats in every call instead of once.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Between two runs the cores belong to the server; idle worker threads that spin would take them.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.disable_prepacking", str(int(not packed)))
    kernels.register(options)
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except ort_errors() as error:
        raise UnsupportedError(
            f"ONNX Runtime {ort.__version__} cannot load {path}: {error}", hint="build it again, or update onnxruntime"
        ) from error


def ort_errors() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions, which have no common base; a failing kernel raises a plain RuntimeError."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented")
    return (RuntimeError, *(getattr(state, name) for name in (*names, "RuntimeException")))


def _numpy_dtype(tensor: TensorInfo) -> np.dtype[Any]:
    try:
        return np.dtype(tensor.dtype)
    except TypeError as error:
        raise UnsupportedError(f"{tensor.name} has dtype {tensor.dtype}, which this llmopt cannot bind") from error


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Zeros that start on a cache line. The pages of a large array are claimed only when written."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    first = -raw.ctypes.data % 64
    return raw[first : first + size].view(dtype).reshape(shape)


class OnnxRuntimeBackend:
    """A session and its pool: per KV tensor of the engine one array ``[slots, kv_heads, capacity, head_dim]``."""

    def __init__(self, session: Any, engine: Engine, *, slots: int, capacity: int) -> None:
        self.engine = engine
        self.slots = slots
        self.capacity = capacity
        self._session = session
        self._errors = ort_errors()
        self._cache_names = _match(session, engine)
        shape = (slots, engine.kv_heads, capacity, engine.head_dim)
        by_name = {tensor.name: tensor for tensor in engine.inputs}
        self._pool = [_aligned_zeros(shape, _numpy_dtype(by_name[past])) for past, _ in self._cache_names]
        self._ids = np.zeros((slots, 1), np.int64)
        self._lengths = np.zeros(slots, np.int64)
        self._rows = np.arange(slots, dtype=np.int64)
        self._logits = _aligned_zeros((slots, engine.vocab_size), np.dtype(np.float32))
        self._query_block = None if kernels.FEATURE in engine.features else _query_block(engine.head_dim)
        self._prefill_bindings: dict[int, Any] = {}
        self._decode_bindings: dict[int, Any] = {}

    def prefill(self, slot: int, ids: IntArray, start: int, rows: IntArray) -> FloatArray:
        """See ``Backend.prefill``."""
        ids = self._padded(ids, start)
        binding = self._prefill_bindings.get(slot)
        if binding is None:
            binding = self._prefill_bindings[slot] = self._bind_cache(slot, 1)
        # Kernels need not support zero rows: a call that wants no logits computes one row and leaves it.
        wanted = rows if len(rows) else np.zeros(1, np.int64)
        logits = np.empty((len(wanted), self.engine.vocab_size), np.float32)
        kept = [
            _bind_input(binding, _IDS, ids[None, :]),
            _bind_input(binding, _LENGTHS, np.array([start])),
            _bind_input(binding, _ROWS, wanted),
        ]
        binding.bind_output(_LOGITS, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._run(binding)
        del kept  # the run read this memory through pointers
        return logits[: len(rows)]

    def decode(self, ids: IntArray, lengths: IntArray) -> FloatArray:
        """See ``Backend.decode``."""
        count = len(ids)
        binding = self._decode_bindings.get(count)
        if binding is None:
            binding = self._decode_bindings[count] = self._bind_decode(count)
        self._ids[:count, 0] = ids
        self._lengths[:count] = lengths
        self._run(binding)
        return self._logits[:count]

    def copy_prefix(self, source: int, destination: int, length: int) -> None:
        """See ``Backend.copy_prefix``."""
        for array in self._pool:
            array[destination, :, :length] = array[source, :, :length]

    def drop(self, slot: int) -> None:
        """See ``Backend.drop``. Nothing to do: what is not said to be held is never read."""

    def _padded(self, ids: IntArray, start: int) -> IntArray:
        """The chunk, with tokens behind it that are overwritten later, so that no block of queries has one row only.

        ONNX Runtime's attention computes queries in blocks; a block of one row takes another path, whose sums differ in
        the last bits. Nobody reads the keys and values of what is added: the next call writes over them. Our own
        kernel has one path for all.
        """
        if self._query_block is None:
            return ids
        missing = missing_tokens(len(ids), self._query_block)
        missing = min(missing, self.capacity - start - len(ids))
        return np.pad(ids, (0, missing), mode="edge") if missing > 0 else ids

    def _run(self, binding: Any) -> None:
        try:
            self._session.run_with_iobinding(binding)
        except self._errors as error:
            raise ExecutionError(f"ONNX Runtime: {error}") from error

    def _bind_cache(self, first: int, count: int) -> Any:
        """A binding whose past and present are the slots ``first .. first+count-1`` of the pool."""
        binding = self._session.io_binding()
        for (past, present), array in zip(self._cache_names, self._pool, strict=True):
            view = array[first : first + count]
            binding.bind_input(past, "cpu", 0, view.dtype, view.shape, view.ctypes.data)
            binding.bind_output(present, "cpu", 0, view.dtype, view.shape, view.ctypes.data)
        return binding

    def _bind_decode(self, count: int) -> Any:
        """A binding over the first ``count`` slots and the first ``count`` rows of the buffers; made once per count."""
        binding = self._bind_cache(0, count)
        _bind_input(binding, _IDS, self._ids[:count])
        _bind_input(binding, _LENGTHS, self._lengths[:count])
        _bind_input(binding, _ROWS, self._rows[:count])
        logits = self._logits[:count]
        binding.bind_output(_LOGITS, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        return binding


def _query_block(head_dim: int) -> int:
    """Rows of a block of queries in ONNX Runtime's attention on the CPU: they follow from the size of the L2 cache."""
    try:
        cache = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (OSError, ValueError):  # the name is glibc's
        cache = 0
    keys = (cache or 1 << 20) // (16 * 2 * head_dim)
    return max(min(keys, 2 * head_dim), 2)


def missing_tokens(tokens: int, block: int) -> int:
    """How many tokens to add so that no block has one row, whether it has ``block`` rows or any other even number."""
    missing = tokens % 2
    while (tokens + missing) % block == 1:
        missing += 2
    return missing


def _bind_input(binding: Any, name: str, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Bind ``values`` by pointer and return what has to stay alive until the run is over."""
    values = np.ascontiguousarray(values, np.int64)
    binding.bind_input(name, "cpu", 0, np.int64, values.shape, values.ctypes.data)
    return values


def _match(session: Any, engine: Engine) -> list[tuple[str, str]]:
    """Check that the session is the engine the manifest describes.

    Returns:
        The names of each KV input and of the output that shares its memory, in the manifest's order.

    Raises:
        UnsupportedError: They differ, or the engine does not follow version 1 of the contract.
    """
    described = {t.name for t in engine.inputs}, {t.name for t in engine.outputs}
    found = {t.name for t in session.get_inputs()}, {t.name for t in session.get_outputs()}
    if described != found:
        names = sorted(described[0] ^ found[0] | described[1] ^ found[1])
        raise UnsupportedError(f"the engine and its manifest disagree about {', '.join(names)}", hint="build it again")
    pasts = [t.name for t in engine.inputs if t.name.startswith("past.")]
    pairs = [(name, "present." + name.removeprefix("past.")) for name in pasts]
    contract = {_IDS, _LENGTHS, _ROWS, *pasts}, {_LOGITS, *(present for _, present in pairs)}
    if described != contract:
        raise UnsupportedError(f"{engine.path} does not follow version 1 of the engine contract")
    return pairs
