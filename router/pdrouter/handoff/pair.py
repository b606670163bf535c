"""One prompt, two engines: prefill, ticket, decode.

A pair is in one of three states: PREFILL until there is a ticket, DECODE until decode's answer ended, then SETTLED.
An engine that refused the connection has not seen the request, so another gets it, with the same ticket on the decode
side. Everything else that fails is told to the client. However it ends, the pair settles exactly once.
"""

import enum
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, Protocol

from pdrouter.fleet.engine import Engine, Role
from pdrouter.handoff.desk import Desk
from pdrouter.handoff.failure import Failure, engine_failure, leg_failure
from pdrouter.handoff.leg import Way
from pdrouter.handoff.ticket import Ticket, TicketError, read_ticket
from pdrouter.observe.record import Record
from pdrouter.openai.features import Prompt
from pdrouter.openai.legs import decode_leg, prefill_leg
from pdrouter.upstream.connection import Headers
from pdrouter.upstream.errors import ConnectError, TooLateError, UpstreamError
from pdrouter.upstream.pool import Call

_PREFILL_TRIES = 2
_LARGEST = 64 * 1024 * 1024  # bytes of an answer that the router has to hold
_LEARNT = 512 * 1024  # bytes of an answer: reading a longer one for the policy would hold up other requests


class State(enum.Enum):
    """Where a pair is."""

    PREFILL = "prefill"
    DECODE = "decode"
    SETTLED = "settled"


class Sink(Protocol):
    """Takes the answer for the client: `head`, any number of `body`, then `end`; or `failed` as the last call."""

    def head(self, status: int, headers: Headers) -> None:
        """Take the head of decode's answer."""

    def body(self, data: bytes) -> None:
        """Take a piece of its body."""

    def end(self) -> None:
        """It is complete."""

    def failed(self, failure: Failure) -> None:
        """There will be no (complete) answer."""


class Served(Protocol):
    """Something under way towards engines that can be held up or broken off."""

    def start(self) -> None:
        """Begin."""

    def abort(self) -> None:
        """Break it off at once."""

    def pause(self) -> None:
        """Take no more bytes from the engine until `resume`."""

    def resume(self) -> None:
        """Take bytes again."""


def no_engine(role: Role) -> Failure:
    """Tell that no engine of a role can be asked."""
    return leg_failure(503, role, "no_engine", f"No {role} engine is healthy; see /ready.")


class PrefillLeg:
    """Collects the prefill engine's answer."""

    __slots__ = ("_chunks", "_headers", "_pair", "_size", "_status", "engine")

    def __init__(self, pair: "Pair", engine: Engine) -> None:
        self.engine = engine
        self._pair = pair
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
        if self._size > _LARGEST:
            self._pair.prefill_too_large(self.engine)
            return
        self._chunks.append(data)

    def end(self) -> None:
        """The answer is complete."""
        self._pair.prefilled(self.engine, self._status, self._headers, b"".join(self._chunks))

    def failed(self, error: UpstreamError) -> None:
        """No answer."""
        self._pair.prefill_failed(self.engine, error)


class DecodeLeg:
    """Passes decode's answer to the sink; `body` is the sink's own, so that a token costs no call more."""

    __slots__ = ("_answer", "_errors", "_headers", "_pair", "_sink", "_size", "_status", "body", "engine")

    def __init__(self, pair: "Pair", engine: Engine, sink: Sink) -> None:
        self.engine = engine
        self._pair = pair
        self._sink = sink
        self._status = 0
        self._headers: Headers = []
        self._errors: list[bytes] = []
        self._answer: list[bytes] | None = None
        self._size = 0
        self.body: Callable[[bytes], None] = sink.body

    def head(self, status: int, headers: Headers) -> None:
        """Take the head; an error is collected instead of relayed."""
        self._status, self._headers = status, headers
        if status == 200:
            self._sink.head(status, headers)
            if self._pair.learns():
                self._answer = []
                self.body = self._keep
        else:
            self.body = self._errors.append

    def _keep(self, data: bytes) -> None:
        """Pass on a piece, and keep it for the policy while the answer is not too long for that."""
        self._size += len(data)
        if self._answer is not None:
            self._answer.append(data)
            if self._size > _LEARNT:
                self._answer = None
        self._sink.body(data)

    def end(self) -> None:
        """The answer is complete."""
        self._pair.decode_ended(self.engine, self._status)
        if self._status == 200:
            self._pair.decoded()
            if self._answer is not None:
                self._pair.learn(self.engine, b"".join(self._answer))
        else:
            body = b"".join(self._errors)
            self._pair.settle_failed(engine_failure(self._status, body, self._headers, Role.DECODE, self.engine.url))

    def failed(self, error: UpstreamError) -> None:
        """No (complete) answer."""
        self._pair.decode_failed(self.engine, error)


