"""An HTTP client for measuring: one connection, one request at a time, a timestamp for each event of the stream."""

import asyncio
from dataclasses import dataclass, field
from time import perf_counter
from typing import cast
from urllib.parse import urlsplit

import httptools
import orjson


@dataclass(slots=True)
class Record:
    """One request as it was measured; times in seconds.

    Args:
        start: when it was sent (perf_counter).
        prompt_tokens: tokens of the prompt, by the server's usage.
        output_tokens: tokens generated, by the server's usage.
        ttft: until the first event.
        itls: between two events.
        latency: until the last event.
        error: why it failed, or nothing.
    """

    start: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft: float = 0.0
    itls: list[float] = field(default_factory=list)
    latency: float = 0.0
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether it succeeded."""
        return not self.error


class Connection(asyncio.Protocol):
    """One keep-alive connection.

    Args:
        url: base URL of the server.
        path: where requests go.
    """

    def __init__(self, url: str, path: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        target = parts.path.rstrip("/") + path
        self._head = f"POST {target} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[None] | None = None
        self._record = Record(0.0)
        self._last = 0.0
        self._rest = b""
        self._tail = b""
        self._streams = False

    async def post(self, body: bytes) -> Record:
        """Send a request and give its record; failures are in it."""
        loop = asyncio.get_running_loop()
        if self._transport is None or self._transport.is_closing():
            try:
                await loop.create_connection(lambda: self, self._host, self._port)
            except OSError as error:
                return Record(perf_counter(), error=f"no connection: {error.strerror or error}")
        assert self._transport is not None
        self._done = loop.create_future()
        self._rest = self._tail = b""
        self._record = record = Record(perf_counter())
        self._last = record.start
        self._transport.write(f"{self._head}content-length: {len(body)}\r\n\r\n".encode() + body)
        try:
            await self._done
        except ConnectionError as error:
            record.error = str(error)
        return record

    def close(self) -> None:
        """Close."""
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by class
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        """Parse."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"no valid HTTP answer: {error}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the request under way."""
        self._transport = None
        self._fail("the server broke off its answer")

    def _fail(self, message: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError(message))

    # httptools

    def on_headers_complete(self) -> None:
        """See whether it is a stream at all."""
        self._streams = self._parser.get_status_code() == 200

    def on_body(self, data: bytes) -> None:
        """Note the time of each event."""
        now = perf_counter()
        self._tail = (self._tail + data)[-2000:]
        if not self._streams:
            return
        *events, self._rest = (self._rest + data).split(b"\n\n")
        record = self._record
        for event in events:
            # the last two tell usage and [DONE]; they are no tokens
            if event.endswith(b"[DONE]") or b'"choices":[]' in event:
                continue
            if event.startswith(b'data: {"error"'):
                record.error = event[6:300].decode(errors="replace")
                continue
            if record.ttft:
                record.itls.append(now - self._last)
            else:
                record.ttft = now - record.start
            self._last = now

    def on_message_complete(self) -> None:
        """Read the usage and finish."""
        record = self._record
        record.latency = self._last - record.start
        status = self._parser.get_status_code()
        if status != 200:
            record.error = f"status {status}: {self._tail[:300].decode(errors='replace')}"
        elif not record.error:
            self._read_usage(record)
        if not self._parser.should_keep_alive():
            self.close()
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _read_usage(self, record: Record) -> None:
        for event in reversed(self._tail.split(b"\n\n")):
            if event.startswith(b"data: {") and b'"usage":{' in event:
                usage = orjson.loads(event[6:])["usage"]
                record.prompt_tokens = usage["prompt_tokens"]
                record.output_tokens = usage["completion_tokens"]
                return
        if not record.ttft:
            record.error = "an empty stream"
        else:
            record.output_tokens = len(record.itls) + 1
