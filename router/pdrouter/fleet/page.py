"""A `/metrics` page of an engine, asked for once."""

import asyncio
from collections.abc import Callable

from pdrouter.fleet.engine import Engine
from pdrouter.upstream.connection import Headers
from pdrouter.upstream.errors import UpstreamError
from pdrouter.upstream.pool import Call, Pool

_TIMEOUT = 2.0  # seconds; a page of vLLM takes some 10 ms


class Page:
    """Asks at once, and tells what came: the page, nothing where the status was not 200, None without an answer."""

    __slots__ = ("_call", "_heard", "_pieces", "_timer", "status")

    def __init__(self, engine: Engine, pool: Pool, heard: Callable[[bytes | None], None]) -> None:
        self.status = 0
        self._heard: Callable[[bytes | None], None] | None = heard
        self._pieces: list[bytes] = []
        request = b"GET /metrics HTTP/1.1\r\nhost: %b\r\n\r\n" % engine.authority
        self._call: Call | None = pool.call(engine, request, self, counted=False)
        self._timer: asyncio.TimerHandle = pool.loop.call_later(_TIMEOUT, self._late)

    def stop(self) -> None:
        """Wait for no answer; nothing is told."""
        self._heard = None
        self._timer.cancel()
        call, self._call = self._call, None
        if call is not None:
            call.abort()

    def _late(self) -> None:
        heard = self._heard
        self.stop()
        if heard is not None:
            heard(None)

    def _tell(self, page: bytes | None) -> None:
        """Tell what came, once."""
        heard, self._heard = self._heard, None
        self._timer.cancel()
        self._call = None
        if heard is not None:
            heard(page)

    def head(self, status: int, headers: Headers) -> None:
        """Take the status."""
        self.status = status

    def body(self, data: bytes) -> None:
        """Take a piece."""
        self._pieces.append(data)

    def end(self) -> None:
        """Tell what came."""
        self._tell(b"".join(self._pieces) if self.status == 200 else b"")

    def failed(self, error: UpstreamError) -> None:
        """Tell that nothing came."""
        self._tell(None)
