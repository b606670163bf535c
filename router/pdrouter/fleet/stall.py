"""Noticing engines that hold connections open and send nothing: a stopped process, a hung GPU.

Judged is the engine and not the request, for a request may rightly wait long: as long as an engine sends anything to
clients it works. `/health` says nothing of that, for vLLM's frontend answers it while the engine's core hangs. One that
owes bytes and is silent is given up after `seconds`, a prefill engine after as much longer as its prompts may need at
the least rate that is believed.

An engine may be silent and work. A decode engine: on answers of which nothing is heard before they are complete, on
those of the router's other processes, or on others than the one that it has preempted. A prefill engine: it may have no
room until decode engines fetch what it has computed. Then its counters tell (`pdrouter.fleet.pulse`): who is well by
them is not given up, and a decode engine that need not say anything only when they have stood still for as long.

Engines that have left the fleet are looked at as long as they have requests, which hang as any other's would.
"""

import asyncio
import logging
from enum import Enum, auto

from pdrouter.fleet.engine import Engine, Role
from pdrouter.fleet.fleet import Fleet
from pdrouter.fleet.pulse import Pulse
from pdrouter.upstream.errors import StalledError
from pdrouter.upstream.pool import Pool

_log = logging.getLogger(__name__)
LEAST_RATE = 2_000.0  # prompt tokens a second; a hundredth of what a data centre's GPU does with an 8B model
_EVERY = 0.25
_SELDOM = 2.0  # seconds between two looks at the counters of an engine that is silent for long


class _Owes(Enum):
    """Whether an engine that works would send something before long."""

    NOTHING = auto()
    PERHAPS = auto()
    SOON = auto()


class Stall:
    """Looks four times a second."""

    def __init__(self, loop: asyncio.AbstractEventLoop, fleet: Fleet, pool: Pool, seconds: float) -> None:
        """Prepare.

        Args:
            loop: keeps the time.
            fleet: whose engines are looked at.
            pool: knows what they have under way, and which others have anything.
            seconds: how long an engine may be silent that owes bytes.
        """
        self._loop = loop
        self._fleet = fleet
        self._pool = pool
        self._seconds = seconds
        self._last: dict[Engine, tuple[_Owes, int, float]] = {}
        self._pulses: dict[Engine, Pulse] = {}
        self._timer = loop.call_later(_EVERY, self._look)

    def _owes(self, engine: Engine) -> _Owes:
        calls = self._pool.open(engine)
        if engine.role is Role.PREFILL:
            return _Owes.SOON if calls else _Owes.NOTHING
        unseen, owed = engine.elsewhere[0] > 0, False
        for call in calls:
            if call.paused:
                unseen = True
            elif call.whole:
                unseen = owed = True
            elif call.began:
                return _Owes.SOON
            else:
                owed = True
        if not owed:
            return _Owes.NOTHING
        # A stream that has not begun may wait behind answers of which nothing is heard before they are complete.
        return _Owes.PERHAPS if unseen else _Owes.SOON

    def _look(self) -> None:
        self._timer = self._loop.call_later(_EVERY, self._look)  # first: no bug below may end the watch
        now = self._loop.time()
        last, self._last = self._last, {}
        pulses, self._pulses = self._pulses, {}
        for engine in dict.fromkeys((*self._fleet, *self._pool.engines())):
            engine.heard_before, engine.heard_then = engine.heard_then, engine.heard
            owes = self._owes(engine)
            if owes is _Owes.NOTHING:
                continue
            before, worked, since = last.get(engine, (owes, engine.worked, now))
            silent = worked == engine.worked and engine in last
            if not silent or before is not owes:
                since = now
            self._last[engine] = owes, engine.worked, since
            if not silent:
                continue
            pulse = self._pulse(engine, pulses, now)
            stood = pulse.stood if engine.role is Role.DECODE else 0.0
            if owes is _Owes.SOON:
                stood = max(stood, now - max(since, pulse.well))
            if stood > self._seconds + engine.queued_tokens / LEAST_RATE:
                self._give_up(engine, stood)
        for pulse in pulses.values():  # of engines that have been heard, owe nothing or are gone
            pulse.stop()

    def _pulse(self, engine: Engine, pulses: dict[Engine, Pulse], now: float) -> Pulse:
        """Look at the counters of a silent engine."""
        pulse = pulses.pop(engine, None)
        if pulse is None:
            pulse = Pulse(engine, self._pool, min(_SELDOM, self._seconds / 8))
        self._pulses[engine] = pulse
        pulse.look(now)
        return pulse

    def _give_up(self, engine: Engine, seconds: float) -> None:
        del self._last[engine]
        pulse = self._pulses.pop(engine, None)
        if pulse is not None:
            pulse.stop()
        self._fleet.stalled(engine)
        count = self._pool.give_up(engine, StalledError(f"{engine.url} has sent nothing for {seconds:.0f} s"))
        _log.warning("engine=%s role=%s stalled=%d requests go elsewhere", engine.url, engine.role, count)

    def close(self) -> None:
        """Look no more."""
        self._timer.cancel()
        for pulse in self._pulses.values():
            pulse.stop()
