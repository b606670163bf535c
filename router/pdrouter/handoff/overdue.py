"""Tickets that a decode engine has had for most of a lease without beginning to answer: most often it is full.

vLLM's decode engines keep the leases of what waits in their queue by heartbeats. Where these fail (a
`kv_lease_duration` on decode of more than four times prefill's, lost notifications), the lease ends, and the decode
engine fetches whatever the blocks hold by then: status 200 and wrong text, also for later prompts that begin alike.
Nobody is told which lease ended, but prefill engines count them. So while a ticket is overdue that count is looked at;
when it grows, the request is taken away from decode before it may fetch (`LeaseEndedError`). What decode has begun to
answer by then is kept back until a count that was asked for afterwards tells that no lease had ended.

An answer in one piece is silent long after its blocks were fetched. Once a working decode engine has nothing waiting,
the next count decides.
"""

import logging
from asyncio import AbstractEventLoop, TimerHandle
from functools import partial

from pdrouter.fleet.engine import Engine
from pdrouter.fleet.page import Page
from pdrouter.fleet.pulse import counters
from pdrouter.fleet.scrape import values
from pdrouter.handoff.ticket import MARGIN, Ticket
from pdrouter.upstream.connection import Headers, Receiver, tell_own_failure
from pdrouter.upstream.errors import LeaseEndedError, UpstreamError
from pdrouter.upstream.pool import Call, Pool

