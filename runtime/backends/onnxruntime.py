"""Runs an ONNX engine in ONNX Runtime, with the KV cache bound in place on a pool of slots.

Past and present of a layer are the same memory, so a step writes only the new tokens. A prefill call binds one slot of
the pool by pointer; a decode call binds the slots ``0 .. n-1``, which lie one behind the other. Neither copies.

On a GPU the pool lies in its memory, ids and lengths go there in every call, and logits come back. That was never
executed on hardware; tests run the same calls in the host's memory.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmopt.optimizer import kernels
from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.manifest import Engine
from llmopt.runtime.backends.adapter_memory import INPUTS, AdapterMemory
from llmopt.runtime.backends.base import ExecutionError, FloatArray, IntArray
from llmopt.runtime.backends.session import Provider, check_features, open_session, ort_errors
from llmopt.runtime.backends.slot_pool import GpuPool, HostPool, SlotPool, aligned_zeros
from llmopt.runtime.sizing import item_bytes

__all__ = ["OnnxRuntimeBackend", "missing_tokens", "open_backend"]

_BFLOAT16 = 16
"""ONNX's number of a type that numpy has no name for."""

_IDS, _LENGTHS, _ROWS, _LOGITS = "input_ids", "past_lengths", "logit_rows", "logits"


def open_backend(
    directory: Path,
    engine: Engine,
    *,
    slots: int,
    capacity: int,
    threads: int,
    packed: bool = True,
    provider: Provider | None = None,
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
        provider: What of ONNX Runtime executes it; the CPU when omitted.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        InputError: A capacity the engine does not have.
        UnsupportedError: The engine needs something this version of llmopt or of ONNX Runtime cannot do.
        ResourceError: The pool does not fit in the GPU's memory.
    """
    provider = provider or Provider()
    if not 0 < capacity <= engine.capacity:
        raise InputError(f"a context of {capacity} tokens was asked for, the engine has {engine.capacity}")
    if slots < 1:
        raise InputError(f"at least one slot is needed, not {slots}")
    check_features(engine.features)
    session = open_session(directory / engine.path, threads, provider=provider, packed=packed)
    pool = _pool_of(engine, provider, slots=slots, capacity=capacity)
    return OnnxRuntimeBackend(session, engine, pool, slots=slots, capacity=capacity)


def _pool_of(engine: Engine, provider: Provider, *, slots: int, capacity: int) -> SlotPool:
    tensors = sum(tensor.name.startswith("past.") for tensor in engine.inputs)
    item = item_bytes(engine.kv_dtype)
    if provider.device == "cpu":
        return HostPool(tensors, (slots, engine.kv_heads, capacity, engine.head_dim), item)
    return GpuPool(tensors, slots, engine.kv_heads * capacity * engine.head_dim * item, provider)


class OnnxRuntimeBackend:
    """A session and its pool, which has the engine's KV tensors in the manifest's order; the host's when omitted."""

    def __init__(
        self, session: Any, engine: Engine, pool: SlotPool | None = None, *, slots: int, capacity: int
    ) -> None:
        self.engine = engine
        self.slots = slots
        self.capacity = capacity
        self.adapters = None if engine.lora is None else AdapterMemory(engine.lora, sequences=slots)
        self._session = session
        self._errors = ort_errors()
        self._cache_names = _match(session, engine)
        self._pool = pool = pool or _pool_of(engine, Provider(), slots=slots, capacity=capacity)
        self._ids = np.zeros((slots, 1), np.int64)
        self._lengths = np.zeros(slots, np.int64)
        self._rows = np.arange(slots, dtype=np.int64)
        self._logits = aligned_zeros((slots, engine.vocab_size), np.dtype(np.float32))
        is_in_blocks = pool.device == "cpu" and kernels.FEATURE not in engine.features
        self._query_block = _query_block(engine.head_dim) if is_in_blocks else None
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
        if self._pool.device != "cpu":
            # ONNX Runtime copies an input to the GPU when it is bound, and never again.
            self._bind_decode_inputs(binding, count)
        self._run(binding)
        return self._logits[:count]

    def copy_prefix(self, source: int, destination: int, length: int) -> None:
        """See ``Backend.copy_prefix``."""
        self._pool.copy(source, destination, length)

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
        binding, pool = self._session.io_binding(), self._pool
        shape = (count, self.engine.kv_heads, self.capacity, self.engine.head_dim)
        where = (pool.device, pool.device_id, _element_type(self.engine.kv_dtype), shape)
        for tensor, (past, present) in enumerate(self._cache_names):
            address = pool.address(tensor, first)
            binding.bind_input(past, *where, address)
            binding.bind_output(present, *where, address)
        if self.adapters is not None:
            for name, array in self.adapters.inputs(count).items():
                binding.bind_input(name, "cpu", 0, _element_type(str(array.dtype)), array.shape, array.ctypes.data)
        return binding

    def _bind_decode(self, count: int) -> Any:
        """A binding over the first ``count`` slots and the first ``count`` rows of the buffers; made once per count."""
        binding = self._bind_cache(0, count)
        self._bind_decode_inputs(binding, count)
        logits = self._logits[:count]
        binding.bind_output(_LOGITS, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        return binding

    def _bind_decode_inputs(self, binding: Any, count: int) -> None:
        _bind_input(binding, _IDS, self._ids[:count])
        _bind_input(binding, _LENGTHS, self._lengths[:count])
        _bind_input(binding, _ROWS, self._rows[:count])


def _element_type(dtype: str) -> np.dtype[Any] | int:
    """A dtype of the manifest as ONNX Runtime's bindings take it.

    Raises:
        UnsupportedError: There is no such type.
    """
    if dtype == "bfloat16":
        return _BFLOAT16
    try:
        return np.dtype(dtype)
    except TypeError as error:
        raise UnsupportedError(f"the cache has dtype {dtype}, which this llmopt cannot bind") from error


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
    adapters = () if engine.lora is None else INPUTS
    contract = {_IDS, _LENGTHS, _ROWS, *adapters, *pasts}, {_LOGITS, *(present for _, present in pairs)}
    if described != contract:
        raise UnsupportedError(f"{engine.path} does not follow version 1 of the engine contract")
    return pairs
