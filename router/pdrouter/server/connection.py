"""One HTTP/1.1 connection of a client.

Requests that a client sends ahead (pipelining) are answered in order, one at a time; while one waits, no more is read.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import Protocol, cast

import httptools

from pdrouter.handoff.client import Listener
from pdrouter.openai.errors import error_body
from pdrouter.server.limits import Limits

_log = logging.getLogger(__name__)
_STATUS_LINES = {status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode()) for status in HTTPStatus}
_LINGER = 2.0
_JSON = b"content-type: application/json\r\n"


def _status_line(status: int) -> bytes:
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d Status\r\n" % status


class Owner(Protocol):
    """Who accepted a connection."""

    limits: Limits
    draining: bool

    def joined(self, connection: "ClientConnection") -> None:
        """A connection is open."""

    def left(self, connection: "ClientConnection") -> None:
        """A connection is closed."""

    def refused(self, status: int) -> None:
        """A request was refused before it was complete."""


class ClientRequest:
    """A request and the way back to its client (`pdrouter.handoff.client.Client`)."""

    __slots__ = (
        "_chunked", "_connection", "_done", "_started", "body", "chunks", "expects_continue", "headers",
        "keep_alive", "listener", "method", "old", "received", "target",
    )  # fmt: skip

    def __init__(self, connection: "ClientConnection") -> None:
        self.listener: Listener | None = None
        self.method = b""
        self.target = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.chunks: list[bytes] = []
        self.received = 0
        self.keep_alive = True
        self.old = False
        self.expects_continue = False
        self._connection = connection
        self._started = False
        self._chunked = False
        self._done = False

    def header(self, name: bytes) -> bytes | None:
        """Give the first value of a header (lower-case name)."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    def _head(self, status: int, headers: bytes, framing: bytes) -> bytes:
        connection = self._connection
        if not self.keep_alive or connection.owner.draining:
            self.keep_alive = False
            framing += b"connection: close\r\n"
        return b"%b%b%b\r\n" % (_status_line(status), headers, framing)

    def respond(self, status: int, body: bytes, headers: bytes = b"") -> None:
        """Send a complete answer."""
        if self._done:
            return
        self._done = True
        bodiless = status in (204, 304)
        head = self._head(status, headers, b"" if bodiless else b"content-length: %d\r\n" % len(body))
        if bodiless or self.method == b"HEAD":
            body = b""
        self._connection.send(head, body)
        self._connection.answered(self)

    def start(self, status: int, headers: bytes) -> None:
        """Send the head of an answer whose length is not known; to HTTP/1.0 the end of the connection is its end."""
        if self._done:
            return
        self._started = True
        self._chunked = not self.old
        if self.old:
            self.keep_alive = False
        head = self._head(status, headers, b"transfer-encoding: chunked\r\n" if self._chunked else b"")
        self._connection.send(head, b"")

    def write(self, data: bytes) -> None:
        """Send a piece of the body."""
        if self._done or not data or self.method == b"HEAD":
            return
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._connection.send(data, b"")

    def finish(self) -> None:
        """Send the end of the body."""
        if self._done:
            return
        self._done = True
        if self._chunked and self.method != b"HEAD":
            self._connection.send(b"0\r\n\r\n", b"")
        self._connection.answered(self)

    def break_off(self) -> None:
        """Close without the end."""
        if self._done:
            return
        self._done = True
        self.keep_alive = False
        self._connection.answered(self)


