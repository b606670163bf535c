"""Noticing engines that hold connections open and send nothing: a stopped process, a hung GPU.

Judged is the engine and not the request, for a request may rightly wait long: as long as an engine sends anything to
any client it works; health checks do not count. One that has requests of ours and is silent is given up after
`seconds`, a prefill engine after as much longer as its prompts may need at the least rate that is believed.
"""

import asyncio
import logging
from collections.abc import Callable

from pdrouter.fleet.engine import Engine
from pdrouter.fleet.fleet import Fleet

_log = logging.getLogger(__name__)
LEAST_RATE = 2_000.0  # prompt tokens a second; a hundredth of what a data centre's GPU does with an 8B model


_EVERY = 0.25


class Stall:
    """Looks four times a second."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, fleet: Fleet, give_up: Callable[[Engine, str], object], seconds: float
    ) -> None:
        """Prepare.

        Args:
            loop: keeps the time.
            fleet: whose engines are looked at.
            give_up: fails what a stalled engine has under way.
            seconds: how long a busy engine may be silent.
        """
        self._loop = loop
        self._fleet = fleet
        self._give_up = give_up
        self._seconds = seconds
        self._last: dict[Engine, tuple[int, float]] = {}
        self._timer = loop.call_later(_EVERY, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        last, self._last = self._last, {}
        for engine in self._fleet:
            engine.heard_before, engine.heard_then = engine.heard_then, engine.heard
            if not engine.own_in_flight:
                continue
            worked, since = last.get(engine, (-1, now))
            if worked != engine.worked:
                since = now
            self._last[engine] = engine.worked, since
            if now - since > self._seconds + engine.own_queued / LEAST_RATE:
                del self._last[engine]
                self._fleet.stalled(engine)
                self._give_up(engine, f"{engine.url} has sent nothing for {now - since:.0f} s")
        self._timer = self._loop.call_later(_EVERY, self._look)

    def close(self) -> None:
        """Look no more."""
        self._timer.cancel()
