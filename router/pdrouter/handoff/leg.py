"""A request to one engine, written out."""

from pdrouter.fleet.engine import Engine


class Way:
    """What both legs of a handoff have in common: method, path and the client's headers that go on."""

    __slots__ = ("_prefix", "_suffix")

    def __init__(self, method: bytes, target: bytes, forwarded: bytes, request_id: str) -> None:
        self._prefix = b"%b %b HTTP/1.1\r\nhost: " % (method, target)
        self._suffix = b"\r\nx-request-id: %b\r\n%bcontent-length: " % (request_id.encode(), forwarded)

    def request(self, engine: Engine, body: bytes) -> bytes:
        """Give the whole request for an engine."""
        return b"%b%b%b%d\r\n\r\n%b" % (self._prefix, engine.authority, self._suffix, len(body), body)