class ClientConnection(asyncio.Protocol):
    """Parses requests, hands them to a handler one at a time, writes answers."""

    def __init__(self, owner: Owner, handler: Callable[[ClientRequest], None]) -> None:
        self.owner = owner
        self._handler = handler
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._receiving: ClientRequest | None = None
        self._current: ClientRequest | None = None
        self._waiting: deque[ClientRequest] = deque()
        self._head_size = 0
        self._unparsed = 0
        self._completed = False
        self._upgrading = False
        self._refusal: tuple[int, str] | None = None
        self._discarding = False
        self._paused = False
        self._slow = False

    # towards requests

    def send(self, head: bytes, body: bytes) -> None:
        """Write bytes, unless the client is gone."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if not body:
            transport.write(head)
        elif len(body) < 65536:
            transport.write(head + body)
        else:
            transport.writelines((head, body))

    def answered(self, request: ClientRequest) -> None:
        """A request is done: close, or take the next."""
        if request is not self._current:
            return
        request.listener = None
        self._current = None
        if not request.keep_alive:
            self.close()
        elif self._waiting:
            # Not from within the answer that just ended: a client that sends thousands ahead must not nest as many.
            asyncio.get_running_loop().call_soon(self._next)
        else:
            self._go_on()

    def _next(self) -> None:
        if self._current is None and self._waiting and self._transport is not None:
            self._take(self._waiting.popleft())

    def _go_on(self) -> None:
        if self._refusal is not None:
            self._refuse(*self._refusal)
            return
        if self._receiving is not None:
            self._continue(self._receiving)
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    def close(self) -> None:
        """Close once everything written is sent."""
        if self._transport is not None:
            self._transport.close()

    def close_if_idle(self) -> None:
        """Close unless a request is under way or arriving."""
        if self._current is None and not self._waiting and self._receiving is None:
            self.close()

    def abort(self) -> None:
        """Close now."""
        if self._transport is not None:
            self._transport.abort()

    # httptools callbacks

    def on_message_begin(self) -> None:
        """A request begins."""
        self._receiving = ClientRequest(self)

    def on_url(self, url: bytes) -> None:
        """Take (a piece of) the target."""
        if self._receiving is not None:
            self._receiving.target += url
            self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        request = self._receiving
        if request is not None and self._refusal is None:
            request.headers.append((name.lower(), value))
            self._count(len(name) + len(value) + 4)
            if len(request.headers) > self.owner.limits.header_count:
                self._refusal = (431, f"A request may have {self.owner.limits.header_count} headers.")

    def _count(self, size: int) -> None:
        self._head_size += size
        if self._head_size > self.owner.limits.head:
            self._head_too_large()

    def _head_too_large(self) -> None:
        if self._refusal is None:
            self._refusal = (431, f"Request line and headers may have {self.owner.limits.head} bytes.")

    def on_headers_complete(self) -> None:
        """Check what the headers announce."""
        request = self._receiving
        self._head_size = self._unparsed = 0
        if request is None or self._refusal is not None:
            return
        request.method = self._parser.get_method()
        request.old = self._parser.get_http_version() == "1.0"
        request.keep_alive = self._parser.should_keep_alive()
        if self._parser.should_upgrade() and request.method != b"CONNECT":
            self._upgrading = True
            return
        for name, value in request.headers:
            if name == b"content-length" and int(value) > self.owner.limits.body:
                self._too_large()
            elif name == b"expect":
                if value.lower() == b"100-continue":
                    request.expects_continue = True
                else:
                    self._refusal = (417, "Only Expect: 100-continue is known.")
        if self._current is None and not self._waiting:
            self._continue(request)

    def _continue(self, request: ClientRequest) -> None:
        if request.expects_continue and self._refusal is None and not request.received:
            request.expects_continue = False
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n", b"")

    def _too_large(self) -> None:
        self._refusal = (413, f"A request body may have {self.owner.limits.body} bytes.")

    def on_body(self, data: bytes) -> None:
        """Take a piece of the body."""
        request = self._receiving
        if request is None or self._refusal is not None:
            return
        request.received += len(data)
        if request.received > self.owner.limits.body:
            request.chunks.clear()
            self._too_large()
        else:
            request.chunks.append(data)

    def on_message_complete(self) -> None:
        """The request is complete: serve it, or let it wait for the one before it."""
        if self._upgrading:
            return
        self._completed = True
        request, self._receiving = self._receiving, None
        if request is None or self._refusal is not None:
            return
        request.body = request.chunks[0] if len(request.chunks) == 1 else b"".join(request.chunks)
        request.chunks.clear()
        if self._current is not None or self._waiting:
            self._waiting.append(request)
            if not self._paused and self._transport is not None:
                self._paused = True
                self._transport.pause_reading()
        else:
            self._take(request)

    def _take(self, request: ClientRequest) -> None:
        self._current = request
        try:
            self._handler(request)
        except Exception:
            _log.exception("a request failed in the router itself; please report this")
            if self._current is request:
                request.keep_alive = False
                request.respond(500, error_body(500, "The router failed on this request; its log tells why."), _JSON)
        if self._slow and self._current is request and request.listener is not None:
            # The answer before this one still fills the buffer, and asyncio tells that only once.
            request.listener.client_slow()

    # asyncio callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport (asyncio)."""
        self._transport = cast(asyncio.Transport, transport)
        self.owner.joined(self)

    def data_received(self, data: bytes) -> None:
        """Parse (asyncio)."""
        while data and not self._discarding and self._refusal is None:
            data = self._parse(data)

    def _parse(self, data: bytes) -> bytes:
        """Parse; give what has to be parsed anew."""
        self._completed = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as error:
            return self._decline_upgrade(data[error.args[0] :])
        except httptools.HttpParserError as error:
            if self._refusal is None:
                self._refusal = (400, f"This is not valid HTTP/1.1: {error}")
        if self._receiving is not None and not self._receiving.method:
            # The parser holds an unfinished header back, so `on_header` alone would let one grow without end.
            self._unparsed = 0 if self._completed else self._unparsed + len(data)
            if self._unparsed > self.owner.limits.head:
                self._head_too_large()
        if self._refusal is not None and self._current is None and not self._waiting:
            self._refuse(*self._refusal)
        return b""

    def _decline_upgrade(self, rest: bytes) -> bytes:
        """Serve a request that offers another protocol as if it had not (RFC 9110 section 7.8 allows that).

        Clients of Java offer HTTP/2 with every request. The parser has stopped before the body, so a new one reads the
        request again without the offer. Gives the bytes for it.
        """
        request, self._receiving = self._receiving, None
        self._parser = httptools.HttpRequestParser(self)
        if request is None or not self._upgrading:  # CONNECT, which has been refused
            self.close()
            return b""
        self._upgrading = False
        kept = [(name, value) for name, value in request.headers if name not in (b"upgrade", b"connection")]
        lines = b"".join(b"%b: %b\r\n" % header for header in kept)
        version = b"1.0" if request.old else b"1.1"
        return b"%b %b HTTP/%b\r\n%b\r\n%b" % (request.method, request.target, version, lines, rest)

    def _refuse(self, status: int, message: str) -> None:
        """Answer a request that cannot be taken, and close.

        What the client is still sending is read and dropped for a while: closing with bytes unread would reset the
        connection and could destroy the answer on its way.
        """
        self._discarding = True
        self._receiving = None
        self.owner.refused(status)
        body = error_body(status, message)
        framing = b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.send(_status_line(status) + _JSON + framing, body)
        transport = self._transport
        if transport is not None and not transport.is_closing():
            if self._paused:
                transport.resume_reading()
            if transport.can_write_eof():
                transport.write_eof()
            asyncio.get_running_loop().call_later(_LINGER, transport.abort)

    def pause_writing(self) -> None:
        """The client does not keep up (asyncio)."""
        self._slow = True
        if self._current is not None and self._current.listener is not None:
            self._current.listener.client_slow()

    def resume_writing(self) -> None:
        """The client keeps up again (asyncio)."""
        self._slow = False
        if self._current is not None and self._current.listener is not None:
            self._current.listener.client_ready()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone (asyncio)."""
        self._transport = None
        self.owner.left(self)
        self._waiting.clear()
        request, self._current = self._current, None
        if request is not None and request.listener is not None:
            request.listener.client_gone()
