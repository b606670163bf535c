"""Leaving an engine alone that fails requests although its `/health` answers."""

import asyncio
import logging
from collections.abc import Callable

_log = logging.getLogger(__name__)
FAILURES = 5
FIRST_PAUSE = 5.0
LONGEST_PAUSE = 60.0


class Breaker:
    """Opens after 5 failures in a row; closes after a pause, which doubles when the first request then fails again.

    Five, because one broken prompt can fail on any engine; 5 s, because vLLM's own recovery from an error takes about
    that; 60 s at most, so that a repaired engine is found.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, turned: Callable[[], None]) -> None:
        """Prepare.

        Args:
            loop: keeps the time.
            turned: called whenever it opened or closed.
        """
        self.open = False
        self._loop = loop
        self._turned = turned
        self._pause = FIRST_PAUSE
        self._on_trial = False
        self._timer: asyncio.TimerHandle | None = None

    def succeeded(self) -> None:
        """A request ended well."""
        self._pause = FIRST_PAUSE
        self._on_trial = False

    def failed(self, in_a_row: int, what: str) -> None:
        """A request failed; `in_a_row` counts this one."""
        if in_a_row >= FAILURES or self._on_trial:
            self.trip(what)

    def trip(self, what: str) -> None:
        """Open, however many requests failed."""
        if self.open:
            return
        if self._on_trial:
            self._pause = min(self._pause * 2, LONGEST_PAUSE)
        _log.warning("engine=%s breaker=open for=%gs", what, self._pause)
        self.open = True
        self._timer = self._loop.call_later(self._pause, self._try_again)
        self._turned()

    def _try_again(self) -> None:
        self._timer = None
        self.open = False
        self._on_trial = True
        self._turned()

    def close(self) -> None:
        """Forget the engine."""
        if self._timer is not None:
            self._timer.cancel()
