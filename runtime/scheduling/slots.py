"""Keeps the books of the slot pool: which slot holds what, what is copied where, what is forgotten.

The slots ``0 .. active-1`` belong to requests that run, one behind the other, because one decode call runs over them
all. The slots behind them keep what requests left behind, for prompts that begin alike: a cache whose least recently
used sequence makes room. Nothing here touches the memory itself; all answers say what is to be copied.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmopt.runtime.backends.base import IntArray
from llmopt.runtime.scheduling.prefix_tree import PrefixTree

__all__ = ["Admission", "Copy", "Held", "SlotPool"]

_LEAST_SHARED = 16
"""Tokens: a shorter beginning is not worth a copy."""


@dataclass(frozen=True, slots=True)
class Copy:
    """The first ``length`` tokens go from one slot to another."""

    source: int
    destination: int
    length: int


@dataclass(slots=True, eq=False)
class Held:
    """A sequence in the pool.

    Attributes:
        slot: Where it is now.
        namespace: Only prompts of the same one may begin with it.
        length: Tokens that were written.
        shared: int64 ``[tokens]``, what others may begin with; None where nothing may be shared yet.
        used: When it was last of use: larger is later.
    """

    slot: int
    namespace: Hashable
    length: int = 0
    shared: IntArray | None = None
    used: int = 0


@dataclass(frozen=True, slots=True)
class Admission:
    """A request got a slot.

    Attributes:
        held: Its sequence, in the slot behind all active ones.
        copies: What to do first, in this order.
    """

    held: Held
    copies: tuple[Copy, ...]


@dataclass(slots=True)
class SlotPool:
    """Books of ``slots`` slots.

    Attributes:
        slots: How many there are.
        shares: Whether prompts may begin with what other requests wrote.
    """

    slots: int
    shares: bool = True
    _active: list[Held] = field(default_factory=list)
    _kept: dict[int, Held] = field(default_factory=dict)
    _trees: dict[Hashable, PrefixTree[Held]] = field(default_factory=dict)
    _clock: int = 0

    @property
    def active(self) -> Sequence[Held]:
        """The sequences of requests that run, in slot order."""
        return self._active

    @property
    def kept(self) -> Sequence[Held]:
        """The sequences that are only kept for others."""
        return tuple(self._kept.values())

    def is_kept(self, slot: int) -> bool:
        """Whether the slot holds a sequence that is only kept for others."""
        return slot in self._kept

    def shareable(self, ids: IntArray, namespace: Hashable, most: int) -> int:
        """How many tokens of a prompt would be found here, at most ``most``."""
        return self._find(ids, namespace, most)[1]

    def admit(self, ids: IntArray, namespace: Hashable, *, most: int) -> Admission:
        """Give a request the slot behind the active ones.

        Args:
            ids: int64 ``[tokens]``, its prompt.
            namespace: Whose sequences it may begin with.
            most: Tokens that may be taken from others.

        Raises:
            ValueError: All slots are active.
        """
        slot = len(self._active)
        if slot >= self.slots:
            raise ValueError("no slot is free")
        donor, length = self._find(ids, namespace, most)
        is_spent = donor is not None and self._is_spent(donor, ids)
        standing = self._kept.get(slot)
        copies: list[Copy] = []
        if standing is not None and not (standing is donor and is_spent):
            copies += self._move_away(standing, spared=donor)
        if donor is not None and donor is not standing:
            copies.append(Copy(donor.slot, slot, length))
        if donor is not None and is_spent:
            self._forget(donor)
        elif donor is not None:
            self._touch(donor)
        held = Held(slot, namespace, length)
        self._active.append(held)
        return Admission(held, tuple(copies))

    def share(self, held: Held, ids: IntArray) -> None:
        """Let others begin with the first ``len(ids)`` tokens of a sequence; more replaces what was shared before."""
        if not self.shares or len(ids) < _LEAST_SHARED:
            return
        tree = self._trees.setdefault(held.namespace, PrefixTree())
        if held.shared is not None:
            tree.remove(held)
        held.shared = ids
        tree.insert(held, ids)
        self._touch(held)

    def release(self, held: Held, movers: Sequence[Held], *, keep: bool) -> tuple[Copy, ...]:
        """End an active sequence and close the gap.

        Args:
            held: The sequence.
            movers: Active sequences behind it, in slot order: the first moves into the gap, the next into the first's
                place, and so on. The last of them is the last active one.
            keep: Whether what it shares is still there for others.
        """
        copies = []
        is_kept = keep and held.shared is not None and not self._is_covered(held)
        if not is_kept:
            self._forget(held)
        elif movers:
            copies += self._move_away(held, spared=None)
        gap = self._active.index(held)
        for mover in movers:
            copies.append(Copy(mover.slot, gap, mover.length))
            self._active[gap] = mover
            gap, mover.slot = mover.slot, gap
        del self._active[gap]
        if is_kept and not movers and held.shared is not None:
            self._kept[held.slot], held.length = held, len(held.shared)
        return tuple(copies)

    def clear(self) -> None:
        """Forget what is kept."""
        for held in self.kept:
            self._forget(held)

    def _find(self, ids: IntArray, namespace: Hashable, most: int) -> tuple[Held | None, int]:
        """Who shares the longest beginning of ``ids[:most]``, and its length; None and 0 where it is not worth it."""
        tree = self._trees.get(namespace)
        if tree is None or most < _LEAST_SHARED:
            return None, 0
        length, owners = tree.longest(ids[:most])
        if length < _LEAST_SHARED:
            return None, 0
        # The one that stands where the prompt will be written needs no copy; of the others, any will do.
        slot = len(self._active)
        return next((owner for owner in owners if owner.slot == slot), owners[-1]), length

    def _is_spent(self, donor: Held, ids: IntArray) -> bool:
        """Whether a prompt has all of a kept sequence, which is then of no other use."""
        shared = donor.shared
        if shared is None or self._kept.get(donor.slot) is not donor:
            return False
        return np.array_equal(shared, ids[: len(shared)])

    def _is_covered(self, held: Held) -> bool:
        """Whether another sequence begins with all that this one shares."""
        assert held.shared is not None
        length, owners = self._trees[held.namespace].longest(held.shared)
        return length == len(held.shared) and any(owner is not held for owner in owners)

    def _move_away(self, held: Held, *, spared: Held | None) -> list[Copy]:
        """Take a sequence out of its slot, to where it is kept; it is forgotten if nothing else is older."""
        room = self._room(held, spared)
        if room is None:
            self._forget(held)
            return []
        assert held.shared is not None
        copy = Copy(held.slot, room, len(held.shared))
        self._kept.pop(held.slot, None)
        self._kept[room] = held
        held.slot, held.length = room, len(held.shared)
        return [copy]

    def _room(self, held: Held, spared: Held | None) -> int | None:
        """An empty slot, or that of the sequence that was not used for longest; None if that is ``held``."""
        first = len(self._active)
        empty = next((slot for slot in range(first, self.slots) if slot not in self._kept and slot != held.slot), None)
        if empty is not None:
            return empty
        others = (each for each in self._kept.values() if each is not spared)
        oldest = min(others, key=lambda each: each.used, default=None)
        if oldest is None or oldest is held:
            return None
        slot = oldest.slot
        self._forget(oldest)
        return slot

    def _forget(self, held: Held) -> None:
        if self._kept.get(held.slot) is held:
            del self._kept[held.slot]
        if held.shared is not None:
            tree = self._trees[held.namespace]
            tree.remove(held)
            held.shared = None
            if not len(tree):
                del self._trees[held.namespace]

    def _touch(self, held: Held) -> None:
        self._clock += 1
        held.used = self._clock
