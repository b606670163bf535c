"""A short prompt now and then, to see whether KV blocks come over whole.

Wrong blocks give wrong text with status 200, and no engine complains. A canary goes over one way (prefill engine,
decode engine) and is then computed by that decode engine alone; the first token's log-probabilities must be about the
same. They are compared and not the text, for two runs of one engine may differ where two tokens are nearly as likely.
Canaries also try ways that were closed (`pdrouter.handoff.edges`).
"""

import asyncio
import logging
import secrets
from collections import defaultdict
from typing import Any

import orjson

from pdrouter.fleet.engine import Engine, Role
from pdrouter.handoff.desk import Desk
from pdrouter.handoff.edges import SLOW_SECONDS, Edge
from pdrouter.handoff.ticket import Cause, Ticket, TicketError, read_ticket
from pdrouter.handoff.way import own_request
from pdrouter.openai.legs import decode_leg, prefill_leg
from pdrouter.upstream.connection import Headers
from pdrouter.upstream.errors import UpstreamError

_log = logging.getLogger(__name__)
_TIMEOUT = 10.0
_MOST_APART = 0.5  # of log-probabilities; bf16 kernels differ by some hundredths, foreign blocks by several units


class CanaryError(Exception):
    """A canary got no answer; the message says why."""


class _Answer:
    """One engine's answer, awaited."""

    def __init__(self, future: "asyncio.Future[tuple[int, bytes]]") -> None:
        self._future = future
        self._status = 0
        self._pieces: list[bytes] = []

    def head(self, status: int, headers: Headers) -> None:
        """Take the status."""
        self._status = status

    def body(self, data: bytes) -> None:
        """Take a piece."""
        self._pieces.append(data)

    def end(self) -> None:
        """Give it."""
        if not self._future.done():
            self._future.set_result((self._status, b"".join(self._pieces)))

    def failed(self, error: UpstreamError) -> None:
        """Give the failure."""
        if not self._future.done():
            self._future.set_exception(CanaryError(str(error)))


def _likely(answer: bytes) -> dict[str, float]:
    """Read the first token's log-probabilities."""
    try:
        told = orjson.loads(answer)["choices"][0]["logprobs"]["top_logprobs"][0].items()
        likely = {str(token): float(value) for token, value in told}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        likely = {}
    if not likely:
        raise CanaryError("the answer has no log-probabilities")
    return likely


def alike(one: dict[str, float], other: dict[str, float]) -> bool:
    """Whether two engines think the same tokens likely: the likeliest of each is about as likely to the other."""
    for told, against in ((one, other), (other, one)):
        token = max(told, key=lambda name: told[name])
        if token not in against or abs(told[token] - against[token]) > _MOST_APART:
            return False
    return True


class Canary:
    """Sends canaries. Times are seconds."""

    def __init__(self, desk: Desk, interval: float, authorization: bytes) -> None:
        """Prepare.

        Args:
            desk: knows engines, ways and tickets.
            interval: between canaries; 0 sends them only over closed ways.
            authorization: an encoded header line that engines want to see, or nothing.
        """
        self.outcomes: dict[str, int] = defaultdict(int)
        self._differing: set[tuple[Engine, Engine]] = set()
        self._desk = desk
        self._interval = interval
        self._authorization = authorization
        self._turn = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        desk.edges.try_again = self.try_edge

    def differing(self) -> list[tuple[str, str]]:
        """Give the ways over which the last canary came out different, as URLs; not those of engines that left."""
        self._differing = {ends for ends in self._differing if not (ends[0].gone or ends[1].gone)}
        return [(prefill.url, decode.url) for prefill, decode in self._differing]

    def start(self) -> None:
        """Begin, if there is an interval."""
        if self._interval > 0:
            self._timer = self._desk.loop.call_later(self._interval, self._next)

    def close(self) -> None:
        """Send no more."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()

    def _next(self) -> None:
        fleet = self._desk.fleet
        pairs = [(one, two) for one in fleet.healthy(Role.PREFILL) for two in fleet.healthy(Role.DECODE)]
        pairs = [pair for pair in pairs if self._desk.fits(*pair)]
        if pairs:
            self._turn += 1
            self._spawn(self._compare(*pairs[self._turn % len(pairs)]))
        self._timer = self._desk.loop.call_later(self._interval, self._next)

    def _spawn(self, work: Any) -> None:
        task = self._desk.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def try_edge(self, edge: Edge) -> None:
        """See whether a closed way is open again."""
        self._spawn(self._try(edge))

    async def _try(self, edge: Edge) -> None:
        edges = self._desk.edges
        began = self._desk.loop.time()
        try:
            await self._over(edge.prefill, edge.decode, self._body(edge.decode))
        except CanaryError as error:
            edges.still_broken(edge, str(error))
            return
        took = self._desk.loop.time() - began
        if took > SLOW_SECONDS:
            edges.still_broken(edge, f"slow: {took:.1f} s")
        else:
            edges.mended(edge)

    async def _compare(self, prefill: Engine, decode: Engine) -> None:
        body = self._body(decode)
        try:
            told = _likely(await self._over(prefill, decode, body))
            alone = _likely(await self._ask(decode, orjson.dumps(body | {"cache_salt": secrets.token_hex(8)})))
        except CanaryError as error:
            self.outcomes["failed"] += 1
            _log.warning("canary=failed prefill=%s decode=%s why=%s", prefill.url, decode.url, error)
            return
        if alike(told, alone):
            self.outcomes["alike"] += 1
            self._differing.discard((prefill, decode))
        else:
            self.outcomes["differs"] += 1
            self._differing.add((prefill, decode))
            _log.error(
                "canary=differs prefill=%s decode=%s handed_over=%s alone=%s", prefill.url, decode.url, told, alone
            )

    @staticmethod
    def _body(decode: Engine) -> dict[str, Any]:
        # A prompt never seen before: one that decode has cached would not be fetched.
        words = " ".join(secrets.token_hex(2) for _ in range(48))
        told: dict[str, Any] = {"prompt": f"Canary {words}", "max_tokens": 1, "temperature": 0, "logprobs": 5}
        return told | ({"model": decode.model} if decode.model else {})

    async def _over(self, prefill: Engine, decode: Engine, body: dict[str, Any]) -> bytes:
        desk = self._desk
        asked = desk.loop.time()
        answer = await self._ask(prefill, prefill_leg(body))
        try:
            came = desk.pool.arrivals.earliest(asked)
            ticket = read_ticket(answer, prefill, decode, body.get("model"), came, desk.lease)
        except TicketError as error:
            raise CanaryError(f"{prefill.url} gave no usable ticket: {error}") from None
        desk.issued(ticket, 0)
        ticket.handed = True
        try:
            told = await self._ask(decode, decode_leg(orjson.dumps(body), ticket.params), ticket)
        except CanaryError:
            desk.release.give_back(ticket, body.get("model"), Cause.LOST)
            raise
        desk.ledger.settle(ticket, Cause.COLLECTED)
        return told

    async def _ask(self, engine: Engine, body: bytes, ticket: Ticket | None = None) -> bytes:
        request = own_request(engine, body, self._authorization)
        future: asyncio.Future[tuple[int, bytes]] = self._desk.loop.create_future()
        call = self._desk.pool.call(engine, request, _Answer(future), perishable=ticket, counted=False)
        try:
            async with asyncio.timeout(_TIMEOUT):
                status, answer = await future
        except TimeoutError:
            call.abort()
            raise CanaryError(f"{engine.url} did not answer within {_TIMEOUT:g} s") from None
        if status != 200:
            raise CanaryError(f"{engine.url} answered {status}")
        return answer
