"""Tickets that a decode engine has had for nearly a lease without beginning to answer: most often it is full.

vLLM's decode engines keep the leases of what waits in their queue by heartbeats. Where these fail (a
`kv_lease_duration` on decode of more than four times prefill's, lost notifications), the lease ends, and the decode
engine fetches whatever the blocks hold by then: status 200 and wrong text, also for later prompts that begin alike.
Nobody is told which lease ended, but prefill engines count them. So while a ticket is overdue that count is looked at;
when it grows, the request is taken away from decode before it may fetch, and prefilled again. What decode has begun to
answer by then is kept back until a count that was asked for afterwards tells that no lease had ended.

An answer in one piece is silent long after its blocks were fetched. It is no longer overdue once a working decode
engine has nothing waiting.
"""

import logging
from asyncio import AbstractEventLoop, TimerHandle
from functools import partial

from pdrouter.fleet.engine import Engine, Role
from pdrouter.fleet.page import Page
from pdrouter.fleet.pulse import counters
from pdrouter.fleet.scrape import values
from pdrouter.handoff.edges import Edges
from pdrouter.handoff.ledger import Ledger
from pdrouter.handoff.ticket import Cause, Ticket
from pdrouter.upstream.connection import Headers, Receiver
from pdrouter.upstream.errors import LeaseEndedError, UpstreamError
from pdrouter.upstream.pool import Call, Pool

_log = logging.getLogger(__name__)
OVERDUE = 0.75  # of a lease: the first count must be taken before it can have ended
_LOOKS = 15  # in a lease
_ENDED = b"vllm:nixl_num_kv_expired_reqs_total"
_WAITING = b"vllm:num_requests_waiting"


def ended_leases(page: bytes) -> float | None:
    """Give how many leases have ended at a prefill engine, or None where its page does not tell."""
    try:
        told = values(page, _ENDED)
    except ValueError:
        return None
    return sum(told) if told else None


class Doubt:
    """Stands before the receiver of an overdue answer and keeps it back until it is known to be right.

    `ended` is the prefill engine's count of ended leases when this one had not.
    """

    __slots__ = ("_complete", "_head", "_page", "_pieces", "_pool", "_receiver", "call", "ended", "ticket")

    def __init__(self, call: Call, ticket: Ticket, pool: Pool) -> None:
        self.call = call
        self.ticket = ticket
        self.ended: float | None = None
        self._pool = pool
        self._receiver: Receiver = call.receiver
        self._head: tuple[int, Headers] | None = None
        self._pieces: list[bytes] = []
        self._complete = False
        self._page: Page | None = None
        call.receiver = self

    @property
    def open(self) -> bool:
        """Whether it still stands there."""
        return self.call.receiver is self and not self.call.aborted

    def counted(self, ended: float | None) -> bool:
        """Take the prefill engine's count; tell whether leases have ended, perhaps this one."""
        if self.ended is None:
            self.ended = ended
        return ended is not None and ended != self.ended

    def dismiss(self) -> None:
        """Let the answer through."""
        call, receiver = self.call, self._receiver
        call.receiver = receiver
        if self._head is not None:
            receiver.head(*self._head)
        if self._pieces and not call.aborted:
            receiver.body(b"".join(self._pieces))
        if self._complete and not call.aborted:
            receiver.end()

    def confirm(self) -> None:
        """Take the request away from decode."""
        self.call.receiver = self._receiver
        self.call.fail(LeaseEndedError(f"a lease of {self.ticket.prefill.url} ended before decode could fetch"))

    def head(self, status: int, headers: Headers) -> None:
        """Take the head; an error needs no KV."""
        self._head = status, headers
        if status != 200:
            self.dismiss()

    def body(self, data: bytes) -> None:
        """Keep a piece back."""
        self._pieces.append(data)
        self._ask()

    def end(self) -> None:
        """Keep back that it is complete."""
        self._complete = True
        self._ask()

    def failed(self, error: UpstreamError) -> None:
        """What fails need not be right."""
        self.call.receiver = self._receiver
        self._receiver.failed(error)

    def _ask(self) -> None:
        if self._page is None:
            self._page = Page(self.ticket.prefill, self._pool, self._heard)

    def _heard(self, page: bytes | None) -> None:
        if not self.open:
            return
        if page is None or self.counted(ended_leases(page)):
            self.confirm()
        else:
            self.dismiss()


class Overdue:
    """Looks a few times in a lease; asks nobody as long as no ticket is overdue."""

    def __init__(self, loop: AbstractEventLoop, pool: Pool, ledger: Ledger, edges: Edges, lease: float) -> None:
        """Prepare.

        Args:
            loop: keeps the time.
            pool: knows which decode engine has which ticket.
            ledger: is told of tickets that are collected.
            edges: are told of handoffs that succeeded.
            lease: the prefill engines' `kv_lease_duration`, seconds.
        """
        self._loop = loop
        self._pool = pool
        self._ledger = ledger
        self._edges = edges
        self._lease = lease
        self._doubts: list[Doubt] = []
        self._pages: dict[Engine, Page] = {}
        self._counters: dict[Engine, list[float]] = {}
        self._timer: TimerHandle = loop.call_later(lease / _LOOKS, self._look)

    def _look(self) -> None:
        self._timer = self._loop.call_later(self._lease / _LOOKS, self._look)
        self._doubts = [doubt for doubt in self._doubts if doubt.open]
        known = {doubt.call for doubt in self._doubts}
        before = self._loop.time() - OVERDUE * self._lease
        for call in self._pool.perishing():
            ticket = call.perishable
            if isinstance(ticket, Ticket) and ticket.cause is None and ticket.received < before and call not in known:
                self._doubts.append(Doubt(call, ticket, self._pool))
        decodes = {doubt.call.engine for doubt in self._doubts}
        self._counters = {engine: told for engine, told in self._counters.items() if engine in decodes}
        for engine in decodes | {doubt.ticket.prefill for doubt in self._doubts}:
            if engine not in self._pages:
                self._pages[engine] = Page(engine, self._pool, partial(self._heard, engine))

    def _heard(self, engine: Engine, page: bytes | None) -> None:
        del self._pages[engine]
        if not page:
            return
        if engine.role is Role.PREFILL:
            self._counted(engine, ended_leases(page))
        elif self._has_taken_in(engine, page):
            for doubt in self._doubts:
                if doubt.call.engine is engine and doubt.open:
                    if self._ledger.settle(doubt.ticket, Cause.COLLECTED):
                        self._edges.worked(doubt.ticket.prefill, engine, None)
                    doubt.dismiss()

    def _has_taken_in(self, decode: Engine, page: bytes) -> bool:
        """Whether a decode engine has the KV of all it was sent: nothing waits, by the numbers of one that works."""
        try:
            told, waiting = counters(page), values(page, _WAITING)
        except ValueError:
            return False
        before = self._counters.get(decode)
        self._counters[decode] = told
        return bool(told and waiting) and sum(waiting) == 0 and before is not None and told != before

    def _counted(self, prefill: Engine, ended: float | None) -> None:
        lost = [
            doubt for doubt in self._doubts if doubt.ticket.prefill is prefill and doubt.open and doubt.counted(ended)
        ]
        if not lost:
            return
        _log.warning(
            "engine=%s leases may have ended of requests=%d that decode engines had queued; they are prefilled again. "
            "Heartbeats keep leases where kv_lease_duration is the same on both sides", prefill.url, len(lost),
        )  # fmt: skip
        for doubt in lost:
            doubt.confirm()

    def close(self) -> None:
        """Look no more."""
        self._timer.cancel()
        for page in self._pages.values():
            page.stop()
