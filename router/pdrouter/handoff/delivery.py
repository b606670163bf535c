"""The client's side of a request under way: deadline, disconnect, flow control, and settling exactly once."""

import asyncio

from pdrouter.deadlines import Deadlines
from pdrouter.handoff.client import Client
from pdrouter.handoff.desk import Desk
from pdrouter.handoff.failure import JSON_HEADERS, Failure, leg_failure
from pdrouter.handoff.pair import Served
from pdrouter.observe.record import Record

CLIENT_GONE = 499  # nginx's status for a client that left; it is only seen in logs and metrics


class Delivery:
    """Brings what engines answer to one client, and the client's absence to the engines.

    `budget` is how many seconds the client gives its request; None leaves it to the router's own limit.
    """

    def __init__(self, desk: Desk, client: Client, record: Record) -> None:
        self.client = client
        self.record = record
        self.desk = desk
        self.started = False
        self.event_stream = False
        self.settled = False
        self.admission: str | None = None
        self.budget: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._served: list[Served] = []
        self._under_way = 0

    def begin(self, *served: Served) -> None:
        """Serve as soon as there is room; at the request's deadline what is under way is broken off."""
        self.client.listener = self
        if self.budget is None:
            self.desk.deadlines.start(self)
        else:
            self._timer = self.desk.loop.call_later(self.budget, self._over)
        self._served.extend(served)
        self.desk.admission.enter(self)

    def admitted(self) -> None:
        """Start serving (`pdrouter.handoff.admission`)."""
        for one in self._served[:]:
            if not self.settled:
                self._start(one)

    def turned_away(self, why: str, retry_after: int) -> None:
        """Tell the client to come back (`pdrouter.handoff.admission`)."""
        headers = b"retry-after: %d\r\n" % retry_after
        self.fail(leg_failure(429, "router", "overload", f"{why}; try again in {retry_after} s.", headers))

    def add(self, served: Served) -> None:
        """Start serving one part more."""
        self._served.append(served)
        self._start(served)

    def _start(self, served: Served) -> None:
        self._under_way += 1
        self.desk.retries.began()
        served.start()

    def part_over(self) -> None:
        """One of several parts has ended; the others go on."""
        self._under_way -= 1
        self.desk.retries.ended(1)

    def expired(self, deadlines: Deadlines) -> None:
        """Break off what is under way (`pdrouter.deadlines`)."""
        admission = self.desk.admission
        if deadlines is admission.deadlines:
            self.turned_away(
                f"The request waited {deadlines.seconds:g} s in the router's queue", admission.retry_after()
            )
            return
        self._too_long(deadlines.seconds)

    def _over(self) -> None:
        self._timer = None
        if self.budget is not None:
            self._too_long(self.budget)

    def _too_long(self, seconds: float) -> None:
        self.fail(leg_failure(504, "router", "timeout", f"The request took longer than {seconds:g} s."))

    def settle(self, status: int) -> None:
        """Record the end. Only the first call counts."""
        if self.settled:
            return
        self.settled = True
        self.client.listener = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        else:
            self.desk.deadlines.stop(self)
        self.desk.admission.leave(self)
        self.desk.retries.ended(self._under_way)
        self._under_way = 0
        self._served.clear()
        self.desk.waiting.wake()
        self.record.status = status
        self.desk.observer.finished(self.record)

    def fail(self, failure: Failure) -> None:
        """Tell the client that there will be no (complete) answer, and break off what is under way."""
        if self.settled:
            return
        served = self._served[:]
        self.record.error(failure.leg, failure.reason)
        self.settle(failure.status)
        for one in served:
            one.abort()
        if not self.started:
            self.client.respond(failure.status, failure.body, JSON_HEADERS + failure.headers)
            return
        if self.event_stream:
            self.client.write(b"data: %b\n\n" % failure.body)
        self.client.break_off()

    def client_gone(self) -> None:
        """Abort every leg at once."""
        if self.settled:
            return
        served = self._served[:]
        self.record.error("router", "client_gone")
        self.settle(CLIENT_GONE)
        for one in served:
            one.abort()

    def client_slow(self) -> None:
        """Let the engines wait too, so that nothing piles up here."""
        for one in self._served:
            one.pause()

    def client_ready(self) -> None:
        """Go on."""
        for one in self._served:
            one.resume()