_log = logging.getLogger(__name__)
OVERDUE = 0.6  # of a lease: time for a first count, and for a second try at it, before the lease can have ended
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

    `ready` tells that the next count decides: decode has begun to answer, or has fetched.
    """

    __slots__ = (
        "_blind", "_complete", "_due", "_ended", "_head", "_overdue", "_pieces", "_receiver", "call", "ready", "ticket"
    )  # fmt: skip

    def __init__(self, call: Call, ticket: Ticket, overdue: "Overdue") -> None:
        self.call = call
        self.ticket = ticket
        self.ready = False
        self._due = ticket.received + overdue.lease * (1 - MARGIN)
        self._ended: float | None = None  # the prefill engine's count when this lease had not ended
        self._blind = False  # it does not count
        self._overdue = overdue
        self._receiver: Receiver = call.receiver
        self._head: tuple[int, Headers] | None = None
        self._pieces: list[bytes] = []
        self._complete = False
        call.receiver = self

    @property
    def open(self) -> bool:
        """Whether it still stands there."""
        return self.call.receiver is self and not self.call.aborted

    def holds(self, page: bytes | None, now: float) -> bool:
        """Judge whether the lease had certainly not ended when a page was asked for.

        Args:
            page: of the prefill engine; None where it has not answered.
            now: loop time at which it came.
        """
        ended = ended_leases(page) if page else None
        if self._ended is not None:
            return ended == self._ended
        if now > self._due:
            return self._blind
        self._ended = ended
        self._blind = page is not None and ended is None
        return True

    def withdraw(self) -> None:
        """Stand there no more."""
        if self.call.receiver is self:
            self.call.receiver = self._receiver
        self._head = None
        self._pieces.clear()

    def dismiss(self) -> None:
        """Let the answer through."""
        call, receiver = self.call, self._receiver
        head, whole = self._head, b"".join(self._pieces)
        self.ticket.fetched = True
        self.withdraw()
        try:
            if head is not None:
                receiver.head(*head)
            if whole and not call.aborted:
                receiver.body(whole)
            if self._complete and not call.aborted:
                receiver.end()
        except Exception:  # as where answers are read (`pdrouter.upstream.connection`): the request must not hang
            call.abort()
            tell_own_failure(receiver)

    def confirm(self) -> None:
        """Take the request away from decode, which may have fetched and cached what it should not."""
        self.withdraw()
        self._overdue.pool.suspect(self.call.engine)
        self.call.fail(
            LeaseEndedError(f"a lease of {self.ticket.prefill.url} may have ended before decode could fetch")
        )

    def head(self, status: int, headers: Headers) -> None:
        """Take the head; an error needs no KV."""
        self._head = status, headers
        if status != 200:
            self.dismiss()

    def body(self, data: bytes) -> None:
        """Keep a piece back."""
        self._pieces.append(data)
        self._answered()

    def end(self) -> None:
        """Keep back that it is complete."""
        self._complete = True
        self._answered()

    def _answered(self) -> None:
        if not self.ready:
            self.ready = True
            self._overdue.judge(self)

    def failed(self, error: UpstreamError) -> None:
        """What fails need not be right."""
        self.withdraw()
        self._receiver.failed(error)


class Overdue:
    """Looks a few times in a lease; asks nobody as long as no ticket is overdue."""

    def __init__(self, loop: AbstractEventLoop, pool: Pool, lease: float) -> None:
        """Prepare.

        Args:
            loop: keeps the time.
            pool: knows which decode engine has which ticket.
            lease: the prefill engines' `kv_lease_duration`, seconds.
        """
        self.lease = lease
        self._loop = loop
        self.pool = pool
        self._doubts: list[Doubt] = []
        self._unjudged: dict[Engine, dict[Doubt, None]] = {}
        self._pages: dict[Engine, Page] = {}
        self._counters: dict[Engine, list[float]] = {}
        self._timer: TimerHandle = loop.call_later(lease / _LOOKS, self._look)

    def _look(self) -> None:
        self._timer = self._loop.call_later(self.lease / _LOOKS, self._look)
        doubts, self._doubts = self._doubts, []
        for doubt in doubts:
            if doubt.open:
                self._doubts.append(doubt)
            else:
                doubt.withdraw()
        known = {doubt.call for doubt in self._doubts}
        before = self._loop.time() - OVERDUE * self.lease
        for call in self.pool.perishing():
            ticket = call.perishable
            if isinstance(ticket, Ticket) and not ticket.fetched and ticket.received < before and call not in known:
                self._doubts.append(Doubt(call, ticket, self))
        decodes = {doubt.call.engine for doubt in self._doubts}
        self._counters = {engine: told for engine, told in self._counters.items() if engine in decodes}
        for decode in decodes:
            if decode not in self._pages:
                self._pages[decode] = Page(decode, self.pool, partial(self._heard_of_decode, decode))
        for doubt in self._doubts:
            self.judge(doubt)

    def judge(self, doubt: Doubt) -> None:
        """Have a doubt judged by a page that is asked for from now on; one page of an engine serves many."""
        prefill = doubt.ticket.prefill
        self._unjudged.setdefault(prefill, {})[doubt] = None
        if prefill not in self._pages:
            self._ask(prefill)

    def _ask(self, prefill: Engine) -> None:
        doubts = [(doubt, doubt.ready) for doubt in self._unjudged.pop(prefill)]
        self._pages[prefill] = Page(prefill, self.pool, partial(self._heard_of_prefill, prefill, doubts))

    def _heard_of_prefill(self, prefill: Engine, doubts: list[tuple[Doubt, bool]], page: bytes | None) -> None:
        self._pages.pop(prefill, None)
        now = self._loop.time()
        ended = 0
        for doubt, decides in doubts:
            if not doubt.open or (page is None and not decides):
                continue
            if not doubt.holds(page, now):
                ended += 1
                doubt.confirm()
            elif decides:
                doubt.dismiss()
        if ended:
            _log.warning(
                "engine=%s leases may have ended of requests=%d that decode engines had queued; they are served anew. "
                "Heartbeats keep leases where kv_lease_duration is the same on both sides", prefill.url, ended,
            )  # fmt: skip
        if prefill in self._unjudged and prefill not in self._pages:
            self._ask(prefill)

    def _heard_of_decode(self, decode: Engine, page: bytes | None) -> None:
        self._pages.pop(decode, None)
        if page and self._has_taken_in(decode, page):
            for doubt in self._doubts:
                if doubt.call.engine is decode and doubt.open:
                    doubt.ready = True
                    self.judge(doubt)

    def _has_taken_in(self, decode: Engine, page: bytes) -> bool:
        """Whether a decode engine has the KV of all it was sent: nothing waits, by the numbers of one that works."""
        try:
            told, waiting = counters(page), values(page, _WAITING)
        except ValueError:
            return False
        before = self._counters.get(decode)
        self._counters[decode] = told
        return bool(told and waiting) and sum(waiting) == 0 and before is not None and told != before

    def close(self) -> None:
        """Look no more."""
        self._timer.cancel()
        for page in self._pages.values():
            page.stop()
