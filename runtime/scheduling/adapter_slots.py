"""Keeps the books of an engine's adapters: which lies in which slot, who uses it, which one makes room."""

from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

__all__ = ["AdapterLoad", "AdapterSlots"]

A = TypeVar("A", bound=Hashable)


@dataclass(frozen=True, slots=True)
class AdapterLoad(Generic[A]):
    """An adapter is to be read into a slot, in place of what was there."""

    adapter: A
    slot: int


@dataclass(slots=True)
class AdapterSlots(Generic[A]):
    """Books of the slots ``1 .. count``. What a running request uses stays where it is.

    An adapter for which there is no slot gets the next one that comes free: the least used of the others is *spared for
    it*, which means that nobody else may begin to use that, until the requests that do have ended.

    Attributes:
        count: How many there are; 0 where the engine takes no adapters.
    """

    count: int
    _slots: dict[A, int] = field(default_factory=dict)
    _users: dict[A, int] = field(default_factory=dict)
    _used: dict[A, int] = field(default_factory=dict)
    _clock: int = 0

    @property
    def resident(self) -> Collection[A]:
        """The adapters that are in memory."""
        return self._slots.keys()

    @property
    def in_use(self) -> int:
        """How many of them running requests use."""
        return sum(1 for users in self._users.values() if users)

    def slot_of(self, adapter: A) -> int:
        """Where an adapter lies that is in memory."""
        return self._slots[adapter]

    def has_room(self, adapter: A) -> bool:
        """Whether a request with this adapter can begin now."""
        return adapter in self._slots or len(self._slots) < self.count or self._oldest() is not None

    def spared(self) -> A | None:
        """Of adapters that are all in use, the one to wait for: it has the fewest users, and was taken first."""
        return min(self._slots, key=lambda each: (self._users[each], self._used[each]), default=None)

    def take(self, adapter: A) -> AdapterLoad[A] | None:
        """Count one more request with an adapter that has room.

        Returns:
            What has to be read first; None where the adapter is in memory.
        """
        self._clock += 1
        load = None
        if adapter not in self._slots:
            slot = self._free_slot()
            self._slots[adapter], self._users[adapter] = slot, 0
            load = AdapterLoad(adapter, slot)
        self._users[adapter] += 1
        self._used[adapter] = self._clock
        return load

    def release(self, adapter: A) -> None:
        """Count one request less. The adapter stays in memory until its slot is needed."""
        self._users[adapter] -= 1

    def forget(self, adapter: A) -> bool:
        """Let an adapter go that nobody uses, as if it had never been in memory; False where somebody does."""
        if self._users.get(adapter, 0):
            return False
        for books in (self._slots, self._users, self._used):
            books.pop(adapter, None)
        return True

    def _free_slot(self) -> int:
        if len(self._slots) == self.count:
            oldest = self._oldest()
            if oldest is None:
                raise ValueError("all adapters are in use")
            self.forget(oldest)
        taken = set(self._slots.values())
        return next(slot for slot in range(1, self.count + 1) if slot not in taken)

    def _oldest(self) -> A | None:
        """Of those that nobody uses, the one that was not taken for longest."""
        unused = (each for each, users in self._users.items() if not users)
        return min(unused, key=self._used.__getitem__, default=None)
