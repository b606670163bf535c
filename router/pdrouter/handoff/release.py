"""Giving back tickets that nobody will use, so that their KV blocks are free at once and not when the lease ends.

The wire has one way for it: a decode engine that refuses a request tells prefill to forget the request's blocks
(`pdrouter.openai.legs.release_leg`). It must have met that prefill engine before, for a first meeting only begins to
shake hands. One that says nothing for a second is frozen or cut off, so another is asked. A ticket that cannot be given
back stays in the ledger until its lease is over.
"""

import asyncio

from pdrouter.fleet.engine import Engine, Role
from pdrouter.fleet.fleet import Fleet
from pdrouter.handoff.edges import Edges
from pdrouter.handoff.ledger import Ledger
from pdrouter.handoff.ticket import Cause, Ticket
from pdrouter.handoff.way import Way, own_request
from pdrouter.openai.legs import release_leg
from pdrouter.upstream.connection import Headers
from pdrouter.upstream.errors import StalledError, UpstreamError
from pdrouter.upstream.pool import Call, Pool

_LATER = 1.0  # seconds until engines are asked again that could not take a ticket back
_PATIENCE = 1.0  # seconds that an engine has to refuse; parsing a request takes vLLM some milliseconds
_SHAKEN = 0.5  # seconds in which two engines have met
# What vLLM answers to a request that it has parsed. Who asks without the right key (401) or too often (429) is turned
# away before that, and prefill hears nothing.
_TAKEN_BACK = frozenset((400, 404, 422))


class _Giving:
    """One request that shall be refused."""

    def __init__(
        self, release: "Release", ticket: Ticket, body: bytes, cause: Cause, authorization: bytes, engines: list[Engine]
    ) -> None:
        self._release = release
        self._ticket = ticket
        self._body = body
        self._cause = cause
        self._authorization = authorization
        self._engines = engines
        self._engine: Engine | None = None
        self._again = False
        self._status = 0
        self._call: Call | None = None
        self._timer: asyncio.TimerHandle | None = None

    def send(self) -> None:
        """Ask the next engine."""
        if self._ticket.cause is not None:
            return
        if not self._engines:
            # Nobody took it now; blocks that stay pinned until the lease ends are worth a few more questions.
            again = self._release.again
            self._release.pool.loop.call_later(
                _LATER, again, self._ticket, self._body, self._cause, self._authorization
            )
            return
        self._engine = engine = self._engines.pop(0)
        request = own_request(engine, self._body, self._authorization)
        pool = self._release.pool
        self._call = pool.call(engine, request, self, perishable=self._ticket, counted=False)
        self._timer = pool.loop.call_later(_PATIENCE, self._late)

    def _late(self) -> None:
        """An engine that is frozen would never answer: ask another."""
        if self._call is not None and self._engine is not None:
            self._call.fail(StalledError(f"{self._engine.url} does not answer"))

    def _answered(self) -> None:
        self._call = None
        if self._timer is not None:
            self._timer.cancel()

    def head(self, status: int, headers: Headers) -> None:
        """Take the status."""
        self._status = status

    def body(self, data: bytes) -> None:
        """Take what is of no interest."""

    def end(self) -> None:
        """To be refused is what was wanted."""
        self._answered()
        if self._status not in _TAKEN_BACK:
            self.send()
        elif self._engine is not None and not self._again and not self._release.met(self._ticket.prefill, self._engine):
            # The two only shook hands; the next request of this engine makes it tell prefill.
            self._again = True
            self._engines.insert(0, self._engine)
            self._release.pool.loop.call_later(_SHAKEN, self.send)
        else:
            self._release.ledger.settle(self._ticket, self._cause)

    def failed(self, error: UpstreamError) -> None:
        """Ask another."""
        self._answered()
        self.send()


class Release:
    """Gives tickets back."""

    def __init__(self, fleet: Fleet, pool: Pool, ledger: Ledger, edges: Edges, api_key: str | None) -> None:
        """Prepare.

        Args:
            fleet: whose decode engines are asked.
            pool: connections to them.
            ledger: is told when a ticket is settled.
            edges: knows which engines have met.
            api_key: what engines want to see when a client's request told them nothing.
        """
        self.pool = pool
        self.ledger = ledger
        self._authorization = f"authorization: Bearer {api_key}\r\n".encode() if api_key else b""
        self._fleet = fleet
        self._edges = edges

    def give_back(self, ticket: Ticket, model: object, cause: Cause, way: Way | None = None) -> None:
        """Have a ticket's blocks freed; the ledger hears of it when a decode engine has refused them.

        Args:
            ticket: what nobody will use.
            model: of the request that it was for.
            cause: why it ends.
            way: of that request, whose key is the one that engines take for it.
        """
        ticket.handed = False
        authorization = (way.authorization if way is not None else b"") or self._authorization
        self.again(ticket, release_leg(model, ticket.params), cause, authorization)

    def again(self, ticket: Ticket, body: bytes, cause: Cause, authorization: bytes) -> None:
        """Ask decode engines to take a ticket back, as long as it is open."""
        prefill = ticket.prefill
        if not prefill.healthy:
            self.ledger.settle(ticket, cause)
            return
        engines = [one for one in self._fleet.healthy(Role.DECODE) if self._fleet.compatible(prefill, one)]
        engines.sort(key=lambda one: (self._edges.closed(prefill, one), not self.met(prefill, one)))
        _Giving(self, ticket, body, cause, authorization, engines[:3]).send()

    def met(self, prefill: Engine, decode: Engine) -> bool:
        """Whether two engines have exchanged blocks before."""
        return self._edges.met(prefill, decode)
