"""The order in which requests get slots: fair among tenants, then by priority, then by arrival."""

import heapq
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

__all__ = ["AGEING", "LOOKED_AT", "WaitingLine"]

T = TypeVar("T", bound=Hashable)

AGEING = 10_000
"""Milliseconds of waiting that are worth one step of priority."""

LOOKED_AT = 64
"""Requests of a tenant that may pass those that cannot begin."""


@dataclass(slots=True)
class _Tenant(Generic[T]):
    """Its requests that wait, the next one first; how many it has in all; the tokens that were spent on it."""

    waiting: list[tuple[int, int, T]] = field(default_factory=list)
    requests: int = 0
    spent: int = 0


class WaitingLine(Generic[T]):
    """Who is next.

    It is a request of the tenant that the fewest tokens were spent on, of those that wait (the virtual token counter of
    Sheng et al. 2024, arXiv:2401.00588; tokens read and tokens written count alike here). A tenant that had no request
    starts with as much as the least served of the others: what it did not use before gives it no credit.

    Within a tenant, the request with the lowest priority number is next, as in vLLM, and of those the one that came
    first. Waiting for ``AGEING`` milliseconds is worth as much as a priority lower by one, so nothing waits for ever.
    """

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant[T]] = {}
        self._tenant_of: dict[T, str] = {}
        self._waiting: set[T] = set()
        self._number = 0

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def add(self, request: T, *, tenant: str = "", priority: int = 0, arrival: int = 0) -> None:
        """Queue a request.

        Args:
            request: Anything that is equal to itself alone.
            tenant: On whose behalf.
            priority: Lower is earlier.
            arrival: When, in milliseconds of any clock.
        """
        if tenant not in self._tenants:
            least = min((each.spent for each in self._tenants.values()), default=0)
            self._tenants[tenant] = _Tenant(spent=least)
        entry = self._tenants[tenant]
        entry.requests += 1
        self._number += 1
        heapq.heappush(entry.waiting, (priority * AGEING + arrival, self._number, request))
        self._tenant_of[request] = tenant
        self._waiting.add(request)

    def next(self) -> T | None:
        """Who is next, left in the line; None when nobody waits."""
        fronts = [(each.spent, *each.waiting[0]) for each in self._tenants.values() if each.waiting]
        return min(fronts, key=lambda front: front[:3])[3] if fronts else None

    def next_of(self, may: Callable[[T], bool]) -> T | None:
        """Who is next of those that ``may`` begin, among the first ``LOOKED_AT`` of each tenant; left in the line."""
        tenants = sorted((each for each in self._tenants.values() if each.waiting), key=lambda each: each.spent)
        fronts = (entry for each in tenants for entry in heapq.nsmallest(LOOKED_AT, each.waiting))
        return next((request for _, _, request in fronts if may(request)), None)

    def admit(self, request: T) -> None:
        """Take a request out of the line; it is still one of its tenant's."""
        waiting = self._tenants[self._tenant_of[request]].waiting
        self._waiting.remove(request)
        if waiting[0][2] == request:
            heapq.heappop(waiting)
        else:
            waiting[:] = [each for each in waiting if each[2] != request]
            heapq.heapify(waiting)

    def charge(self, request: T, tokens: int) -> None:
        """Note that tokens were read or written for a request that was admitted."""
        self._tenants[self._tenant_of[request]].spent += tokens

    def remove(self, request: T) -> None:
        """Forget a request that has ended, admitted or not."""
        if request in self._waiting:
            self.admit(request)
        tenant = self._tenant_of.pop(request)
        entry = self._tenants[tenant]
        entry.requests -= 1
        if not entry.requests:
            del self._tenants[tenant]
