"""What engines answer to the two legs of a handoff, collected or passed on."""

from collections.abc import Callable
from typing import ClassVar

import orjson

from pdrouter.fleet.engine import Engine
from pdrouter.handoff.stream import ABORT, ABORTED, ERROR, Stream
from pdrouter.upstream.connection import Headers
from pdrouter.upstream.errors import ClosedError, StalledError, UpstreamError
from pdrouter.upstream.pool import Call

LARGEST = 64 * 1024 * 1024  # bytes of an answer that the router has to hold
LEARNT = 512 * 1024  # bytes of an answer: reading a longer one for the policy would hold up other requests


class Handoff:
    """Who hears how the legs end (`pdrouter.handoff.pair`). `passed` takes each piece that is for the client."""

    passed: Callable[[bytes], None]

    def prefilled(self, engine: Engine, status: int, headers: Headers, body: bytes) -> None:
        """Prefill has answered."""
        raise NotImplementedError

    def prefill_failed(self, engine: Engine, error: UpstreamError) -> None:
        """Prefill has not answered."""
        raise NotImplementedError

    def greeted(self, engine: Engine) -> None:
        """A quiet engine has answered."""
        raise NotImplementedError

    def not_greeted(self, engine: Engine, error: UpstreamError) -> None:
        """A quiet engine has not answered."""
        raise NotImplementedError

    def prefill_too_large(self, engine: Engine) -> None:
        """Prefill answers more than can be held."""
        raise NotImplementedError

    def began(self, engine: Engine, status: int, headers: Headers) -> None:
        """The first bytes of decode's answer are there."""
        raise NotImplementedError

    def decoded(self, engine: Engine, answer: bytes | None) -> None:
        """Decode's answer is complete and passed on; `answer` is it, where the policy learns from answers."""
        raise NotImplementedError

    def decode_refused(self, engine: Engine, status: int, headers: Headers, body: bytes) -> None:
        """Decode has answered with an error."""
        raise NotImplementedError

    def decode_failed(self, engine: Engine, error: UpstreamError) -> None:
        """Decode has not answered to the end."""
        raise NotImplementedError


