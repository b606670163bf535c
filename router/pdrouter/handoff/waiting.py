"""Requests that wait for an engine or for room, in the order of their deadlines.

A prefill that starts without a decode engine that could take over would only pin KV blocks, so the request waits here,
where it costs nothing, shows in metrics and is told in time that it waits in vain.
"""

import asyncio
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import Protocol

from pdrouter.fleet.engine import Engine, Role


class Parked(Protocol):
    """A request that waits. `deadline` is the loop time at which its client wants to wait no longer."""

    deadline: float

    @property
    def refused(self) -> Sequence[Engine]:
        """Give the engines that it would not take though they had room."""

    def start(self) -> None:
        """Try again; it may come back at once."""

    def gave_up(self, role: Role | None, seconds: float, retry_after: int) -> None:
        """It has waited as long as it may: for an engine of a role, or for room (None)."""


class _Place:
    __slots__ = ("deadline", "number", "one", "role", "since")

    def __init__(self, deadline: float, number: int, one: Parked, role: Role | None, since: float) -> None:
        self.deadline = deadline
        self.number = number
        self.one: Parked | None = one
        self.role = role
        self.since = since

    def __lt__(self, other: "_Place") -> bool:
        return (self.deadline, self.number) < (other.deadline, other.number)


class Waiting:
    """The queue. Times are seconds."""

    def __init__(self, loop: asyncio.AbstractEventLoop, most: int, seconds: float) -> None:
        """Prepare.

        Args:
            loop: keeps the time.
            most: how many may wait before the next one is sent away.
            seconds: how long each may wait.
        """
        self._loop = loop
        self._most = most
        self._seconds = seconds
        self._heap: list[_Place] = []
        self._places: dict[Parked, _Place] = {}
        self._since: dict[Parked, float] = {}
        self._number = 0
        self._woken = False
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._places)

    def count(self, role: Role | None) -> int:
        """How many wait for an engine of a role, or for room (None)."""
        return sum(1 for place in self._places.values() if place.role is role)

    def park(self, one: Parked, role: Role | None, held: bool = False) -> None:
        """Let a request wait until `wake`. What it has waited before counts, and it keeps its place.

        Args:
            one: the request.
            role: for an engine of which it waits, or None for room.
            held: whether it has something to lose, an answer that has begun or KV blocks: it waits in a full queue too.
                Such requests have been served, so there are never more of them than may be under way at once.
        """
        now = self._loop.time()
        came = one not in self._since
        since = self._since.setdefault(one, now)
        deadline = min(since + self._seconds, one.deadline)
        if (came and not held and len(self._places) >= self._most) or now >= deadline:
            del self._since[one]
            self._loop.call_soon(one.gave_up, role, now - since, self.retry_after())
            return
        self._number += 1
        place = self._places[one] = _Place(deadline, self._number, one, role, since)
        heappush(self._heap, place)
        if self._timer is None:
            self._timer = self._loop.call_later(min(1.0, self._seconds / 10), self._look)

    def left_over(self, one: Parked) -> set[Engine] | None:
        """Give the engines that nobody wants who waits for room and comes before a request; None where nobody does.

        Before it comes who has less time left, or as much and was there first.
        """
        if not self._heap:
            return None
        since = self._since.get(one, self._loop.time())
        deadline = min(since + self._seconds, one.deadline)
        left: set[Engine] | None = None
        for place in self._heap:
            other = place.one
            if other is None or place.role is not None or place.deadline > deadline:
                continue
            left = set(other.refused) if left is None else left.intersection(other.refused)
            if not left:
                break
        return left

    def leave(self, one: Parked) -> None:
        """Forget a request; nothing happens when it does not wait."""
        self._since.pop(one, None)
        place = self._places.pop(one, None)
        if place is not None:
            place.one = None
            if len(self._heap) > 2 * len(self._places) + 16:
                self._heap = [kept for kept in self._heap if kept.one is not None]
                heapify(self._heap)

    def wake(self) -> None:
        """Something changed: let those that wait try again, soon."""
        if self._places and not self._woken:
            self._woken = True
            self._loop.call_soon(self._try)

    def _try(self) -> None:
        self._woken = False
        stuck: dict[Role | None, list[Sequence[Engine]]] = {}
        heap, self._heap = self._heap, []
        back: list[_Place] = []
        while heap:
            place = heappop(heap)
            one = place.one
            if one is None:
                continue
            # Nobody overtakes one that has less time left, unless by what that one would not take.
            if any(all(engine in one.refused for engine in those) for those in stuck.get(place.role, ())):
                back.append(place)
                continue
            del self._places[one]
            one.start()
            again = self._places.get(one)
            if again is None:
                self._since.pop(one, None)
            else:
                stuck.setdefault(again.role, []).append(one.refused)
        for place in back:
            heappush(self._heap, place)

    def _look(self) -> None:
        """End the wait of those whose time is over."""
        self._timer = None
        now = self._loop.time()
        late = [place for place in self._places.values() if place.deadline <= now]
        for place in late:
            one = place.one
            if one is not None:
                self.leave(one)
                one.gave_up(place.role, now - place.since, self.retry_after())
        self.wake()  # room may have become free in another process of the router
        if self._places and self._timer is None:
            self._timer = self._loop.call_later(min(1.0, self._seconds / 10), self._look)

    def retry_after(self) -> int:
        """Give the seconds after which a request that is sent away may come again."""
        return max(1, min(60, round(self._seconds / 4)))
