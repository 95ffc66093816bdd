"""How many sequences fit in memory: chosen when a build is opened, and said."""

from dataclasses import dataclass

import numpy as np
import psutil

from llmopt.optimizer.errors import ResourceError
from llmopt.optimizer.manifest import Engine

__all__ = ["DEFAULT_RUNNING", "Sizes", "choose_sizes", "pool_bytes"]

DEFAULT_RUNNING = 16
"""Requests that run at the same time, where nobody says how many."""

_SHARE = 0.5
"""Of the memory that is free, where nobody says how much may be used."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a slot pool.

    Attributes:
        running: Requests that run at the same time.
        slots: Of these and of what is kept for prompts that begin alike.
        capacity: Tokens of a slot.
        bytes: Of keys and values when all slots are full; memory is taken only as they fill.
    """

    running: int
    slots: int
    capacity: int
    bytes: int

    def __str__(self) -> str:
        kept = self.slots - self.running
        others = f", {kept} more kept for prompts that begin alike" if kept else ""
        return (
            f"{self.running} requests of up to {self.capacity} tokens at once{others}: "
            f"at most {self.bytes / 1e9:.2f} GB of keys and values"
        )


def choose_sizes(
    engine: Engine, *, capacity: int, running: int | None, kept: int | None = None, memory: int | None = None
) -> Sizes:
    """Sizes that fit.

    Args:
        engine: Whose keys and values are held.
        capacity: Tokens of a slot.
        running: Requests that are to run at the same time; when None, 16, or as many as fit.
        kept: Further slots; when None, as many as run, or as fit.
        memory: Bytes that the pool may have; half of what is free now when None.

    Raises:
        ResourceError: What was asked for does not fit; the message says what would.
    """
    limit = int(psutil.virtual_memory().available * _SHARE) if memory is None else memory
    slot = max(pool_bytes(engine, 1, capacity), 1)
    fitting = limit // slot
    asked = (running or 1) + (kept or 0)
    if fitting < asked:
        tokens = capacity * limit // (slot * asked)
        what = "one slot" if asked == 1 else f"{asked} slots"
        smaller = [f"--context {tokens}"] if tokens > 1 else []
        fewer = [f"{fitting} slots"] if fitting else []
        raise ResourceError(
            f"{what} of {capacity} tokens take {asked * slot / 1e9:.2f} GB of keys and values, and "
            f"{limit / 1e9:.2f} GB may be used",
            hint=f"what fits: {' or '.join(smaller + fewer)}" if smaller + fewer else "give it more --memory",
        )
    running = min(DEFAULT_RUNNING, fitting) if running is None else running
    slots = min(running + (running if kept is None else kept), fitting)
    return Sizes(running, slots, capacity, slots * slot)


def pool_bytes(engine: Engine, slots: int, capacity: int) -> int:
    """Bytes of a slot pool when all its slots are full: keys and values of every layer."""
    per_token = 2 * engine.num_layers * engine.kv_heads * engine.head_dim * np.dtype(engine.kv_dtype).itemsize
    return slots * capacity * per_token
