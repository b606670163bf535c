"""How many requests are under way at once; the rest wait in a bounded queue or are turned away early.

An overloaded router that takes everything makes every client wait until it gives up, and then has worked for nobody.
"""

import asyncio
import math
from typing import Protocol

from pdrouter.deadlines import Deadlines

_WINDOW = 10.0
_LONGEST_RETRY = 60


class Applicant(Protocol):
    """A request that asks to be served."""

    admission: "str | None"

    def admitted(self) -> None:
        """Begin."""

    def turned_away(self, why: str, retry_after: int) -> None:
        """There is no room, now or within the time that a request may wait; seconds after which to ask again."""

    def expired(self, deadlines: Deadlines) -> None:
        """It waited too long."""


class Admission:
    """Counts requests under way and keeps the queue, first come first served."""

    __slots__ = ("_ended", "_loop", "_most", "_rate", "_room", "_since", "_waiting", "deadlines", "running")

    def __init__(self, loop: asyncio.AbstractEventLoop, most: int, room: int, seconds: float) -> None:
        """Prepare.

        Args:
            loop: keeps the time.
            most: requests under way at once.
            room: requests that may wait.
            seconds: how long each of them may wait.
        """
        self.running = 0
        self.deadlines = Deadlines(loop, seconds)
        self._loop = loop
        self._most = most
        self._room = room
        self._waiting: dict[Applicant, None] = {}
        self._ended = 0
        self._since = loop.time()
        self._rate = 0.0

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def enter(self, one: Applicant) -> None:
        """Admit a request at once, let it wait, or turn it away."""
        if self.running < self._most:
            self.running += 1
            one.admission = "running"
            one.admitted()
        elif len(self._waiting) < self._room:
            one.admission = "waiting"
            self._waiting[one] = None
            self.deadlines.start(one)
        else:
            one.turned_away("The router's queue is full", self.retry_after())

    def leave(self, one: Applicant) -> None:
        """A request is over, however far it got; the first one that waits takes its place."""
        state, one.admission = one.admission, None
        if state == "waiting":
            self._waiting.pop(one, None)
            self.deadlines.stop(one)
        elif state == "running":
            self.running -= 1
            self._ended += 1
            if self._waiting:
                # Not from within the end of the one before: a queue of failures must not nest.
                self._loop.call_soon(self._next)

    def _next(self) -> None:
        while self._waiting and self.running < self._most:
            one = next(iter(self._waiting))
            del self._waiting[one]
            self.deadlines.stop(one)
            self.running += 1
            one.admission = "running"
            one.admitted()

    def retry_after(self) -> int:
        """Estimate after how many seconds the queue, as it is now, will have been served."""
        now = self._loop.time()
        if now - self._since >= _WINDOW or not self._rate:
            self._rate = self._ended / max(now - self._since, 0.001)
            self._ended, self._since = 0, now
        return max(1, min(_LONGEST_RETRY, math.ceil((len(self._waiting) + 1) / max(self._rate, 0.001))))
