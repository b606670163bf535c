"""How many requests may be tried again, so that trying again never makes an outage worse."""

import asyncio

SHARE = 0.2  # of requests, as in Finagle and Envoy
ALWAYS = 10.0  # tries a second that need no traffic: a router with little to do may try too
RESERVE = 100.0  # tries that may be saved up
EACH = 3  # tries for one request that got nowhere: it may be the request that breaks engines


class RetryBudget:
    """Every request adds a share of a try; each further try takes a whole one.

    When an engine dies each of its requests needs a try at once, whatever was saved up before. So failures may also
    owe tries, as many as there are requests under way. What is owed is paid by what later requests add and by time:
    in an outage that lasts the requests under way are tried once more, and from then on no more often than a share.

    A prompt of a batch counts as a request, for it takes a try of its own.
    """

    __slots__ = ("_at", "_loop", "_owed", "_saved", "refused", "spent", "under_way")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.spent = 0
        self.refused = 0
        self.under_way = 0
        self._loop = loop
        self._saved = RESERVE
        self._owed = 0.0
        self._at = loop.time()

    def began(self) -> None:
        """A request is under way."""
        self.under_way += 1
        self._add(SHARE)

    def ended(self, requests: int) -> None:
        """Some requests are no longer under way."""
        self.under_way -= requests

    def _add(self, tries: float) -> None:
        self._saved = min(self._saved + tries, RESERVE)
        self._owed = max(self._owed - tries, 0.0)

    def spend(self, owing: bool = True) -> bool:
        """Take a try, if there is one.

        Args:
            owing: whether it may be owed. A try that no failure asks for may not: requests that are slow, but served,
                must not be doubled.
        """
        now = self._loop.time()
        self._add(ALWAYS * (now - self._at))
        self._at = now
        if self._saved >= 1:
            self._saved -= 1
        elif not owing or self._owed >= self.under_way:
            self.refused += 1
            return False
        if owing:
            self._owed += 1  # also where it was saved, so that both together are no more than the requests under way
        self.spent += 1
        return True
