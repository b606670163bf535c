"""One HTTP/1.1 connection of a client.

Requests that a client sends ahead (pipelining) are answered in order, one at a time; while one waits, or while the
client does not take its answers, no more is read. What llhttp accepts and RFC 9112 does not is refused here.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol, cast

import httptools

from pdrouter.deadlines import Deadlines
from pdrouter.openai.errors import error_body
from pdrouter.outbox import Outbox
from pdrouter.server.head import head_too_large, judge, too_large
from pdrouter.server.limits import Limits
from pdrouter.server.request import ClientRequest, status_line

_log = logging.getLogger(__name__)
_LINGER = 2.0
_LINGERING = 64  # connections beyond the limit that are kept until their client has read why they end
_JSON = b"content-type: application/json\r\n"
_SMALL = 65536  # bytes of a body that are read from anybody and counted nowhere
_PIECES = 1024  # pieces of a body that are kept apart: an object for each tiny chunk takes many times its bytes
_SLICE = 4096  # bytes beside a body that are parsed at once
_TURN = 256  # what a connection may cost in a turn of the loop: a piece of a body is 1
_REQUEST = 8  # what a request costs
_GATHERED = 65536  # bytes that are gathered before they are written: an engine may send megabytes in a turn
_FAILED = "The router failed on this request; its log tells why."
_REFUSAL_HEADERS = {401: b"www-authenticate: Bearer\r\n", 429: b"retry-after: 1\r\n", 503: b"retry-after: 1\r\n"}


class Owner(Protocol):
    """Who accepted a connection."""

    limits: Limits
    draining: bool
    outbox: Outbox
    # Bytes of larger bodies that are held now, of all connections; connections open beyond the limits.
    held: int
    turned_away: int
    # Who may take how long: between requests, to send a head, between two pieces of a body, to take its answer.
    idle: Deadlines
    head: Deadlines
    body: Deadlines
    write: Deadlines

    def joined(self, connection: "ClientConnection", client: str) -> bool:
        """A connection is open; tell whether it may stay."""

    def left(self, connection: "ClientConnection", client: str) -> None:
        """A connection is closed."""

    def refused(self, status: int) -> None:
        """A request was refused before it was complete."""

    def fell_behind(self, connection: "ClientConnection", waiting: int) -> None:
        """A client does not keep up, and so many bytes wait for it."""

    def caught_up(self, connection: "ClientConnection") -> None:
        """A client keeps up again, or is gone; nothing happens when it kept up."""

    def unwelcome(self, request: ClientRequest) -> tuple[int, str] | None:
        """Say with which status and why a larger body is not worth reading, or None; the head is complete."""


def _closes(headers: list[tuple[bytes, bytes]]) -> bool:
    """Tell whether a connection shall be closed; of an HTTP/1.0 request llhttp prefers `keep-alive` (RFC 9112 9.3)."""
    return any(name == b"connection" and b"close" in value.lower() for name, value in headers)


class ClientConnection:
    """Parses requests, hands them to a handler one at a time, writes answers.

    An `asyncio.Protocol` by its methods alone: a class with a base in Python could not be compiled (`setup.py`).
    """

    __slots__ = (
        "_closing", "_completed", "_current", "_discarding", "_feeding", "_gathered", "_handler", "_head_size",
        "_host", "_out", "_outbox", "_parser", "_paused", "_receiving", "_refusal", "_rest", "_slow",
        "_transport", "_unparsed", "_upgrading", "_waiting", "_watch", "_work", "client", "owner",
    )  # fmt: skip

    def __init__(self, owner: Owner, handler: Callable[[ClientRequest], None]) -> None:
        self.owner = owner
        self.client = ""
        self._handler = handler
        self._outbox = owner.outbox
        self._out: list[bytes] = []
        self._closing = False
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._receiving: ClientRequest | None = None
        self._current: ClientRequest | None = None
        self._waiting: deque[ClientRequest] | None = None
        self._watch: Deadlines | None = None
        self._head_size = 0
        self._host = b""
        self._unparsed = 0
        self._completed = False
        self._upgrading = False
        self._refusal: tuple[int, str] | None = None
        self._discarding = False
        self._paused = False
        self._slow = False
        self._feeding = False
        self._work = 0
        self._gathered = 0
        self._rest = b""

    # towards requests

    def send(self, data: bytes) -> None:
        """Write bytes at the end of the loop's turn."""
        out = self._out
        if not out:
            self._outbox.add(self)
            self._gathered = 0
        out.append(data)
        self._gathered += len(data)
        if self._gathered > _GATHERED:
            self.flush()

    def flush(self) -> None:
        """Write what was gathered (`pdrouter.outbox`)."""
        transport = self._transport
        out, self._out = self._out, []
        if transport is None or transport.is_closing():
            return
        if len(out) == 1:
            transport.write(out[0])
        elif out:
            transport.writelines(out)
        if self._closing:
            self._finish(transport)

    def answered(self, request: ClientRequest) -> None:
        """A request is done: close, or take the next."""
        if request is not self._current:
            return
        request.listener = None
        self._current = None
        if request.held:
            self._release(request)
        if not request.keep_alive:
            self.close()
        else:
            self._proceed()

    def _proceed(self) -> None:
        """Go on, now that no request is under way."""
        if self._feeding or self._closing or self._discarding:
            return
        if self._slow:
            self._stop_reading()  # answers that are not taken must not pile up; `resume_writing` comes back here
        elif self._waiting:
            # Not from within the answer that just ended: a client that sends thousands ahead must not nest as many.
            asyncio.get_running_loop().call_soon(self._next)
        elif self._refusal is not None:
            self._refuse(*self._refusal)
        elif self._rest:
            asyncio.get_running_loop().call_soon(self._feed_rest)
        elif self._receiving is not None or self._paused:
            self._go_on()
        elif self._watch is self.owner.idle:
            self.owner.idle.start(self)
        else:
            self._wait(self.owner.idle)

    def _next(self) -> None:
        if self._current is None and self._waiting and self._transport is not None and not self._slow:
            self._take(self._waiting.popleft())
            self._read_on()

    def _stop_reading(self) -> None:
        if not self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def _read_on(self) -> None:
        if self._paused and not (self._waiting or self._slow or self._rest):
            self._paused = False
            if self._transport is not None and not self._transport.is_closing():
                self._transport.resume_reading()

    def _release(self, request: ClientRequest) -> None:
        self.owner.held -= request.held
        request.held = 0

    def _go_on(self) -> None:
        if self._receiving is not None:
            self._continue(self._receiving)
        self._read_on()
        self._wait_for_client()

    def close(self) -> None:
        """Close once everything written is sent."""
        self._closing = True
        transport = self._transport
        if not self._out and transport is not None and not transport.is_closing():
            self._finish(transport)

    def _finish(self, transport: asyncio.Transport) -> None:
        """Let the transport close, which waits until the client has taken what is left: not for ever.

        How much that is nobody tells: TLS does not count what it has passed on to the connection below.
        """
        if not self._slow:
            self.owner.write.start(self)
        transport.close()

    def close_if_idle(self) -> None:
        """Close unless a request is under way or arriving."""
        if self._current is None and not (self._waiting or self._rest) and self._receiving is None:
            self.close()

    def abort(self) -> None:
        """Close now."""
        self._out.clear()
        if self._transport is not None:
            self._transport.abort()

    # deadlines

    def _wait(self, deadlines: Deadlines | None) -> None:
        watch = self._watch
        if watch is not deadlines:
            if watch is not None:
                watch.stop(self)
            self._watch = deadlines
            if deadlines is not None:
                deadlines.start(self)

    def _wait_for_client(self) -> None:
        owner, request = self.owner, self._receiving
        if self._current is not None or self._waiting or self._discarding:
            self._wait(None)
        elif request is None:
            self._wait(owner.idle)
        elif not request.method:
            self._wait(owner.head)
        else:
            self._wait(owner.body)
            owner.body.start(self)  # anew: the time between two pieces counts

    def expired(self, deadlines: Deadlines) -> None:
        """The client took too long (`pdrouter.deadlines`)."""
        if deadlines is self.owner.write:
            _log.warning("client=%s took nothing of its answer for %g s; cut", self.client, deadlines.seconds)
            self.abort()
            return
        self._watch = None
        if deadlines is self.owner.idle:
            self.close_if_idle()
        elif self._current is None and not self._waiting:
            self._refuse(408, f"The request did not arrive within {deadlines.seconds:g} s.")

    # httptools callbacks

    def on_message_begin(self) -> None:
        """A request begins."""
        self._receiving = ClientRequest(self)

    def on_url(self, url: bytes) -> None:
        """Take (a piece of) the target."""
        if self._receiving is not None:
            self._receiving.target += url
            self._head_size += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header (or a trailer, which is dropped)."""
        request = self._receiving
        if request is not None and not request.method:
            request.headers.append((name.lower(), value))
            self._head_size += len(name) + len(value) + 4

    def on_headers_complete(self) -> None:
        """Check what the headers announce."""
        request = self._receiving
        size, self._head_size = self._head_size, 0
        self._unparsed = 0
        parser = self._parser
        if request is None or self._refusal is not None or parser is None:
            return
        request.method = parser.get_method()
        version = parser.get_http_version()
        request.old = version == "1.0"
        request.keep_alive = parser.should_keep_alive() and not (request.old and _closes(request.headers))
        if size > self.owner.limits.head:
            self._head_too_large()
        elif request.method == b"CONNECT":
            self._refusal = (501, "This is no proxy: there is no CONNECT.")
        elif not request.old and version != "1.1":
            self._refusal = (505, "This port speaks HTTP/1.1.")
        elif parser.should_upgrade():
            self._upgrading = True
        else:
            refusal = judge(request, self.owner.limits, self._host)
            if refusal is None:
                self._host = request.host
                if request.chunked or request.length > _SMALL:
                    refusal = self.owner.unwelcome(request)
            self._refusal = refusal
            if request.expects_continue and self._current is None and not self._waiting:
                self._continue(request)

    def _head_too_large(self) -> None:
        if self._refusal is None:
            target = self._receiving.target if self._receiving is not None else b""
            self._refusal = head_too_large(target, self.owner.limits)

    def _continue(self, request: ClientRequest) -> None:
        if request.expects_continue and self._refusal is None and not request.received:
            request.expects_continue = False
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        """Take a piece of the body."""
        request = self._receiving
        if request is None or self._refusal is not None:
            return
        self._work += 1
        request.received += len(data)
        if request.received > self.owner.limits.body:
            self._refusal = too_large(self.owner.limits)
        elif request.received > _SMALL and not self._hold(request):
            self._refusal = (503, "The router holds as much of requests as it may; try again later.")
        pieces = request.pieces
        if self._refusal is not None:
            pieces.clear()
            request.gathered = None
            self._release(request)
            return
        pieces.append(data)
        if len(pieces) == _PIECES:
            if request.gathered is None:
                request.gathered = bytearray()
            request.gathered += b"".join(pieces)
            pieces.clear()

    def _hold(self, request: ClientRequest) -> bool:
        """Count the bytes of a larger body; tell whether there is room for them."""
        owner = self.owner
        owner.held += request.received - request.held
        request.held = request.received
        return owner.held <= owner.limits.bodies

    def on_message_complete(self) -> None:
        """The request is complete: serve it, or let it wait for the one before it."""
        if self._upgrading:
            return
        self._completed = True
        request, self._receiving = self._receiving, None
        if request is None:
            return
        if self._refusal is not None or self._closing:  # the answer before told that it is the last one
            self._release(request)
            return
        pieces = request.pieces
        request.body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        if request.gathered is not None:
            request.body = bytes(request.gathered + request.body)
            request.gathered = None
        if self._current is not None or self._waiting or self._slow:
            if self._waiting is None:
                self._waiting = deque()
            self._waiting.append(request)
        else:
            self._take(request)

    def _take(self, request: ClientRequest) -> None:
        self._current = request
        self._work += _REQUEST
        try:
            self._handler(request)
        except Exception:
            _log.exception("a request failed in the router itself; please report this")
            listener = request.listener
            if self._current is request:
                request.keep_alive = False
                if request.started:
                    request.break_off()
                else:
                    request.respond(500, error_body(500, _FAILED), _JSON)
            if listener is not None:
                listener.client_gone()  # what was begun for it ends, and is counted no more

    # asyncio callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport (asyncio)."""
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self.client = str(peer[0]) if isinstance(peer, tuple) else "-"
        if not self.owner.joined(self, self.client):
            self._refuse(503, "The router has as many connections as it may have; close some.")
            if self.owner.turned_away > _LINGERING:
                self.close()
        else:
            self._wait(self.owner.idle)

    def data_received(self, data: bytes) -> None:
        """Parse (asyncio)."""
        if self._rest:  # reading had been stopped too late
            self._rest += data
        else:
            self._feed(data)

    def _feed(self, data: bytes) -> None:
        """Parse, in slices, as long as this connection has not had its share of the loop's turn.

        One read may have thousands of tiny requests or chunks, and while they are worked off nobody else is served.
        """
        self._work = 0
        self._feeding = True
        left: bytes | memoryview = data
        while left and not (self._discarding or self._closing or self._refusal is not None):
            if self._waiting or self._slow or self._work >= _TURN:
                self._rest = bytes(left)
                self._stop_reading()
                break
            size = _SLICE
            request = self._receiving
            if request is not None and request.length > request.received:
                size += request.length - request.received  # what is known to be its body
            if len(left) <= size:
                left = self._parse(left)
            else:
                left = memoryview(left)
                again = self._parse(left[:size])
                left = again + left[size:] if again else left[size:]
        self._feeding = False
        if self._current is not None:
            self._read_on()
            if self._receiving is not None or self._watch is not None:
                self._wait_for_client()
        elif self._work or self._paused or self._receiving is not None or self._refusal is not None:
            self._proceed()

    def _feed_rest(self) -> None:
        data, self._rest = self._rest, b""
        if data and self._transport is not None:
            self._feed(data)

    def _parse(self, data: bytes | memoryview) -> bytes:
        """Parse; give what has to be parsed anew."""
        self._completed = False
        parser = self._parser
        if parser is None:
            return b""
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade as error:
            if self._upgrading:
                return self._decline_upgrade(data[error.args[0] :])
        except httptools.HttpParserCallbackError:
            _log.exception("a request failed in the router itself; please report this")
            self._refusal = (500, _FAILED)
        except httptools.HttpParserError as error:
            if self._refusal is None:
                self._refusal = (400, f"This is not valid HTTP/1.1: {error}")
        if self._receiving is not None:
            self._count(self._receiving, len(data))
        return b""

    def _count(self, request: ClientRequest, size: int) -> None:
        """Bound what callbacks do not show: the parser holds an unfinished header back, and drops extensions."""
        limits = self.owner.limits
        if not request.method:
            self._unparsed = 0 if self._completed else self._unparsed + size
            if self._unparsed > limits.head or self._head_size > limits.head:
                self._head_too_large()
            return
        if request.since == 0:
            request.since = asyncio.get_running_loop().time()
            request.raw = request.received  # this read has its head too, and maybe requests before it
        else:
            if asyncio.get_running_loop().time() - request.since > 10 * limits.body_seconds:
                self._refusal = (408, f"The request did not arrive within {10 * limits.body_seconds:g} s.")
            request.raw += size
        if request.raw - request.received > 2 * limits.head + request.received:
            self._refusal = (413, "The request has more in chunk sizes, extensions and trailers than in its body.")

    def _decline_upgrade(self, rest: bytes | memoryview) -> bytes:
        """Serve a request that offers another protocol as if it had not (RFC 9110 section 7.8 allows that).

        Clients of Java offer HTTP/2 with every request. The parser has stopped before the body, so a new one reads the
        request again without the offer. Gives the bytes for it.
        """
        request, self._receiving = self._receiving, None
        self._parser = httptools.HttpRequestParser(self)
        self._upgrading = False
        if request is None:
            return b""
        lines = b""
        for name, value in request.headers:
            if name == b"connection":
                if b"close" in [option.strip() for option in value.lower().split(b",")]:
                    lines += b"connection: close\r\n"
            elif name != b"upgrade":
                lines += b"%b: %b\r\n" % (name, value)
        version = b"1.0" if request.old else b"1.1"
        return b"%b %b HTTP/%b\r\n%b\r\n%b" % (request.method, request.target, version, lines, bytes(rest))

    def _refuse(self, status: int, message: str) -> None:
        """Answer a request that cannot be taken, and close.

        What the client is still sending is read and dropped for a while: closing with bytes unread would reset the
        connection and could destroy the answer on its way.
        """
        self._discarding = True
        body = error_body(status, message)
        framing = b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        request, self._receiving = self._receiving, None
        if request is not None:
            self._release(request)
            if request.method == b"HEAD":
                body = b""
        self._wait(None)
        self.owner.refused(status)
        self.send(b"".join((status_line(status), _JSON, _REFUSAL_HEADERS.get(status, b""), framing, body)))
        self.flush()
        transport = self._transport
        if transport is not None and not transport.is_closing():
            if self._paused:
                self._paused = False
                transport.resume_reading()
            if transport.can_write_eof():
                transport.write_eof()
            asyncio.get_running_loop().call_later(_LINGER, transport.abort)

    def eof_received(self) -> None:
        """The client will send no more: the transport closes, once what is left is taken (asyncio)."""
        if not self._slow:
            self.owner.write.start(self)

    def pause_writing(self) -> None:
        """The client does not keep up (asyncio)."""
        self._slow = True
        owner = self.owner
        owner.write.start(self)
        if self._transport is not None:
            owner.fell_behind(self, self._transport.get_write_buffer_size())
        if self._current is None:
            self._stop_reading()
        elif self._current.listener is not None:
            self._current.listener.client_slow()

    def resume_writing(self) -> None:
        """The client keeps up again (asyncio)."""
        self._slow = False
        if self._transport is not None and self._transport.is_closing():
            self.owner.write.start(self)  # anew: what is left must be taken, too
        else:
            self.owner.write.stop(self)
        self.owner.caught_up(self)
        if self._current is None:
            self._proceed()
        elif self._current.listener is not None:
            self._current.listener.client_ready()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone (asyncio)."""
        self._transport = None
        self._parser = None  # it refers back to this: no work for the garbage collector
        self._wait(None)
        self.owner.write.stop(self)
        if self._slow:
            self.owner.caught_up(self)
        self.owner.left(self, self.client)
        request, self._current = self._current, None
        for one in (request, self._receiving, *(self._waiting or ())):
            if one is not None and one.held:
                self._release(one)
        self._receiving = None
        self._rest = b""
        if self._waiting:
            self._waiting.clear()
        if request is not None and request.listener is not None:
            request.listener.client_gone()
