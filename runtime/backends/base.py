"""What an executor of engines offers: a pool of slots, one sequence each, written by prefill and decode."""

from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from llmopt.optimizer.manifest import Engine
from llmopt.runtime.backends.adapter_memory import AdapterMemory

__all__ = ["Backend", "ExecutionError", "FloatArray", "IntArray"]

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float32]


class ExecutionError(RuntimeError):
    """One run failed. The slots it wrote hold nothing of use; all others, and the backend itself, are sound."""


class Backend(Protocol):
    """Runs one engine over ``slots`` sequences of at most ``capacity`` tokens.

    A slot holds the keys and values of the first tokens of one sequence. The backend does not know how many: the
    caller says so in each call, and what lies beyond is never read. Calls come from one thread at a time.

    Results are bit-identical whatever else runs if every prefill call has at least ``engine.min_chunk`` tokens, except
    for a prompt that is shorter itself.
    """

    engine: Engine
    slots: int
    capacity: int
    adapters: AdapterMemory | None
    """Where adapters lie, and which of them the sequences of the next call have; None where the engine takes none."""

    def prefill(self, slot: int, ids: IntArray, start: int, rows: IntArray) -> FloatArray:
        """Write a chunk of one sequence behind the ``start`` tokens that its slot already holds.

        Safe to call when ``0 < len(ids) <= engine.max_chunk`` and ``start + len(ids) <= capacity``.

        Args:
            slot: Which sequence.
            ids: int64 ``[tokens]``.
            start: Tokens of the sequence that were written before.
            rows: int64 ``[rows]``, positions within ``ids`` whose logits are wanted; may be empty.

        Returns:
            Logits, float32 ``[rows, vocab]``, the caller's to keep.

        Raises:
            ExecutionError: The run failed; ``slot`` is lost.
        """

    def decode(self, ids: IntArray, lengths: IntArray) -> FloatArray:
        """Write one token to each of the slots ``0 .. n-1``.

        Safe to call when each ``lengths[i] < capacity`` and slot i holds ``lengths[i]`` tokens.

        Args:
            ids: int64 ``[n]``, the next token of each sequence.
            lengths: int64 ``[n]``, tokens each slot held before this call.

        Returns:
            Logits, float32 ``[n, vocab]``; the memory is reused by the next ``decode``.

        Raises:
            ExecutionError: The run failed; slots ``0 .. n-1`` are lost.
        """

    def copy_prefix(self, source: int, destination: int, length: int) -> None:
        """Copy the first ``length`` tokens of one slot over those of another."""

    def drop(self, slot: int) -> None:
        """Say that a slot's contents are not needed any more."""
