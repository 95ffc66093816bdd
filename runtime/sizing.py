"""How many sequences fit in memory: chosen when a build is opened, and said."""

from dataclasses import dataclass

import numpy as np
import psutil

from llmopt.optimizer.errors import InputError, ResourceError
from llmopt.optimizer.manifest import Engine

__all__ = ["DEFAULT_RUNNING", "Sizes", "choose_sizes", "has_fixed_capacity", "item_bytes", "pool_bytes"]

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
    engine: Engine,
    *,
    capacity: int,
    running: int | None,
    kept: int | None = None,
    memory: int | None = None,
    free: int | None = None,
) -> Sizes:
    """Sizes that fit.

    Args:
        engine: Whose keys and values are held.
        capacity: Tokens of a slot.
        running: Requests that are to run at the same time; when None, 16, or as many as fit and the engine takes.
        kept: Further slots; when None, as many as run, or as fit.
        memory: Bytes that the pool may have; half of what is free now when None.
        free: Bytes that are free where the pool will lie, if that is not in the host's memory.

    Raises:
        InputError: The engine does not take so many sequences at once.
        ResourceError: What was asked for does not fit; the message says what would.
    """
    if running is not None and engine.slots is not None and running > engine.slots:
        raise InputError(
            f"{running} requests at once were asked for, and the engine was compiled for {engine.slots}",
            hint=f"--slots {engine.slots}, or build the engine with more slots",
        )
    if free is None:
        free = psutil.virtual_memory().available
    limit = int(free * _SHARE) if memory is None else memory
    slot = max(pool_bytes(engine, 1, capacity), 1)
    fitting = limit // slot
    asked = (running or 1) + (kept or 0)
    if fitting < asked:
        tokens = capacity * limit // (slot * asked)
        what = "one slot" if asked == 1 else f"{asked} slots"
        smaller = [f"--context {tokens}"] if tokens > 1 and not has_fixed_capacity(engine) else []
        fewer = [f"{fitting} slots"] if fitting else []
        raise ResourceError(
            f"{what} of {capacity} tokens take {asked * slot / 1e9:.2f} GB of keys and values, and "
            f"{limit / 1e9:.2f} GB may be used",
            hint=f"what fits: {' or '.join(smaller + fewer)}" if smaller + fewer else "give it more --memory",
        )
    running = min(DEFAULT_RUNNING, fitting, engine.slots or fitting) if running is None else running
    slots = min(running + (running if kept is None else kept), fitting)
    return Sizes(running, slots, capacity, slots * slot)


def pool_bytes(engine: Engine, slots: int, capacity: int) -> int:
    """Bytes of a slot pool when all its slots are full: keys and values of every layer."""
    per_token = 2 * engine.num_layers * engine.kv_heads * engine.head_dim * item_bytes(engine.kv_dtype)
    return slots * capacity * per_token


def item_bytes(dtype: str) -> int:
    """Bytes of an element of a dtype as manifests name it."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def has_fixed_capacity(engine: Engine) -> bool:
    """Whether a slot has to have the engine's capacity, as in engines that were compiled: their caches say so."""
    dims = next((tensor.dims for tensor in engine.inputs if tensor.name.startswith("past.")), ["", "", ""])
    return isinstance(dims[2], int)