class Pair:
    """Serves one prompt by a prefill and a decode engine."""

    __slots__ = (
        "_asked", "_bare", "_began", "_body", "_call", "_decode", "_desk", "_paused", "_place", "_prefill", "_record",
        "_refused", "_sink", "_ticket", "_tries", "_way", "state",
    )  # fmt: skip

    def __init__(
        self, desk: Desk, way: Way, body: Mapping[str, Any], bare: bytes, asked: Prompt, record: Record, sink: Sink
    ) -> None:
        """Prepare.

        Args:
            desk: what all requests share.
            way: path and headers of both legs.
            body: the client's JSON, parsed; it has one prompt.
            bare: the same JSON, encoded, without `kv_transfer_params`.
            asked: by which both engines are chosen.
            record: is told engines and times.
            sink: gets the answer.
        """
        self.state = State.PREFILL
        self._desk = desk
        self._way = way
        self._body = body
        self._bare = bare
        self._asked = asked
        self._record = record
        self._sink = sink
        self._place = -1
        self._prefill: Engine | None = None
        self._decode: Engine | None = None
        self._call: Call | None = None
        self._ticket: Ticket | None = None
        self._paused = False
        self._tries = 0
        self._refused: list[Engine] = []
        self._began = 0.0

    def start(self) -> None:
        """Choose both engines and ask prefill."""
        desk = self._desk
        prefill = desk.choose(Role.PREFILL, self._asked, self._refused)
        decode = self._decode or desk.choose(Role.DECODE, self._asked, self._refused)
        if prefill is None or decode is None:
            self.settle_failed(no_engine(Role.PREFILL if prefill is None else Role.DECODE))
            return
        if desk.bypass(self._asked, prefill, decode):
            self._decode_alone(decode)
            return
        self._note(prefill, decode)
        self._tries += 1
        self._began = perf_counter()
        if self._record.prefill_sent_at is None:
            self._record.prefill_sent_at = self._began
        request = self._way.request(prefill, prefill_leg(self._body))
        tokens = self._asked.tokens
        queued = desk.routed(Role.PREFILL, self._asked, prefill)
        self._call = desk.pool.call(prefill, request, PrefillLeg(self, prefill), held=tokens, queued=queued)

    def _decode_alone(self, decode: Engine) -> None:
        """Let decode compute the prompt too: its policy thinks that this is quicker than prefill and a transfer."""
        self._decode = decode
        if self._place < 0:
            self._place = len(self._record.decode)
            self._record.prefill.append("none")
            self._record.decode.append(decode.url)
        self._record.decode[self._place] = decode.url
        self._record.reason = f"{self._desk.policies[Role.DECODE].name}:bypass"
        self._send_decode(decode, self._bare, None, self._desk.routed(Role.DECODE, self._asked, decode))

    def _note(self, prefill: Engine, decode: Engine) -> None:
        self._prefill, self._decode = prefill, decode
        record = self._record
        if self._place < 0:
            self._place = len(record.decode)
            record.prefill.append(prefill.url)
            record.decode.append(decode.url)
        else:
            record.prefill[self._place] = prefill.url
            record.decode[self._place] = decode.url

    def prefilled(self, engine: Engine, status: int, headers: Headers, body: bytes) -> None:
        """Prefill has answered."""
        now = perf_counter()
        self._call = None
        self._way.ended(status)
        self._desk.fleet.ended(engine, status)
        if self._record.prefill_seconds is None:
            self._record.prefill_seconds = now - self._began
        if status != 200:
            self.settle_failed(engine_failure(status, body, headers, Role.PREFILL, engine.url))
            return
        assert self._decode is not None
        desk = self._desk
        if desk.chooses_late:
            # By now others have begun or ended: the choice made before prefill only served to see whether there is one.
            self._note(engine, desk.choose(Role.DECODE, self._asked, self._refused) or self._decode)
        try:
            ticket = read_ticket(body, engine, self._decode, self._body.get("model"), desk.loop.time(), desk.lease)
        except TicketError as error:
            message = f"The prefill engine {engine.url} gave no usable ticket: {error}."
            self.settle_failed(leg_failure(502, Role.PREFILL, "ticket", message))
            return
        self._record.ticket_at = now
        self._ticket = ticket
        self._ask_decode(self._decode, ticket)

    def _ask_decode(self, decode: Engine, ticket: Ticket) -> None:
        self._desk.routed(Role.DECODE, self._asked, decode)
        self._send_decode(decode, decode_leg(self._bare, ticket.params), ticket.expires, 0)

    def _send_decode(self, decode: Engine, body: bytes, not_after: float | None, queued: int) -> None:
        self.state = State.DECODE
        request = self._way.request(decode, body)
        if self._record.decode_sent_at is None:
            self._record.decode_sent_at = perf_counter()
        call = self._desk.pool.call(
            decode, request, DecodeLeg(self, decode, self._sink),
            not_after=not_after, held=self._asked.tokens, queued=queued,
        )  # fmt: skip
        self._call = call
        if self._paused:
            call.pause()

    def prefill_too_large(self, engine: Engine) -> None:
        """Prefill answers more than can be held."""
        self.abort()
        self.state = State.PREFILL
        message = f"The answer of the prefill engine {engine.url} is larger than {_LARGEST} bytes."
        self.settle_failed(leg_failure(502, Role.PREFILL, "body_over_limit", message))

    def prefill_failed(self, engine: Engine, error: UpstreamError) -> None:
        """Prefill has not answered."""
        self._call = None
        self._way.failed(error.reason)
        if not isinstance(error, ConnectError):
            self._desk.fleet.failed(engine, error.reason)
        else:
            self._desk.fleet.mark(engine, False, error.reason)
            self._refused.append(engine)
            if self._desk.choose(Role.PREFILL, self._asked, self._refused) is not None:
                self.start()
                return
        self.settle_failed(leg_failure(502, Role.PREFILL, error.reason, f"The prefill leg failed: {error}."))

    def decode_failed(self, engine: Engine, error: UpstreamError) -> None:
        """Decode has not answered to the end."""
        self._call = None
        self._way.failed(error.reason)
        if isinstance(error, TooLateError) and self._tries < _PREFILL_TRIES:
            self.state = State.PREFILL
            self.start()
            return
        if isinstance(error, ConnectError):
            self._desk.fleet.mark(engine, False, error.reason)
            self._refused.append(engine)
            other = self._desk.choose(Role.DECODE, self._asked, self._refused)
            if other is not None and self._ticket is None:
                self._decode_alone(other)
                return
            if other is not None and self._prefill is not None and self._ticket is not None:
                self._note(self._prefill, other)
                self._ask_decode(other, self._ticket)
                return
        elif not isinstance(error, TooLateError):
            self._desk.fleet.failed(engine, error.reason)
        self.settle_failed(leg_failure(502, Role.DECODE, error.reason, f"The decode leg failed: {error}."))

    def learns(self) -> bool:
        """Whether the decode policy wants to know what is generated."""
        return self._desk.learns(Role.DECODE)

    def learn(self, engine: Engine, answer: bytes) -> None:
        """Tell the decode policy what was generated."""
        self._desk.answered(Role.DECODE, self._asked, engine, answer)

    def decode_ended(self, engine: Engine, status: int) -> None:
        """Decode has answered to the end, whatever it said."""
        self._way.ended(status)
        self._desk.fleet.ended(engine, status)

    def decoded(self) -> None:
        """Decode's answer is complete."""
        if self.state is State.SETTLED:
            return
        self.state = State.SETTLED
        self._call = None
        self._count_prompt()
        self._sink.end()

    def settle_failed(self, failure: Failure) -> None:
        """End without an answer."""
        if self.state is State.SETTLED:
            return
        self.state = State.SETTLED
        self._call = None
        self._sink.failed(failure)

    def _count_prompt(self) -> None:
        if self._ticket is not None and self._ticket.prompt_tokens is not None:
            self._record.prompt_tokens = (self._record.prompt_tokens or 0) + self._ticket.prompt_tokens

    def abort(self) -> None:
        """Break off whichever leg is under way; the sink hears nothing more."""
        self.state = State.SETTLED
        call, self._call = self._call, None
        if call is not None:
            call.abort()
        self._way.failed("aborted")

    def pause(self) -> None:
        """Hold up decode's answer; prefill's is needed in any case."""
        self._paused = True
        if self.state is State.DECODE and self._call is not None:
            self._call.pause()

    def resume(self) -> None:
        """Let decode's answer go on."""
        self._paused = False
        if self.state is State.DECODE and self._call is not None:
            self._call.resume()