class EngineEventError(UpstreamError):
    """The engine ended its answer with an error event, or as if with one; `event` is the event's JSON."""

    reason: ClassVar[str] = "error_event"

    def __init__(self, message: str, event: bytes) -> None:
        super().__init__(message)
        self.event = event

    @property
    def status(self) -> int:
        """The code that the event tells, 500 where it tells none."""
        try:
            code = orjson.loads(self.event)["error"]["code"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return 500
        return code if isinstance(code, int) and 400 <= code < 600 else 500


def told_first(data: bytes) -> bytes | None:
    """Read the beginning of a stream.

    Returns:
        The JSON of an error that is all the client would get, empty bytes where it begins well, None while its first
        event is not whole and may still be held.
    """
    end = data.find(b"\n\n")
    if end < 0 and len(data) <= LEARNT:
        return None
    if data.startswith(ERROR):
        return data[6:] if end < 0 else data[6:end]
    return ABORT if ABORTED in data else b""


class OtherStreamError(UpstreamError):
    """The engine was to go on with another's stream, and generated something else than that one had."""

    reason: ClassVar[str] = "not_continued"


class Greeting:
    """Asks a quiet engine whether it is there, before it is sent what must not be read late."""

    __slots__ = ("_engine", "_handoff", "call", "over")

    def __init__(self, handoff: Handoff, engine: Engine) -> None:
        self.call: Call | None = None
        self.over = False
        self._handoff = handoff
        self._engine = engine

    def head(self, status: int, headers: Headers) -> None:
        """Whatever it says, it lives."""

    def body(self, data: bytes) -> None:
        """Take what is of no interest."""

    def end(self) -> None:
        """It has answered."""
        self.over = True
        self._handoff.greeted(self._engine)

    def failed(self, error: UpstreamError) -> None:
        """It has not."""
        self.over = True
        self._handoff.not_greeted(self._engine, error)

    def late(self) -> None:
        """It takes too long."""
        if not self.over and self.call is not None:
            self.call.fail(StalledError(f"{self._engine.url} does not answer"))


class PrefillLeg:
    """Collects the prefill engine's answer; `handoff` hears of it, and may be another one at the end than at first.

    `asked` is the loop time at which the engine was asked.
    """

    __slots__ = ("_chunks", "_headers", "_size", "_status", "asked", "engine", "handoff")

    def __init__(self, handoff: Handoff, engine: Engine, asked: float) -> None:
        self.engine = engine
        self.handoff = handoff
        self.asked = asked
        self._status = 0
        self._headers: Headers = []
        self._chunks: list[bytes] = []
        self._size = 0

    def head(self, status: int, headers: Headers) -> None:
        """Take the head."""
        self._status, self._headers = status, headers

    def body(self, data: bytes) -> None:
        """Take a piece of the body."""
        self._size += len(data)
        if self._size > LARGEST:
            self.handoff.prefill_too_large(self.engine)
            return
        self._chunks.append(data)

    def end(self) -> None:
        """The answer is complete."""
        chunks = self._chunks
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self.handoff.prefilled(self.engine, self._status, self._headers, body)

    def failed(self, error: UpstreamError) -> None:
        """No answer."""
        self.handoff.prefill_failed(self.engine, error)


# What is done with a piece of decode's answer.
_COLLECT, _FIRST, _PASS, _LEARN, _FOLLOW = range(5)


class DecodeLeg:
    """Takes decode's answer.

    Nothing is passed on before there is a first event of a stream, and an answer that is no stream not before it is
    complete: until then another engine can take over without the client noticing anything but time. A first event that
    tells an error is such a failure, and so is an answer that its engine ended early.
    """

    __slots__ = (
        "_began", "_handoff", "_headers", "_kept", "_learns", "_mode", "_passed", "_pieces", "_size", "_status",
        "_stream", "_whole", "engine",
    )  # fmt: skip

    def __init__(self, handoff: Handoff, engine: Engine, stream: Stream | None, whole: bool, learns: bool) -> None:
        """Prepare.

        Args:
            handoff: hears of it.
            engine: who answers.
            stream: what another engine could continue, if it is such a stream.
            whole: whether the answer is collected.
            learns: whether the policy wants to know the answer.
        """
        self.engine = engine
        self._handoff = handoff
        self._stream = stream
        self._whole = whole
        self._learns = learns
        self._status = 0
        self._headers: Headers = []
        self._pieces: list[bytes] = []
        self._kept: list[bytes] | None = [] if learns else None
        self._size = 0
        self._began = False
        self._passed = handoff.passed
        self._mode = _COLLECT

    def head(self, status: int, headers: Headers) -> None:
        """Take the head; what is done with the body depends on it."""
        self._status, self._headers = status, headers
        if status == 200 and not self._whole:
            self._mode = _FIRST

    def body(self, data: bytes) -> None:
        """Take a piece of the body."""
        mode = self._mode
        if mode == _FOLLOW:
            self._follow(data)
        elif mode == _PASS:
            self._passed(data)
        elif mode == _COLLECT:
            self._collect(data)
        elif mode == _FIRST:
            self._first(data)
        else:
            self._learn(data)

    def _collect(self, data: bytes) -> None:
        self._size += len(data)
        self._pieces.append(data)
        if self._size > LARGEST and self._status == 200:  # too much to hold: pass it on and do without a second try
            self._whole = False
            pieces, self._pieces = self._pieces, []
            self._pass_on(b"".join(pieces))

    def _first(self, data: bytes) -> None:
        if self._stream is not None:
            self._mode = _FOLLOW
            self._follow(data)
            return
        if self._pieces:
            data = self._pieces.pop() + data
        error = told_first(data)
        if error is None:
            self._pieces.append(data)
        elif error:
            self._error_event(error)
        else:
            self._pass_on(data)

    def _pass_on(self, data: bytes) -> None:
        """Begin to pass the answer on."""
        self._begin()
        self._mode = _LEARN if self._learns else _PASS
        self.body(data)

    def _error_event(self, event: bytes) -> None:
        message = f"{self.engine.url} ended its answer with an error"
        self._handoff.decode_failed(self.engine, EngineEventError(message, event))

    def _begin(self) -> None:
        self._began = True
        self._handoff.began(self.engine, self._status, self._headers)

    def _follow(self, data: bytes) -> None:
        stream = self._stream
        assert stream is not None
        told = stream.feed(data)
        if stream.begun and not self._began:
            self._begin()
        if told:
            if self._learns:
                self._learn(told)
            else:
                self._passed(told)
        if stream.differs is not None:
            self._handoff.decode_failed(self.engine, OtherStreamError(f"{self.engine.url}: {stream.differs}"))
        elif stream.error is not None:
            self._error_event(stream.error)

    def _learn(self, data: bytes) -> None:
        """Pass on a piece, and keep it for the policy while the answer is not too long for that."""
        self._size += len(data)
        if self._kept is not None:
            self._kept.append(data)
            if self._size > LEARNT:
                self._kept = None
        self._passed(data)

    def end(self) -> None:
        """The answer is complete."""
        handoff, engine = self._handoff, self.engine
        if self._status != 200:
            handoff.decode_refused(engine, self._status, self._headers, b"".join(self._pieces))
            return
        if self._stream is not None and not self._stream.complete:
            handoff.decode_failed(engine, ClosedError(f"{engine.url} ended its stream before it was complete"))
            return
        answer: bytes | None = None
        if self._whole:
            pieces = self._pieces
            whole = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            if ABORTED in whole:
                self._error_event(ABORT)
                return
            self._begin()
            self._passed(whole)
            if self._learns and len(whole) <= LEARNT:
                answer = whole
        else:
            if self._pieces:  # it had no whole event
                self._pass_on(self._pieces.pop())
            elif not self._began:
                self._begin()
            if self._kept is not None:
                answer = b"".join(self._kept)
        handoff.decoded(engine, answer)

    def failed(self, error: UpstreamError) -> None:
        """No (complete) answer."""
        self._handoff.decode_failed(self.engine, error)
