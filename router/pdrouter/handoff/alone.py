"""A request that one engine serves, without a handoff."""

from pdrouter.fleet.engine import Engine, Role
from pdrouter.handoff.desk import Desk
from pdrouter.handoff.failure import Failure, leg_failure, router_failure
from pdrouter.handoff.legs import LARGEST, EngineEventError, told_first
from pdrouter.handoff.pair import Sink, no_engine
from pdrouter.handoff.retries import EACH
from pdrouter.handoff.stream import ABORT, ABORTED
from pdrouter.handoff.way import Way
from pdrouter.observe.record import Record
from pdrouter.openai.features import Prompt
from pdrouter.openai.legs import salted
from pdrouter.upstream.connection import Headers, note_own_failure
from pdrouter.upstream.errors import ConnectError, DeadEndError, UpstreamError
from pdrouter.upstream.pool import Call


class Alone:
    """Asks a decode engine and passes its answer on.

    An answer that is no stream is collected first, and of a stream of text the first event, so that another engine can
    be asked when this one fails.
    """

    __slots__ = (
        "_asked", "_body", "_call", "_desk", "_engine", "_failed", "_headers", "_passes", "_paused", "_pieces",
        "_record", "_settled", "_sink", "_size", "_status", "_streams", "_way", "deadline", "refused",
    )  # fmt: skip

    def __init__(
        self,
        desk: Desk,
        way: Way,
        body: bytes,
        asked: Prompt,
        record: Record,
        sink: Sink,
        streams: bool,
        deadline: float,
    ) -> None:
        """Prepare.

        Args:
            desk: what all requests share.
            way: path and headers.
            body: what the engine is sent.
            asked: by which it is chosen.
            record: is told engine and times.
            sink: gets the answer.
            streams: whether the client is known to have asked for events.
            deadline: loop time at which the client wants to wait no longer.
        """
        self.deadline = deadline
        self._desk = desk
        self._way = way
        self._body = body
        self._asked = asked
        self._record = record
        self._sink = sink
        self._streams = streams
        self._call: Call | None = None
        self._engine: Engine | None = None
        self.refused: list[Engine] = []
        self._failed = 0
        self._status = 0
        self._headers: Headers = []
        self._pieces: list[bytes] = []
        self._size = 0
        self._passes = False
        self._paused = False
        self._settled = False

    def start(self) -> None:
        """Begin, or begin again (as `pdrouter.handoff.pair.Pair.start`)."""
        if self._settled:
            return
        try:
            self._begin()
        except Exception:
            note_own_failure()
            self._dead_end()

    def _begin(self) -> None:
        """Choose an engine and ask it."""
        desk, record = self._desk, self._record
        engine = desk.choose(Role.DECODE, self._asked, self.refused)
        if engine is None:
            if desk.fleet.healthy(Role.DECODE):  # all there are have failed it; better they than none, a little later
                self.refused = []
                desk.later(self, self._failed)
            else:
                desk.waiting.park(self, Role.DECODE)
            return
        record.decode[:] = [engine.url]
        record.decode_sent_at = record.decode_sent_at or record.started
        self._engine = engine
        self._pieces.clear()
        self._size = 0
        queued = desk.routed(Role.DECODE, self._asked, engine) if record.generation else 0
        held = self._asked.tokens if record.generation else 0
        body = salted(self._body, engine.salt, self._asked.salt) if record.generation else self._body
        request = self._way.request(engine, body)
        self._call = desk.pool.call(engine, request, self, held=held, queued=queued, whole=not self._streams)
        if self._paused:
            self._call.pause()

    def gave_up(self, role: Role | None, seconds: float, retry_after: int) -> None:
        """It waited as long as a request may wait (`pdrouter.handoff.waiting`)."""
        self._settle_failed(no_engine(Role.DECODE, seconds, retry_after))

    def head(self, status: int, headers: Headers) -> None:
        """Take the head; of paths that the router does not read, only the engine tells that the answer is a stream."""
        self._status, self._headers = status, headers
        if not self._streams and any(
            name == b"content-type" and value.lower().startswith(b"text/event-stream") for name, value in headers
        ):
            self._streams = True
            if self._call is not None:
                self._call.whole = False

    def body(self, data: bytes) -> None:
        """Take a piece of the body; it is passed on at once where nothing could be done about a failure any more."""
        if self._passes:
            self._sink.body(data)
            return
        self._pieces.append(data)
        self._size += len(data)
        if self._status >= 500:
            return
        if self._streams and self._status == 200 and self._record.generation:
            self._pieces = [b"".join(self._pieces)]
            error = told_first(self._pieces[0])
            if error:
                self._told_error(error)
            elif error is not None:
                self._pass()
        elif self._streams or self._size > LARGEST:
            self._pass()

    def _told_error(self, event: bytes) -> None:
        """Ask another engine instead of passing on that this one has failed."""
        engine, call = self._engine, self._call
        assert engine is not None
        self._call = None
        if call is not None:
            call.abort()
        error = EngineEventError(f"{engine.url} ended its answer with an error", event)
        self._way.failed(error.reason)
        self._desk.fleet.ended(engine, error.status)
        if error.status < 500 or not self._may_try():
            self._settle_failed(Failure(error.status, event, Role.DECODE, f"status_{error.status}"))

    def _pass(self) -> None:
        self._passes = True
        self._sink.head(self._status, self._headers)
        for piece in self._pieces:
            self._sink.body(piece)
        self._pieces.clear()

    def end(self) -> None:
        """Pass on a whole answer, unless another engine may have a better one."""
        self._call = None
        if self._record.generation and not self._passes and ABORTED in b"".join(self._pieces):
            self._told_error(ABORT)
            return
        self._way.ended(self._status)
        if self._engine is not None:
            self._desk.fleet.ended(self._engine, self._status)
        if self._status >= 500 and not self._passes and self._may_try():
            return
        if not self._passes:
            self._pass()
        self._settled = True
        self._sink.end()

    def failed(self, error: UpstreamError) -> None:
        """Ask another engine when the client has seen nothing yet, else tell."""
        if isinstance(error, DeadEndError):
            self._dead_end()
            return
        self._call = None
        self._way.failed(error.reason)
        engine = self._engine
        assert engine is not None
        self._desk.broken(engine, error)
        if isinstance(error, ConnectError):
            self.refused.append(engine)
            self._desk.later(self, 0)
            return
        if self._passes or not self._may_try():
            self._settle_failed(leg_failure(502, Role.DECODE, error.reason, f"The request failed: {error}."))

    def _may_try(self) -> bool:
        """Ask another engine if this request and all together have tries left."""
        desk = self._desk
        self._failed += 1
        if self._failed > EACH or not desk.retries.spend():
            return False
        if self._engine is not None:
            self.refused.append(self._engine)
        self._record.retries += 1
        desk.later(self, self._failed - 1)
        return True

    def _dead_end(self) -> None:
        """The router itself failed where nothing else can be tried."""
        self._settled = True
        self._sink.failed(router_failure())

    def _settle_failed(self, failure: Failure) -> None:
        if not self._settled:
            self._settled = True
            self._sink.failed(failure)

    def abort(self) -> None:
        """Break it off at once."""
        self._settled = True
        self._desk.waiting.leave(self)
        call, self._call = self._call, None
        if call is not None:
            call.abort()
        self._way.failed("aborted")

    def pause(self) -> None:
        """Hold up the answer."""
        self._paused = True
        if self._call is not None:
            self._call.pause()

    def resume(self) -> None:
        """Let the answer go on."""
        self._paused = False
        if self._call is not None:
            self._call.resume()
