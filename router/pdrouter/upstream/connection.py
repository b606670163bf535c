"""One HTTP/1.1 connection to an engine."""

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol, cast

import httptools

from pdrouter.fleet.engine import Engine
from pdrouter.outbox import Outbox
from pdrouter.upstream.errors import ClosedError, DeadEndError, MalformedError, RouterFailureError, UpstreamError

if TYPE_CHECKING:
    from pdrouter.upstream.pool import Call

_log = logging.getLogger(__name__)

Headers = list[tuple[bytes, bytes]]
_FRAMING = frozenset((b"content-length", b"transfer-encoding"))
_BODILESS = frozenset((204, 304))
_BUG = "a request failed in the router itself; please report this"


class Receiver(Protocol):
    """Gets an engine's answer: `head`, any number of `body`, then `end`; or `failed` at any point, as the last call."""

    def head(self, status: int, headers: Headers) -> None:
        """Take the status and the headers (lower-case names)."""

    def body(self, data: bytes) -> None:
        """Take all body bytes that one read from the socket gave."""

    def end(self) -> None:
        """The answer is complete."""

    def failed(self, error: UpstreamError) -> None:
        """There will be no (further) answer; after a `DeadEndError` nothing may be tried."""


def note_own_failure() -> None:
    """Log that the router itself failed on a request; to be called where that exception is caught."""
    _log.exception(_BUG)


def tell_failure(receiver: Receiver, error: UpstreamError) -> None:
    """Tell a receiver that there is no (further) answer.

    What goes wrong with that in the router itself ends the request, which would hang otherwise, and nothing else: who
    calls this has other requests and engines to look after.
    """
    try:
        receiver.failed(error)
    except Exception:
        note_own_failure()
        try:
            receiver.failed(DeadEndError("the router failed on an engine's failure; its log tells why"))
        except Exception:
            note_own_failure()


def tell_own_failure(receiver: Receiver) -> None:
    """Tell a receiver that the router itself failed on its answer; to be called where that exception is caught."""
    note_own_failure()
    tell_failure(receiver, RouterFailureError("the router failed on the engine's answer; its log tells why"))


class EngineConnection:
    """Carries one call at a time; goes back to its pool after each.

    An `asyncio.Protocol` by its methods alone: a class with a base in Python could not be compiled (`setup.py`).
    """

    __slots__ = (
        "_call", "_complete", "_headers", "_keep", "_out", "_parser", "_pieces", "_pool", "_status", "_transport",
        "_until_close", "engine", "idle_since", "paused",
    )  # fmt: skip

    def __init__(self, engine: Engine, pool: "Idle") -> None:
        self.engine = engine
        self.idle_since = 0.0
        self.paused = False
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._call: Call | None = None
        self._out = b""
        self._status = 0
        self._headers: Headers = []
        self._pieces: list[bytes] = []
        self._complete = False
        self._keep = False
        self._until_close = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport (asyncio)."""
        self._transport = cast(asyncio.Transport, transport)

    def send(self, call: "Call", request: bytes) -> None:
        """Send a request at the end of the loop's turn; its answer goes to the call."""
        self._call = call
        self._out = request
        self._pool.outbox.add(self)

    def flush(self) -> None:
        """Write the request (`pdrouter.outbox`)."""
        out, self._out = self._out, b""
        if out and self._transport is not None and not self._transport.is_closing():
            self._transport.write(out)

    def pause(self) -> None:
        """Read no more until `resume`, so that the engine has to wait too."""
        self.paused = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        self.paused = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close at once; the engine sees its client go and aborts the request."""
        self._call = None
        self._out = b""
        if self._transport is not None:
            self._transport.abort()

    def closing(self) -> bool:
        """Whether it can carry nothing more."""
        return self._transport is None or self._transport.is_closing()

    # httptools callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Pass on the head."""
        self._status = status = self._parser.get_status_code()
        headers, self._headers = self._headers, []
        if status < 200:
            return
        self._until_close = status not in _BODILESS
        for name, _ in headers:
            if name in _FRAMING:
                self._until_close = False
                break
        call = self._call
        if call is not None:
            call.computed()
            call.receiver.head(status, headers)

    def on_body(self, data: bytes) -> None:
        """Collect a piece; pieces of one read are passed on together."""
        self._pieces.append(data)

    def on_message_complete(self) -> None:
        """Note the end; `data_received` acts on it once the parser has returned and has forgotten this message."""
        if self._headers:
            self._headers = []  # trailers, which are nobody's: the next answer must not begin with them
        if self._status >= 200:
            self._complete = True
            self._keep = self._parser.should_keep_alive() and not self._until_close

    # asyncio callbacks

    def data_received(self, data: bytes) -> None:
        """Parse and pass on (asyncio); what goes wrong in the router itself fails the request instead of hanging it."""
        call = self._call
        engine = self.engine
        engine.heard += 1
        if call is None:
            self.abort()  # bytes that nobody asked for
            return
        if call.counted:
            engine.worked += 1
        try:
            self._receive(data)
        except Exception:
            self.abort()
            call.over()
            tell_own_failure(call.receiver)

    def _receive(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise  # ours, not the engine's
        except httptools.HttpParserError as error:
            self._fail(MalformedError(f"the answer of {self.engine.url} is not HTTP/1.1: {error}"))
            return
        pieces = self._pieces
        if pieces and self._call is not None:
            whole = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            self._call.receiver.body(whole)
        if self._complete:
            self._finish()

    def _finish(self) -> None:
        call, self._call = self._call, None
        self._complete = False
        if call is None:
            return
        # The pool first: the next leg, started by `end`, may want this very connection.
        if self._keep:
            self._pool.put(self)
        elif self._transport is not None:
            self._transport.close()
        call.over()
        call.receiver.end()

    def _fail(self, error: UpstreamError) -> None:
        call = self._call
        self.abort()
        if call is not None:
            call.lost(error)

    def eof_received(self) -> None:
        """The engine will send no more: close (asyncio)."""

    def pause_writing(self) -> None:
        """A long request fills the socket's buffer (asyncio); it is in memory in any case."""

    def resume_writing(self) -> None:
        """The buffer has room again (asyncio)."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the call, if one is open (asyncio)."""
        self._pool.drop(self)
        self._transport = None
        if self._call is None:
            return
        if self._until_close and exc is None and self._call.began:
            call, self._call = self._call, None
            call.over()
            try:
                call.receiver.end()
            except Exception:  # as in `data_received`
                tell_own_failure(call.receiver)
            return
        why = f": {exc}" if exc else ""
        self._fail(ClosedError(f"{self.engine.url} closed the connection before its answer was complete{why}"))


class Idle(Protocol):
    """Where connections go between calls."""

    outbox: Outbox

    def put(self, connection: EngineConnection) -> None:
        """Take a connection that may carry another call."""

    def drop(self, connection: EngineConnection) -> None:
        """Forget a connection that is closed."""
