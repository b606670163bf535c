"""What is known of each way from a prefill engine to a decode engine.

NIXL connects engines pair by pair, so a single way can be broken while both its ends serve others well: after a
restart, behind a network policy, with a failed adapter. Two handoffs in a row that failed or were far too slow close
the way; neither engine suffers for it. A closed way is tried by a canary (`pdrouter.handoff.canary`), never by a
client's request.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator

from pdrouter.fleet.engine import Engine

_log = logging.getLogger(__name__)
FAILURES = 2
SLOW_SECONDS = 2.5  # vLLM waits 5 s for an engine that it cannot reach, and then computes the prompt itself
SLOW_TIMES = 8.0  # as long as handoffs to the same decode engine take
_SMOOTH = 0.1
FIRST_PAUSE = 10.0
LONGEST_PAUSE = 300.0


class Edge:
    """One way. `seconds` is the mean time (recent ones count more) from a ticket to decode's first byte."""

    __slots__ = ("closed", "decode", "failures", "handoffs", "last_error", "pause", "prefill", "retry_at", "seconds")

    def __init__(self, prefill: Engine, decode: Engine) -> None:
        self.prefill = prefill
        self.decode = decode
        self.handoffs = 0
        self.failures = 0
        self.seconds = 0.0
        self.last_error = ""
        self.closed = False
        self.pause = FIRST_PAUSE
        self.retry_at = 0.0


class Edges:
    """All ways that were used, and which of them are closed."""

    def __init__(self, loop: asyncio.AbstractEventLoop, try_again: Callable[[Edge], None] | None = None) -> None:
        """Prepare.

        Args:
            loop: keeps the time.
            try_again: sends a canary over a closed way, which tells `mended` or `failed`.
        """
        self.any_closed = False
        self.try_again = try_again
        self._loop = loop
        self._edges: dict[tuple[Engine, Engine], Edge] = {}
        self._usual: dict[Engine, float] = {}

    def __iter__(self) -> Iterator[Edge]:
        return iter(self._edges.values())

    def closed(self, prefill: Engine, decode: Engine) -> bool:
        """Whether requests must not take this way."""
        edge = self._edges.get((prefill, decode))
        return edge is not None and edge.closed

    def met(self, prefill: Engine, decode: Engine) -> bool:
        """Whether the two have exchanged blocks before."""
        edge = self._edges.get((prefill, decode))
        return edge is not None and edge.handoffs > 0

    def _edge(self, prefill: Engine, decode: Engine) -> Edge:
        edge = self._edges.get((prefill, decode))
        if edge is None:
            edge = self._edges[prefill, decode] = Edge(prefill, decode)
        return edge

    def worked(self, prefill: Engine, decode: Engine, seconds: float | None) -> None:
        """A handoff succeeded; `seconds` from the ticket to decode's first byte, if that is known."""
        if prefill.gone or decode.gone:
            return  # what it had in hand ends now; nobody would forget the way again
        edge = self._edge(prefill, decode)
        edge.handoffs += 1
        if seconds is None:
            edge.failures = 0
            return
        usual = self._usual.get(decode, seconds)
        # Slow ones count too: when all ways to an engine become slow at once, it is the engine.
        self._usual[decode] = usual + _SMOOTH * (seconds - usual)
        if seconds > SLOW_SECONDS and seconds > SLOW_TIMES * usual and edge.handoffs > 1:
            self._failure(edge, f"slow: {seconds:.1f} s")
            return
        edge.seconds = edge.seconds + _SMOOTH * (seconds - edge.seconds) if edge.seconds else seconds
        edge.failures = 0

    def failed(self, prefill: Engine, decode: Engine, why: str) -> None:
        """A handoff failed although decode answers."""
        if prefill.gone or decode.gone:
            return
        self._failure(self._edge(prefill, decode), why)

    def _failure(self, edge: Edge, why: str) -> None:
        edge.failures += 1
        edge.last_error = why
        if edge.closed or edge.failures < FAILURES:
            return
        edge.closed = self.any_closed = True
        self._later(edge)
        _log.warning(
            "edge=closed prefill=%s decode=%s why=%s next_try=%gs", edge.prefill.url, edge.decode.url, why, edge.pause
        )

    def _later(self, edge: Edge) -> None:
        edge.retry_at = self._loop.time() + edge.pause
        self._loop.call_later(edge.pause, self._try, edge)

    def _try(self, edge: Edge) -> None:
        if edge.closed and self._edges.get((edge.prefill, edge.decode)) is edge and self.try_again is not None:
            self.try_again(edge)

    def still_broken(self, edge: Edge, why: str) -> None:
        """A canary failed on a closed way."""
        edge.last_error = why
        edge.pause = min(edge.pause * 2, LONGEST_PAUSE)
        self._later(edge)

    def mended(self, edge: Edge) -> None:
        """A canary came through."""
        _log.info("edge=open prefill=%s decode=%s", edge.prefill.url, edge.decode.url)
        edge.closed = False
        edge.failures = 0
        edge.pause = FIRST_PAUSE
        self.any_closed = any(one.closed for one in self._edges.values())

    def forget(self, engine: Engine) -> None:
        """The engine restarted or left: all its ways are new."""
        self._edges = {ends: edge for ends, edge in self._edges.items() if engine not in ends}
        self._usual.pop(engine, None)
        self.any_closed = any(one.closed for one in self._edges.values())
