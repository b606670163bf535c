"""A client's request, and the way back to the client."""

from http import HTTPStatus
from typing import TYPE_CHECKING

from pdrouter.handoff.client import Listener

if TYPE_CHECKING:
    from pdrouter.server.connection import ClientConnection

_STATUS_LINES = {status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode()) for status in HTTPStatus}
_JOINED = 65536  # a body up to this size is copied behind its head: one buffer less costs more than the copy


def status_line(status: int) -> bytes:
    """Give the first line of an answer."""
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d Status\r\n" % status


class ClientRequest:
    """A request and the way back to its client (`pdrouter.handoff.client.Client`).

    `length` is what the head tells of the body, 0 where that comes in chunks. Of a body that arrives `pieces` and
    `gathered` are there, `received` their bytes, `raw` the bytes with their framing, `held` those that count as held;
    `since` is when it began, as loop time.
    """

    __slots__ = (
        "_chunked", "_connection", "_done", "_started", "body", "chunked", "expects_continue", "gathered", "headers",
        "held", "host", "keep_alive", "length", "listener", "method", "old", "pieces", "raw", "received", "since",
        "target",
    )  # fmt: skip

    def __init__(self, connection: "ClientConnection") -> None:
        self.listener: Listener | None = None
        self.method = b""
        self.target = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.host = b""
        self.body = b""
        self.pieces: list[bytes] = []
        self.gathered: bytearray | None = None
        self.length = 0
        self.chunked = False
        self.received = 0
        self.held = 0
        self.raw = 0
        self.since = 0.0
        self.keep_alive = True
        self.old = False
        self.expects_continue = False
        self._connection = connection
        self._started = False
        self._chunked = False
        self._done = False

    @property
    def peer(self) -> str:
        """The client's address."""
        return self._connection.client

    @property
    def started(self) -> bool:
        """Whether the head of a streamed answer is sent."""
        return self._started

    def header(self, name: bytes) -> bytes | None:
        """Give the first value of a header (lower-case name)."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    def _end_of_head(self) -> bytes:
        if self.keep_alive and not self._connection.owner.draining:
            return b"\r\n"
        self.keep_alive = False
        return b"connection: close\r\n\r\n"

    def respond(self, status: int, body: bytes, headers: bytes = b"") -> None:
        """Send a complete answer."""
        if self._done:
            return
        self._done = True
        connection = self._connection
        line = status_line(status)
        if status in (204, 304):
            connection.send(b"%b%b%b" % (line, headers, self._end_of_head()))
        else:
            head = b"%b%bcontent-length: %d\r\n%b" % (line, headers, len(body), self._end_of_head())
            if self.method == b"HEAD":
                connection.send(head)
            elif len(body) <= _JOINED:
                connection.send(head + body)
            else:
                connection.send(head)
                connection.send(body)
        connection.answered(self)

    def start(self, status: int, headers: bytes) -> None:
        """Send the head of an answer whose length is not known; to HTTP/1.0 the end of the connection is its end."""
        if self._done:
            return
        self._started = True
        self._chunked = not self.old
        if self.old:
            self.keep_alive = False
        framing = b"transfer-encoding: chunked\r\n" if self._chunked else b""
        self._connection.send(b"%b%b%b%b" % (status_line(status), headers, framing, self._end_of_head()))

    def write(self, data: bytes) -> None:
        """Send a piece of the body."""
        if self._done or not data or self.method == b"HEAD":
            return
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._connection.send(data)

    def finish(self) -> None:
        """Send the end of the body."""
        if self._done:
            return
        self._done = True
        if self._chunked and self.method != b"HEAD":
            self._connection.send(b"0\r\n\r\n")
        self._connection.answered(self)

    def break_off(self) -> None:
        """Close without the end."""
        if self._done:
            return
        self._done = True
        self.keep_alive = False
        self._connection.answered(self)
