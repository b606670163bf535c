"""How many requests may be tried again, so that trying again never makes an outage worse."""

import asyncio

SHARE = 0.2  # of requests, as in Finagle and Envoy
ALWAYS = 10.0  # tries a second that need no traffic: a router with little to do may try too
RESERVE = 100.0  # tries that may be saved up
EACH = 3  # tries for one request that got nowhere: it may be the request that breaks engines


class RetryBudget:
    """Every request adds a share of a try; each further try takes a whole one.

    What is saved up is bounded by `RESERVE` or by the requests under way, whichever is more, for when an engine dies
    each of its requests needs a try at once.
    """

    __slots__ = ("_at", "_loop", "_saved", "refused", "spent")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.spent = 0
        self.refused = 0
        self._loop = loop
        self._saved = RESERVE
        self._at = loop.time()

    def earn(self) -> None:
        """A request came."""
        self._saved += SHARE

    def spend(self, under_way: int) -> bool:
        """Take a try, if there is one; `under_way` counts requests."""
        now = self._loop.time()
        most = max(RESERVE, under_way)
        self._saved = min(self._saved + ALWAYS * (now - self._at), most)
        self._at = now
        if self._saved < 1:
            self.refused += 1
            return False
        self._saved -= 1
        self.spent += 1
        return True
