"""Account of every ticket: from a prefill's answer until its blocks are free again, settled exactly once.

Blocks of a finished prefill fill the prefill engine's KV cache without being counted as its load, so what is pinned
is counted here, and of the prefill engines one with room is asked (`pdrouter.handoff.desk`). A ticket that nobody can
give back stays in the account until its lease is over, as its blocks do.
"""

import asyncio
from collections import defaultdict

from pdrouter.deadlines import Deadlines
from pdrouter.fleet.engine import Engine
from pdrouter.fleet.rows import Rows
from pdrouter.handoff.ticket import Cause, Ticket


class Ledger:
    """All open tickets of one router process. Times are seconds."""

    def __init__(self, loop: asyncio.AbstractEventLoop, lease: float, rows: Rows | None) -> None:
        """Prepare.

        Args:
            loop: keeps the time.
            lease: the prefill engines' `kv_lease_duration`.
            rows: where other worker processes see what is pinned.
        """
        self.ended: dict[tuple[str, Cause], int] = defaultdict(int)
        self._leases = Deadlines(loop, lease)
        self._rows = rows
        self._open: dict[Engine, dict[Ticket, None]] = {}
        self._lives: dict[Engine, str] = {}

    def __len__(self) -> int:
        return sum(map(len, self._open.values()))

    def tickets(self, engine: Engine) -> tuple[int, int]:
        """Count an engine's open tickets: those still here, and those that a decode engine has."""
        held = self._open.get(engine)
        if not held:
            return 0, 0
        handed = sum(1 for ticket in held if ticket.handed)
        return len(held) - handed, handed

    def issued(self, ticket: Ticket, tokens: int) -> bool:
        """Take up a new ticket; tell whether its engine is another process than the one of the ticket before.

        Args:
            ticket: what a prefill engine gave; another id than its last one's tells that the engine restarted.
            tokens: prompt tokens that it pins, where the engine told neither its blocks' size nor the tokens.
        """
        engine = ticket.prefill
        life = self._lives.get(engine)
        if life != ticket.life and not engine.gone:  # no life is known of one that left, and none is to be kept
            self.void(engine)
            self._lives[engine] = ticket.life
        ticket.over = self.lease_over
        ticket.tokens = ticket.blocks * engine.block_size or ticket.prompt_tokens or tokens
        held = self._open.get(engine)
        if held is None:
            held = self._open[engine] = {}
        held[ticket] = None
        self._leases.start(ticket)
        engine.own_pinned += ticket.tokens
        if self._rows is not None:
            self._rows.changed(engine)
        return life is not None and life != ticket.life

    def settle(self, ticket: Ticket, cause: Cause) -> bool:
        """Close a ticket; tell whether it was open. Only the first call counts."""
        if ticket.cause is not None or ticket.over is None:
            return False
        ticket.cause = cause
        ticket.annul()
        self._leases.stop(ticket)
        engine = ticket.prefill
        held = self._open[engine]
        del held[ticket]
        if not held:
            del self._open[engine]
        engine.own_pinned -= ticket.tokens
        self.ended[engine.url, cause] += 1
        if self._rows is not None:
            self._rows.changed(engine)
        return True

    def lease_over(self, ticket: Ticket) -> None:
        """Close a ticket whose lease has ended; a decode engine that has it prolongs the lease by its heartbeats."""
        if ticket.handed:
            self._leases.start(ticket)
        else:
            self.settle(ticket, Cause.EXPIRED)

    def void(self, engine: Engine) -> None:
        """Close all tickets of an engine that restarted or is gone."""
        self._lives.pop(engine, None)
        for ticket in list(self._open.get(engine, ())):
            self.settle(ticket, Cause.VOID)
