"""An HTTP client for measuring: one connection, one request at a time, a timestamp for each event of the stream."""

import asyncio
import os
import ssl
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import orjson

KEY_VARIABLE = "OPENAI_API_KEY"  # as `vllm bench serve` and lm_eval read it
SILENCE_SECONDS = 600.0  # without a byte, after which a request has failed: nothing in serving takes as long
_LONGEST_ERROR = 300


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
        queued: from when it was due until it was sent.
        aborted: whether its client left on purpose.
        number: its place in the workload.
        conversation: its conversation.
        turn: its turn there.
    """

    start: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft: float = 0.0
    itls: list[float] = field(default_factory=list)
    latency: float = 0.0
    error: str = ""
    queued: float = 0.0
    aborted: bool = False
    number: int = 0
    conversation: int | None = None
    turn: int = 0

    @property
    def ok(self) -> bool:
        """Whether it succeeded: neither failed nor was left by its client."""
        return not self.error and not self.aborted

    def told(self, begin: float) -> dict[str, Any]:
        """Give it as JSON, `start` counted from the beginning of the run."""
        rounded = {name: round(value, 6) for name, value in asdict(self).items() if isinstance(value, float)}
        return (
            asdict(self) | rounded | {"start": round(self.start - begin, 6), "itls": [round(i, 6) for i in self.itls]}
        )

    @classmethod
    def read(cls, told: dict[str, Any]) -> "Record":
        """Read what `told` gave; further fields are let be."""
        return cls(**{name: told[name] for name in cls.__dataclass_fields__ if name in told})


@dataclass(slots=True)
class Answer:
    """What was generated, where a later turn needs it."""

    texts: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)


class Connection(asyncio.Protocol):
    """One keep-alive connection.

    Args:
        url: base URL of the server; `https` is spoken too.
        path: where requests go.
    """

    def __init__(self, url: str, path: str) -> None:
        parts = urlsplit(url)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or (443 if self._tls else 80)
        target = parts.path.rstrip("/") + path
        self._head = f"POST {target} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
        if key := os.environ.get(KEY_VARIABLE):
            self._head += f"authorization: Bearer {key}\r\n"
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[None] | None = None
        self._record = Record(0.0)
        self._last = 0.0
        self._heard = 0.0
        self._limit: asyncio.TimerHandle | None = None
        self._rest = b""
        self._tail = b""
        self._streams = False
        self._abort_after = 0
        self._answer: Answer | None = None

    async def post(
        self, body: bytes, *, abort_after: int | None = None, key: str = "", answer: Answer | None = None
    ) -> Record:
        """Send a request and give its record; failures are in it.

        Args:
            body: JSON.
            abort_after: events after which the connection is closed.
            key: a header line that routers take as a routing key, such as `x-session-id: a`.
            answer: filled with what is generated; costs time for each token.
        """
        loop = asyncio.get_running_loop()
        if self._transport is None or self._transport.is_closing():
            try:
                await loop.create_connection(lambda: self, self._host, self._port, ssl=self._tls)
            except OSError as error:
                return Record(perf_counter(), error=f"no connection: {error.strerror or error}")
        assert self._transport is not None
        self._done = loop.create_future()
        self._rest = self._tail = b""
        self._abort_after, self._answer = abort_after or 0, answer
        head = self._head + (f"{key}\r\n" if key else "")
        self._record = record = Record(perf_counter())
        self._last = self._heard = record.start
        self._limit = loop.call_later(SILENCE_SECONDS, self._judge_silence)
        self._transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        try:
            await self._done
        except ConnectionError as error:
            record.error = str(error)
        finally:
            self._limit.cancel()
        return record

    def _judge_silence(self) -> None:
        """Fail a request whose server is silent; look again when it could have been for too long since its last byte.

        A byte only has its time noted: a timer for each would cost more than reading it.
        """
        left = self._heard + SILENCE_SECONDS - perf_counter()
        if left > 0:
            self._limit = asyncio.get_running_loop().call_later(left, self._judge_silence)
        else:
            self._fail(f"no byte for {SILENCE_SECONDS:g} s")
            self.close()

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
        self._heard = perf_counter()
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
                record.error = event[6:_LONGEST_ERROR].decode(errors="replace")
                continue
            if record.ttft:
                record.itls.append(now - self._last)
            else:
                record.ttft = now - record.start
            self._last = now
            if self._answer is not None:
                self._keep(self._answer, event)
        if self._abort_after and record.ttft and len(record.itls) + 1 >= self._abort_after:
            self._leave(record)

    @staticmethod
    def _keep(answer: Answer, event: bytes) -> None:
        for choice in orjson.loads(event[6:])["choices"]:
            answer.texts.append(choice.get("text") or "")
            answer.ids += choice.get("token_ids") or ()

    def _leave(self, record: Record) -> None:
        record.aborted = True
        record.output_tokens = len(record.itls) + 1
        record.latency = self._last - record.start
        if self._done is not None and not self._done.done():
            self._done.set_result(None)
        self.close()

    def on_message_complete(self) -> None:
        """Read the usage and finish."""
        record = self._record
        if record.aborted:
            return
        record.latency = self._last - record.start
        status = self._parser.get_status_code()
        if status != 200:
            record.error = f"status {status}: {self._tail[:_LONGEST_ERROR].decode(errors='replace')}"
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
                break
        if not record.ttft:
            record.error = "an empty stream"
        elif not record.output_tokens:
            record.output_tokens = len(record.itls) + 1
