"""A request to one engine, written out."""

from pdrouter.fleet.engine import Engine
from pdrouter.observe.traces import LegSpan, RequestSpan


class Way:
    """What both legs of a handoff have in common: method, path, the client's headers that go on, the trace."""

    __slots__ = ("_leg", "_prefix", "_span", "_suffix")

    def __init__(
        self, method: bytes, target: bytes, forwarded: bytes, request_id: str, span: RequestSpan | None = None
    ) -> None:
        self._prefix = b"%b %b HTTP/1.1\r\nhost: " % (method, target)
        self._span = span
        self._leg: LegSpan | None = None
        self._suffix = b"\r\nx-request-id: %b\r\n%bcontent-length: " % (request_id.encode(), forwarded)

    def twin(self) -> "Way":
        """Give the same for a leg beside the one that is under way."""
        twin = Way(b"", b"", b"", "", self._span)
        twin._prefix, twin._suffix = self._prefix, self._suffix
        return twin

    @property
    def authorization(self) -> bytes:
        """The client's own, as a header line, or nothing; names are in lower case, and no value has a line break."""
        suffix = self._suffix
        at = suffix.find(b"\r\nauthorization: ") + 2
        return suffix[at : suffix.index(b"\r\n", at) + 2] if at > 1 else b""

    def at(self, target: bytes) -> None:
        """Go to another path from now on."""
        self._prefix = b"POST %b HTTP/1.1\r\nhost: " % target

    def request(self, engine: Engine, body: bytes) -> bytes:
        """Give the whole request for an engine: a leg begins."""
        if self._span is not None:
            self._leg = self._span.leg(engine.role.value, engine.host, engine.port)
            parts = (self._prefix, engine.authority, self._suffix, len(body), self._leg.headers, body)
            return b"%b%b%b%d\r\n%b\r\n%b" % parts
        return b"%b%b%b%d\r\n\r\n%b" % (self._prefix, engine.authority, self._suffix, len(body), body)

    def ended(self, status: int) -> None:
        """The leg was answered."""
        if self._leg is not None:
            self._leg.ended(status)
            self._leg = None

    def failed(self, reason: str) -> None:
        """The leg was not answered, or not to the end; nothing happens when it had ended."""
        if self._leg is not None:
            self._leg.failed(reason)
            self._leg = None


def own_request(engine: Engine, body: bytes, authorization: bytes) -> bytes:
    """Write out a completion that the router asks for for itself; `authorization` is a header line or nothing."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: %b\r\ncontent-type: application/json\r\n" % engine.authority
    return b"%b%bcontent-length: %d\r\n\r\n%b" % (head, authorization, len(body), body)
