"""A prefill leg whose ticket nobody will use any more.

Prefill that is broken off in the moment in which it ends leaves blocks pinned under a ticket that nobody knows. So a
leg that is likely to end soon gets a little time, and its ticket is given back.
"""

from contextlib import suppress
from typing import Any

from pdrouter.fleet.engine import Engine
from pdrouter.handoff.desk import Desk
from pdrouter.handoff.legs import Handoff, PrefillLeg
from pdrouter.handoff.ticket import Cause, TicketError, read_ticket
from pdrouter.handoff.way import Way
from pdrouter.upstream.connection import Headers
from pdrouter.upstream.errors import UpstreamError
from pdrouter.upstream.pool import Call

_SECONDS = 2.0  # that it gets to end
_SOON = 32_768  # prompt tokens that take about a second


class Asking:
    """A prefill leg under way: the engine's, its call and the way by which it was asked."""

    __slots__ = ("call", "leg", "way")

    def __init__(self, leg: PrefillLeg, call: Call, way: Way) -> None:
        self.leg = leg
        self.call = call
        self.way = way

    def break_off(self) -> None:
        """End it at once."""
        self.call.abort()
        self.way.failed("aborted")


class Unwanted(Handoff):
    """Hears how the leg ends."""

    __slots__ = ("_asking", "_decode", "_desk", "_model", "_over", "_tokens")

    def __init__(self, desk: Desk, asking: Asking, decode: Engine, model: Any, tokens: int) -> None:
        """Prepare.

        Args:
            desk: what all requests share.
            asking: the leg.
            decode: knows which names mean one model.
            model: the request's `model`, if it had one.
            tokens: of its prompt.
        """
        self._desk = desk
        self._asking = asking
        self._decode = decode
        self._model = model
        self._tokens = tokens
        self._over = False

    def begin(self) -> None:
        """Let the leg end by itself if that is near, else break it off."""
        asking = self._asking
        if asking.leg.engine.queued_tokens + self._tokens >= _SOON:
            self._over = True
            asking.break_off()
            return
        asking.leg.handoff = self
        self._desk.loop.call_later(_SECONDS, self._too_late)

    def _too_late(self) -> None:
        if not self._over:
            self._over = True
            self._asking.break_off()

    def prefilled(self, engine: Engine, status: int, headers: Headers, body: bytes) -> None:
        """There is a ticket: give it back."""
        self._over = True
        desk = self._desk
        self._asking.way.ended(status)
        if status != 200:
            desk.fleet.ended(engine, status)
            return
        with suppress(TicketError):
            came = desk.pool.arrivals.earliest(self._asking.leg.asked)
            ticket = read_ticket(body, engine, self._decode, self._model, came, desk.lease)
            desk.fleet.succeeded(engine)
            desk.issued(ticket, self._tokens)
            desk.release.give_back(ticket, self._model, Cause.RELEASED, self._asking.way)

    def prefill_failed(self, engine: Engine, error: UpstreamError) -> None:
        """There is none."""
        self._over = True
        self._asking.way.failed(error.reason)
        self._desk.broken(engine, error)

    def prefill_too_large(self, engine: Engine) -> None:
        """There is none that could be read."""
        self._over = True
        self._asking.break_off()
