"""Many deadlines of one length behind one timer.

A timer of the event loop for each request or connection would cost more than all other bookkeeping, and nearly none of
them ever fires. Deadlines of equal length end in the order in which they began, so a dict in insertion order holds them
and only its first entries need looking at.
"""

import asyncio
from typing import Protocol


class Waiting(Protocol):
    """Something that may take too long."""

    def expired(self, deadlines: "Deadlines") -> None:
        """It took longer than `deadlines.seconds`."""


class Deadlines:
    """Tells who has waited longer than `seconds`, at most a tenth of that (and at most a second) late."""

    __slots__ = ("_ends", "_loop", "_step", "_timer", "name", "seconds")

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, name: str = "") -> None:
        self.seconds = seconds
        self.name = name
        self._loop = loop
        self._step = min(1.0, seconds / 10)
        self._ends: dict[Waiting, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._ends)

    def start(self, waiting: Waiting) -> None:
        """Begin to wait, or begin anew."""
        ends = self._ends
        ends.pop(waiting, None)
        ends[waiting] = self._loop.time() + self.seconds
        if self._timer is None:
            self._timer = self._loop.call_later(self._step, self._look)

    def stop(self, waiting: Waiting) -> None:
        """Wait no more; nothing happens when it did not wait."""
        self._ends.pop(waiting, None)

    def shorten(self, seconds: float) -> None:
        """Allow less from now on, also to those who wait: who has waited longer is told at once."""
        less = self.seconds - seconds
        if less <= 0:
            return
        self.seconds = seconds
        self._step = min(1.0, seconds / 10)
        for waiting in self._ends:
            self._ends[waiting] -= less
        if self._timer is not None:
            self._timer.cancel()
            self._look()

    def _look(self) -> None:
        now = self._loop.time()
        late = []
        for waiting, end in self._ends.items():
            if end > now:
                break
            late.append(waiting)
        for waiting in late:
            if self._ends.pop(waiting, None) is not None:
                waiting.expired(self)
        self._timer = self._loop.call_later(self._step, self._look) if self._ends else None

    def close(self) -> None:
        """Forget all."""
        self._ends.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
