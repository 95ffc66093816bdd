"""An engine made of integer arithmetic, for testing everything above a backend without a model.

The logits after a sequence are a hash of all its tokens in order, so a token read from the wrong slot, a wrong length
or a missed copy changes what is generated. They are exact, and do not depend on what else is in the batch.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from llmopt.optimizer.manifest import Engine, LoraModule, LoraSlots
from llmopt.runtime.backends.adapter_memory import AdapterMemory
from llmopt.runtime.backends.base import FloatArray, IntArray

__all__ = ["ToyBackend", "toy_engine", "toy_logits"]

_MIX = np.uint64(0x9E3779B97F4A7C15)


def toy_engine(
    *, vocab_size: int = 64, capacity: int = 128, max_chunk: int = 16, min_chunk: int = 2, adapters: int = 0
) -> Engine:
    """The manifest entry of a toy engine; its adapters are a number each, ``down`` of the linear ``toy``."""
    module = LoraModule(name="toy", inputs=1, outputs=1, down=0, up=1)
    return Engine(
        exporter="toy",
        target="toy",
        path="toy",
        inputs=[],
        outputs=[],
        num_layers=0,
        kv_heads=0,
        head_dim=0,
        kv_dtype="int64",
        vocab_size=vocab_size,
        capacity=capacity,
        max_chunk=max_chunk,
        min_chunk=min_chunk,
        lora=LoraSlots(max_rank=1, slots=adapters, modules=[module]) if adapters else None,
    )


class ToyBackend:
    """The "cache" is the tokens themselves and the adapter they were written with, int64 ``[slots, capacity]``.

    Args:
        engine: As made by ``toy_engine``.
        slots: Sequences held at the same time.
        before_run: Called before each run with "prefill" or "decode" and its slots: a test may raise or wait there.
    """

    def __init__(
        self, engine: Engine, *, slots: int, before_run: Callable[[str, range], None] = lambda kind, slots: None
    ) -> None:
        self.engine = engine
        self.slots = slots
        self.capacity = engine.capacity
        self.adapters = None if engine.lora is None else AdapterMemory(engine.lora, sequences=slots)
        self._cache = np.full((slots, engine.capacity), -1, np.int64)
        self._before_run = before_run

    def prefill(self, slot: int, ids: IntArray, start: int, rows: IntArray) -> FloatArray:
        """See ``Backend.prefill``."""
        self._before_run("prefill", range(slot, slot + 1))
        if not 0 < len(ids) <= self.engine.max_chunk or start + len(ids) > self.capacity:
            raise ValueError(f"a chunk of {len(ids)} tokens at {start}")
        self._cache[slot, start : start + len(ids)] = ids + self._adapted(1)
        return np.array([self._logits(slot, start + row + 1) for row in rows], np.float32).reshape(
            len(rows), self.engine.vocab_size
        )

    def decode(self, ids: IntArray, lengths: IntArray) -> FloatArray:
        """See ``Backend.decode``."""
        count = len(ids)
        self._before_run("decode", range(count))
        self._cache[np.arange(count), lengths] = ids + self._adapted(count)
        return np.array([self._logits(slot, int(lengths[slot]) + 1) for slot in range(count)], np.float32)

    def copy_prefix(self, source: int, destination: int, length: int) -> None:
        """See ``Backend.copy_prefix``."""
        self._cache[destination, :length] = self._cache[source, :length]

    def drop(self, slot: int) -> None:
        """Forget a slot, so that reading it again shows in the results."""
        self._cache[slot] = -1

    def _adapted(self, count: int) -> IntArray:
        """What the adapters of the next call's sequences add to their tokens, int64 ``[count]``."""
        if self.adapters is None:
            return np.zeros(count, np.int64)
        chosen, factors, ranks = self.adapters.inputs(count).values()
        numbers = np.concatenate([[0], np.where(ranks[:, 0] > 0, factors[:, 0], 0)]).astype(np.int64)
        added: IntArray = numbers[chosen] * self.engine.vocab_size
        return added

    def _logits(self, slot: int, length: int) -> npt.NDArray[np.float32]:
        """float32 ``[vocab]``, from the first ``length`` tokens of ``slot``."""
        return toy_logits(self._cache[slot, :length], self.engine.vocab_size)


def toy_logits(tokens: IntArray, vocab_size: int) -> npt.NDArray[np.float32]:
    """float32 ``[vocab]`` in [-8, 8), a hash of ``tokens`` int64 ``[n]`` and their order."""
    places = np.arange(1, len(tokens) + 1, dtype=np.uint64)
    total = np.sum(_mix(tokens.astype(np.uint64) * _MIX + places), dtype=np.uint64)
    vocabulary = np.arange(vocab_size, dtype=np.uint64)
    return ((_mix(total + vocabulary * _MIX) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 20)) - 8


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each element (the finalizer of splitmix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
