"""When what is read now may have come.

A process that was stopped, or got no CPU time, reads late what was sent to it meanwhile. What is only good for a time,
as a ticket to KV blocks, must not count from when it was read.
"""

import asyncio

_EVERY = 0.25  # seconds
_LATE = 2.5 * _EVERY


class Arrivals:
    """Looks at the clock four times a second."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._last = self._before = loop.time()
        self._timer = loop.call_later(_EVERY, self._look)

    def _look(self) -> None:
        # The look before the last one is what counts: after a standstill this timer goes off before anything is read.
        self._before, self._last = self._last, self._loop.time()
        self._timer = self._loop.call_later(_EVERY, self._look)

    def earliest(self, asked: float) -> float:
        """Give the loop time at which what is read now may have come at the earliest; now, if the loop has run.

        Args:
            asked: loop time at which it was asked for: it cannot have come before.
        """
        now = self._loop.time()
        return max(asked, now if now - self._before < _LATE else self._before)

    def close(self) -> None:
        """Look no more."""
        self._timer.cancel()
