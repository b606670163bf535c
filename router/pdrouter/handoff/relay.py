"""One engine's answer to one client, as it comes."""

from pdrouter.handoff.client import Client
from pdrouter.handoff.delivery import Delivery
from pdrouter.handoff.desk import Desk
from pdrouter.handoff.failure import Failure
from pdrouter.observe.record import Record
from pdrouter.openai.usage import told_usage
from pdrouter.upstream.connection import Headers

# Of one connection only, or stated anew by the router (RFC 9112; `server` would name the engine).
_NOT_RELAYED = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
     b"content-length", b"server", b"x-request-id")
)  # fmt: skip
_HELD = 8 * 1024 * 1024
_TAIL = 4096


class Relay(Delivery):
    """Passes an answer on.

    An answer of known length up to 8 MiB is held until it is complete: it costs one write, and an engine that dies in
    the middle becomes an error instead of a broken answer. Everything else goes on as it comes.
    """

    def __init__(self, desk: Desk, client: Client, record: Record) -> None:
        super().__init__(desk, client, record)
        self._status = 0
        self._headers = b""
        self._held: list[bytes] | None = None
        self._write = client.write
        self._before = b""
        self._last = b""

    def head(self, status: int, headers: Headers) -> None:
        """Take the head of the answer."""
        if self.settled:
            return
        self._status = status
        lines = b"x-request-id: %b\r\n" % self.record.request_id.encode()
        length = -1
        for header in headers:
            name = header[0]
            if name not in _NOT_RELAYED:
                lines += b"%b: %b\r\n" % (name, header[1])
                if name == b"content-type" and header[1].startswith(b"text/event-stream"):
                    self.event_stream = True
            elif name == b"content-length":
                length = int(header[1])
        self._headers = lines
        if 0 <= length <= _HELD or status in (204, 304):
            self._held = []
            return
        self.started = True
        self.client.start(status, self._headers)

    def body(self, data: bytes) -> None:
        """Take a piece of the body."""
        if self.settled:
            return
        record = self.record
        if record.first_byte_at is None:
            record.first_byte()
        if self._held is not None:
            self._held.append(data)
            return
        self._before = self._last
        self._last = data if len(data) <= _TAIL else data[-_TAIL:]  # a slow client's come by the hundred kilobytes
        self._write(data)

    def end(self) -> None:
        """The answer is complete."""
        if self.settled:
            return
        if self._held is None:
            usage = told_usage(self._before + self._last)
        else:
            whole = self._held[0] if len(self._held) == 1 else b"".join(self._held)
            usage = told_usage(whole[-_TAIL:])
        if usage is not None:
            self.record.prompt_tokens, self.record.completion_tokens = usage
            self.desk.answered_with(usage[1])
        self.settle(self._status)
        if self._held is None:
            self.client.finish()
        else:
            self.client.respond(self._status, whole, self._headers)

    def failed(self, failure: Failure) -> None:
        """There will be no (complete) answer; of a half event its client has to see the end before it sees another."""
        if self.event_stream and self.started and not self.settled and not self._last.endswith(b"\n\n"):
            self.client.write(b"\n\n")
        self.fail(failure)
