"""Runs a TensorRT engine over CUDA memory, with the KV cache written in place in a pool of slots.

Never executed on hardware: no machine of this project has a GPU. What is tested is the bookkeeping, in fakes of the
driver's and TensorRT's calls that keep the GPU's memory in numpy and do queued work no sooner than somebody waits.

Each KV tensor of the engine is one allocation ``[slots, kv_heads, capacity, head_dim]``. A prefill call binds one slot
of it by address, a decode call the slots ``0 .. n-1``; input and output of an update have the same address, as
TensorRT's cache update demands. The two kinds of calls have a context each, of their own optimization profile. A decode
of n sequences is one CUDA graph: copying ids and lengths to the GPU, the engine, copying logits back.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llmopt.optimizer.errors import InputError, ResourceError, UnsupportedError
from llmopt.optimizer.manifest import Engine
from llmopt.runtime.backends.adapter_memory import AdapterMemory
from llmopt.runtime.backends.base import ExecutionError, FloatArray, IntArray
from llmopt.runtime.backends.device import Device, open_device
from llmopt.runtime.backends.tensorrt_program import DECODE, PREFILL, Program, open_program
from llmopt.runtime.sizing import item_bytes, pool_bytes

__all__ = ["TensorRTBackend", "open_backend"]

_IDS, _LENGTHS, _ROWS, _LOGITS = "input_ids", "past_lengths", "logit_rows", "logits"


def open_backend(directory: Path, engine: Engine, *, slots: int, capacity: int, cuda_graphs: bool) -> "TensorRTBackend":
    """Load ``engine`` of the build in ``directory`` on this machine's GPU and allocate its pool.

    Args:
        directory: The build.
        engine: One of its manifest's engines.
        slots: Sequences held at the same time.
        capacity: Tokens per slot: exactly ``engine.capacity``, for which it was compiled.
        cuda_graphs: Whether decode calls are captured once and replayed. Without, each one queues every kernel.

    Raises:
        InputError: A capacity the engine does not have.
        MissingExtraError: TensorRT or cuda-python is not installed.
        UnsupportedError: There is no GPU, nothing was compiled for it, or decode calls cannot be captured.
        ResourceError: The engine or its pool does not fit in the GPU's memory.
    """
    if capacity != engine.capacity:
        raise InputError(
            f"a context of {capacity} tokens was asked for, and the engine was compiled for {engine.capacity}",
            hint="leave --context out, or build the engine with another capacity",
        )
    if slots < 1:
        raise InputError(f"at least one slot is needed, not {slots}")
    device = open_device()
    return TensorRTBackend(open_program(directory, engine, device), engine, device, slots=slots, graphs=cuda_graphs)


class TensorRTBackend:
    """A loaded engine, its pool, and the buffers that calls go through.

    Args:
        program: The loaded engine.
        engine: What the manifest says of it.
        device: Where it runs; used by this alone.
        slots: Sequences held at the same time; a decode call takes at most ``engine.slots`` of them.
        graphs: Whether decode calls are captured.
    """

    def __init__(self, program: Program, engine: Engine, device: Device, *, slots: int, graphs: bool) -> None:
        self.engine = engine
        self.slots = slots
        self.adapters: AdapterMemory | None = None
        self.capacity = engine.capacity
        self._program = program
        self._device = device
        self._most = min(slots, engine.slots or slots)
        self._slot_bytes = engine.kv_heads * engine.capacity * engine.head_dim * item_bytes(engine.kv_dtype)
        self._pasts = [tensor.name for tensor in engine.inputs if tensor.name.startswith("past.")]
        self._pool = self._allocate_pool()
        tokens = max(engine.max_chunk, self._most)
        self._host = {name: device.host_buffer((tokens,), np.int64) for name in (_IDS, _LENGTHS, _ROWS)}
        self._buffers = {name: device.allocate(array.nbytes) for name, array in self._host.items()}
        self._buffers[_LOGITS] = device.allocate(tokens * engine.vocab_size * 4)
        self._logits = device.host_buffer((self._most, engine.vocab_size), np.float32)
        self._prefill = self._context(PREFILL)
        self._decodes = {count: self._decode_of(count, graphs=graphs) for count in range(1, self._most + 1)}

    def prefill(self, slot: int, ids: IntArray, start: int, rows: IntArray) -> FloatArray:
        """See ``Backend.prefill``."""
        # TensorRT ignores what would be written behind the end of a slot, and says nothing.
        if not 0 < len(ids) <= self.engine.max_chunk or start + len(ids) > self.capacity:
            raise ValueError(f"a chunk of {len(ids)} tokens at {start}")
        # An engine has no call without rows: one is computed and left.
        wanted = rows if len(rows) else np.zeros(1, np.int64)
        logits = np.empty((len(wanted), self.engine.vocab_size), np.float32)
        inputs = {_IDS: ids, _LENGTHS: np.array([start]), _ROWS: wanted}
        for name, values in inputs.items():
            self._host[name][: len(values)] = values
        self._shape(self._prefill, batch=1, tokens=len(ids), rows=len(wanted))
        self._bind_slots(self._prefill, first=slot)
        self._queue(self._prefill, {name: len(values) for name, values in inputs.items()}, logits)
        self._device.wait()
        return logits[: len(rows)]

    def decode(self, ids: IntArray, lengths: IntArray) -> FloatArray:
        """See ``Backend.decode``."""
        count = len(ids)
        if int(lengths.max()) >= self.capacity:
            raise ValueError(f"a slot of {self.capacity} tokens is full")
        self._host[_IDS][:count] = ids
        self._host[_LENGTHS][:count] = lengths
        self._host[_ROWS][:count] = np.arange(count)
        self._decodes[count]()
        self._device.wait()
        return self._logits[:count]

    def copy_prefix(self, source: int, destination: int, length: int) -> None:
        """See ``Backend.copy_prefix``: of each head, its first ``length`` tokens, which lie one behind the other."""
        row = self._slot_bytes // self.engine.kv_heads
        for pointer in self._pool:
            self._device.copy_rows(
                pointer + destination * self._slot_bytes,
                pointer + source * self._slot_bytes,
                rows=self.engine.kv_heads,
                width=row // self.capacity * length,
                pitch=row,
            )

    def drop(self, slot: int) -> None:
        """See ``Backend.drop``. Nothing to do: what is not said to be held is never read."""

    def _allocate_pool(self) -> list[int]:
        """One pointer per KV tensor, in the order of ``_pasts``."""
        free = self._device.free_bytes()
        try:
            return [self._device.allocate(self.slots * self._slot_bytes) for _ in self._pasts]
        except ResourceError as error:
            slot = pool_bytes(self.engine, 1, self.capacity)
            fitting = free // slot
            raise ResourceError(
                f"{self.slots} slots of {self.capacity} tokens take {self.slots * slot / 1e9:.2f} GB of keys and "
                f"values, and {free / 1e9:.2f} GB of the {self._device.name} are free: {error.message}",
                hint=f"what fits: --slots {fitting} --prefix-slots 0" if fitting else "build with a smaller capacity",
            ) from error

    def _context(self, profile: int) -> Any:
        """A context of a profile that has the addresses of all buffers, and of the first slots."""
        context = self._program.context(profile)
        for name, pointer in self._buffers.items():
            self._program.must(context.set_tensor_address(name, pointer), f"bind {name}")
        self._bind_slots(context, first=0)
        return context

    def _bind_slots(self, context: Any, *, first: int) -> None:
        """Give the slots from ``first`` on to a context, as past and present."""
        for past, pointer in zip(self._pasts, self._pool, strict=True):
            address = pointer + first * self._slot_bytes
            for name in (past, "present." + past.removeprefix("past.")):
                self._program.must(context.set_tensor_address(name, address), f"bind {name}")

    def _shape(self, context: Any, *, batch: int, tokens: int, rows: int) -> None:
        """Tell a context the shapes of its inputs."""
        cache = (batch, self.engine.kv_heads, self.capacity, self.engine.head_dim)
        shapes = {_IDS: (batch, tokens), _LENGTHS: (batch,), _ROWS: (rows,)} | dict.fromkeys(self._pasts, cache)
        for name, shape in shapes.items():
            self._program.must(context.set_input_shape(name, shape), f"give {name} the shape {shape}")

    def _queue(self, context: Any, counts: dict[str, int], logits: FloatArray) -> None:
        """Queue a whole call: the first ``counts`` of each input to the GPU, the engine, the logits back."""
        for name, count in counts.items():
            self._device.upload(self._buffers[name], self._host[name][:count])
        self._program.must(context.execute_async_v3(self._device.stream), "run")
        self._device.download(logits, self._buffers[_LOGITS])

    def _decode_of(self, count: int, *, graphs: bool) -> Callable[[], None]:
        """What queues a decode of ``count`` sequences. A graph needs a context that is used for nothing else."""
        context = self._context(DECODE)
        self._shape(context, batch=count, tokens=1, rows=count)
        counts = dict.fromkeys((_IDS, _LENGTHS, _ROWS), count)

        def queue() -> None:
            self._queue(context, counts, self._logits[:count])

        if not graphs:
            return queue
        graph = self._captured(context, queue, count)
        return lambda: self._device.replay(graph)

    def _captured(self, context: Any, queue: Callable[[], None], count: int) -> Any:
        """The graph of a decode of ``count`` sequences.

        Raises:
            UnsupportedError: It cannot be captured.
        """
        hint = "--no-cuda-graphs runs the engine without them"
        # What a context puts off until its first run, such as compiling kernels, cannot be captured. That run writes
        # the first token of slots that hold nothing yet.
        queue()
        self._device.wait()
        can_capture = getattr(context, "is_stream_capturable", None)
        if can_capture is not None and not can_capture(self._device.stream):
            raise UnsupportedError(
                "TensorRT says that this engine's runs cannot be captured as a CUDA graph", hint=hint
            )
        try:
            return self._device.capture(queue)
        except ExecutionError as error:
            raise UnsupportedError(
                f"a decode of {count} sequences could not be captured as a CUDA graph: {error}", hint=hint
            ) from error
