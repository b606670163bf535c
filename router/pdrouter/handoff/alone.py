"""A request that one engine serves, without a handoff."""

from pdrouter.fleet.engine import Engine, Role
from pdrouter.handoff.desk import Desk
from pdrouter.handoff.failure import leg_failure
from pdrouter.handoff.leg import Way
from pdrouter.handoff.pair import Sink, no_engine
from pdrouter.observe.record import Record
from pdrouter.openai.features import Prompt
from pdrouter.upstream.connection import Headers
from pdrouter.upstream.errors import ConnectError, UpstreamError
from pdrouter.upstream.pool import Call


class Alone:
    """Asks one decode engine and passes its answer on, whatever its status."""

    def __init__(self, desk: Desk, way: Way, body: bytes, asked: Prompt, record: Record, sink: Sink) -> None:
        self._desk = desk
        self._way = way
        self._body = body
        self._asked = asked
        self._record = record
        self._sink = sink
        self._call: Call | None = None
        self._engine: Engine | None = None
        self._refused: list[Engine] = []
        self._status = 0

    def start(self) -> None:
        """Choose an engine and ask it."""
        engine = self._desk.choose(Role.DECODE, self._asked, self._refused)
        if engine is None:
            self._sink.failed(no_engine(Role.DECODE))
            return
        record = self._record
        record.decode[:] = [engine.url]
        record.decode_sent_at = record.started
        self._engine = engine
        queued = self._desk.routed(Role.DECODE, self._asked, engine) if record.generation else 0
        held = self._asked.tokens if record.generation else 0
        request = self._way.request(engine, self._body)
        self._call = self._desk.pool.call(engine, request, self, held=held, queued=queued)

    def head(self, status: int, headers: Headers) -> None:
        """Pass on the head."""
        self._status = status
        self._sink.head(status, headers)

    def body(self, data: bytes) -> None:
        """Pass on a piece of the body."""
        self._sink.body(data)

    def end(self) -> None:
        """Pass on the end."""
        self._call = None
        self._way.ended(self._status)
        if self._engine is not None:
            self._desk.fleet.ended(self._engine, self._status)
        self._sink.end()

    def failed(self, error: UpstreamError) -> None:
        """Ask another engine when this one has not seen the request, else tell."""
        self._call = None
        self._way.failed(error.reason)
        if self._engine is not None and not isinstance(error, ConnectError):
            self._desk.fleet.failed(self._engine, error.reason)
        if isinstance(error, ConnectError) and self._engine is not None:
            self._desk.fleet.mark(self._engine, False, error.reason)
            self._refused.append(self._engine)
            if self._desk.choose(Role.DECODE, self._asked, self._refused) is not None:
                self.start()
                return
        self._sink.failed(leg_failure(502, Role.DECODE, error.reason, f"The request failed: {error}."))

    def abort(self) -> None:
        """Break it off at once."""
        call, self._call = self._call, None
        if call is not None:
            call.abort()
        self._way.failed("aborted")

    def pause(self) -> None:
        """Hold up the answer."""
        if self._call is not None:
            self._call.pause()

    def resume(self) -> None:
        """Let the answer go on."""
        if self._call is not None:
            self._call.resume()
