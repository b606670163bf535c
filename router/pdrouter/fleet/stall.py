"""Noticing engines that hold connections open and send nothing: a stopped process, a hung GPU.

Judged is the engine and not the request, for a request may rightly wait long: as long as an engine sends anything to
clients it works. `/health` says nothing of that, for vLLM's frontend answers it while the engine's core hangs. One that
owes bytes and is silent is given up after `seconds`, a prefill engine after as much longer as its prompts may need at
the least rate that is believed.
"""

import asyncio
import logging

from pdrouter.fleet.engine import Engine, Role
from pdrouter.fleet.fleet import Fleet
from pdrouter.upstream.errors import StalledError
from pdrouter.upstream.pool import Pool

_log = logging.getLogger(__name__)
LEAST_RATE = 2_000.0  # prompt tokens a second; a hundredth of what a data centre's GPU does with an 8B model


_EVERY = 0.25


class Stall:
    """Looks four times a second."""

    def __init__(self, loop: asyncio.AbstractEventLoop, fleet: Fleet, pool: Pool, seconds: float) -> None:
        """Prepare.

        Args:
            loop: keeps the time.
            fleet: whose engines are looked at.
            pool: knows what they have under way.
            seconds: how long an engine may be silent that owes bytes.
        """
        self._loop = loop
        self._fleet = fleet
        self._pool = pool
        self._seconds = seconds
        self._last: dict[Engine, tuple[int, float]] = {}
        self._timer = loop.call_later(_EVERY, self._look)

    def _owes(self, engine: Engine) -> bool:
        """Whether an engine that works would send something before long."""
        calls = self._pool.open(engine)
        if engine.role is Role.PREFILL:
            return bool(calls)
        silent = engine.elsewhere[0] > 0
        for call in calls:
            if call.whole or call.paused:
                silent = True
            elif call.began:
                return True
        # A stream that has not begun may wait behind answers of which nothing is heard before they are complete.
        return bool(calls) and not silent

    def _look(self) -> None:
        now = self._loop.time()
        last, self._last = self._last, {}
        for engine in self._fleet:
            engine.heard_before, engine.heard_then = engine.heard_then, engine.heard
            if not self._owes(engine):
                continue
            worked, since = last.get(engine, (-1, now))
            if worked != engine.worked:
                since = now
            self._last[engine] = engine.worked, since
            if now - since > self._seconds + engine.queued_tokens / LEAST_RATE:
                del self._last[engine]
                self._fleet.stalled(engine)
                count = self._pool.give_up(
                    engine, StalledError(f"{engine.url} has sent nothing for {now - since:.0f} s")
                )
                _log.warning("engine=%s role=%s stalled=%d requests go elsewhere", engine.url, engine.role, count)
        self._timer = self._loop.call_later(_EVERY, self._look)

    def close(self) -> None:
        """Look no more."""
        self._timer.cancel()
