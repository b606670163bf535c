"""One prompt, two engines: prefill, ticket, decode; and whatever it takes when one of them fails.

A pair is WAITING for engines or room, in PREFILL until there is a ticket, GREETING a decode engine that has long said
nothing, in DECODE until decode's answer ended, then SETTLED, exactly once. A prefill leg that nobody wants any more,
since its client left or another engine was quicker, goes on without it (`pdrouter.handoff.unwanted`). What a failure
leads to:

- An engine that refused the connection has not seen the request: another gets it, on the decode side with the same
  ticket.
- Prefill that failed otherwise, or gave no usable ticket: another prefill engine.
- Decode that failed before its first byte may have fetched the KV blocks or not, and nobody can tell. A ticket that is
  used twice can mean foreign blocks, so it is given back, prefill computes again (its prefix is cached), and another
  decode engine gets the new ticket.
- A lease that may have ended in decode's queue (`pdrouter.handoff.overdue`): begin anew at another decode engine, the
  second time without a lease.
- Decode that failed in the middle of a stream: another pair goes on by token ids (`pdrouter.handoff.stream`).
- Prefill that takes long may be hedged (`hedge_prefill_secs`): a second engine is asked, and the first answer counts.
- No engine of a role, or no decode engine with room: the pair waits (`pdrouter.handoff.waiting`). Without any prefill
  engine decode computes prompts itself.

Only an engine's answer below 500 and the client's own limits end a request otherwise.
"""

import enum
from collections.abc import Mapping, Sequence
from math import inf
from time import perf_counter
from typing import Any, Protocol

from pdrouter.deadlines import Deadlines
from pdrouter.fleet.engine import Engine, Role
from pdrouter.handoff.desk import Desk
from pdrouter.handoff.failure import Failure, engine_failure, leg_failure, router_failure
from pdrouter.handoff.legs import (
    LARGEST,
    DecodeLeg,
    EngineEventError,
    Greeting,
    Handoff,
    OtherStreamError,
    PrefillLeg,
)
from pdrouter.handoff.retries import EACH
from pdrouter.handoff.stream import CannotGoOnError, Stream
from pdrouter.handoff.ticket import Cause, Ticket, TicketError, read_ticket
from pdrouter.handoff.unwanted import Asking, Unwanted
from pdrouter.handoff.way import Way
from pdrouter.observe.record import Record
from pdrouter.openai.asked import CHAT, COMPLETIONS
from pdrouter.openai.continuation import IDS_FIELD, why_not
from pdrouter.openai.features import Prompt
from pdrouter.openai.legs import decode_leg, encoded, prefill_leg, salted
from pdrouter.upstream.connection import Headers, note_own_failure
from pdrouter.upstream.errors import (
    ConnectError,
    DeadEndError,
    LeaseEndedError,
    StalledError,
    TooLateError,
    UpstreamError,
    VanishedError,
)
from pdrouter.upstream.pool import Call

_GRUDGE = 1.0  # seconds that a request would rather wait for room than ask who failed it; each failure doubles them


class State(enum.Enum):
    """Where a pair is."""

    WAITING = "waiting"
    PREFILL = "prefill"
    GREETING = "greeting"
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


def no_engine(role: Role, seconds: float, retry_after: int) -> Failure:
    """Tell that no engine of a role can be asked."""
    waited = f" within {seconds:.0f} s" if seconds >= 1 else ""
    headers = b"retry-after: %d\r\n" % retry_after
    return leg_failure(503, role, "no_engine", f"No {role} engine is healthy{waited}; see /ready.", headers)


class Pair(Handoff):
    """Serves one prompt by a prefill and a decode engine."""

    __slots__ = (
        "_alone", "_asked", "_bare", "_began", "_body", "_call", "_coming", "_coming_at", "_continued",
        "_decode", "_desk", "_first_at", "_fruitless", "_furthest", "_headed", "_hedge", "_lacking",
        "_leases_ended", "_leg", "_met", "_only", "_path", "_paused", "_place", "_prefill", "_record",
        "_refused", "_refused_at", "_same", "_sink", "_stream", "_streams", "_ticket", "_unfit", "_way", "deadline",
        "passed", "state",
    )  # fmt: skip

    def __init__(
        self, desk: Desk, way: Way, path: str, body: Mapping[str, Any], bare: bytes, asked: Prompt, record: Record,
        sink: Sink, deadline: float = inf,
    ) -> None:  # fmt: skip
        """Prepare.

        Args:
            desk: what all requests share.
            way: path and headers of both legs.
            path: of the client's request, without a query.
            body: the client's JSON, parsed; it has one prompt.
            bare: the same JSON, encoded, without `kv_transfer_params`.
            asked: by which both engines are chosen.
            record: is told engines and times.
            sink: gets the answer.
            deadline: loop time at which the client wants to wait no longer.
        """
        self.deadline = deadline
        self.state = State.WAITING
        self.passed = sink.body
        self._desk = desk
        self._way = way
        self._path = path
        self._body = body
        self._bare = bare
        self._asked = asked
        self._record = record
        self._sink = sink
        self._place = -1
        self._prefill: Engine | None = None
        self._decode: Engine | None = None
        self._same: Engine | None = None
        self._call: Call | None = None
        self._leg: PrefillLeg | None = None
        self._hedge: Asking | None = None
        self._ticket: Ticket | None = None
        self._streams = body.get("stream") is True
        self._stream: Stream | None = None
        self._alone = False
        self._paused = False
        self._fruitless = self._furthest = self._leases_ended = 0
        self._headed = False
        self._continued = False
        self._refused: list[Engine] = []
        self._unfit: list[Engine] = []
        self._began = self._first_at = self._refused_at = 0.0
        self._only = False
        self._lacking = self._met = 0
        self._coming = 0
        self._coming_at: Engine | None = None

    @property
    def refused(self) -> Sequence[Engine]:
        """Give the engines that have failed it of late, and those that it has no use for."""
        return [*self._refused, *self._unfit] if self._unfit else self._refused

    def start(self) -> None:
        """Begin, or begin again; often called by a timer, where a bug would hang the request."""
        if self.state is State.SETTLED:
            return
        self.state = State.WAITING
        try:
            self._begin()
        except Exception:
            note_own_failure()
            self._dead_end()

    def _begin(self) -> None:
        """Choose engines and ask prefill."""
        if self._ticket is not None and self._ticket.cause is None:
            self._hand_over_to_another()
            return
        desk = self._desk
        asked = self._asked
        self._forgive()
        refused: Sequence[Engine] = self._refused
        left = None
        if len(desk.waiting) and not self._headed and not desk.too_large(asked):
            left = desk.waiting.left_over(self)
            if left is not None:
                refused = [*refused, *(one for one in desk.fleet.healthy(Role.DECODE) if one not in left)]
        decode = desk.choose(Role.DECODE, asked, refused)
        if decode is None:
            self._wait(Role.DECODE if left is None else None)
            return
        prefill = self._same
        if prefill is None or not desk.fleet.may_serve(prefill):
            prefill = desk.choose(Role.PREFILL, asked, refused)
        if prefill is not None and desk.picky and not desk.fits(prefill, decode):
            prefill, decode = desk.ends(asked, refused, prefill) or (None, decode)
        if not desk.has_room(decode, asked) and not desk.too_large(asked):
            self._wait(None)
        elif prefill is None:
            if desk.decode_only and not self._refused_some(Role.PREFILL):
                self._decode_alone(decode, "decode_only:no_prefill")
            else:
                self._wait(Role.PREFILL)
        elif self._leases_ended > 1 and desk.decode_only:
            self._decode_alone(decode, "decode_only:lease_ended")
        elif desk.bypass(asked, prefill, decode):
            self._decode_alone(decode, f"{desk.policies[Role.DECODE].name}:bypass")
        else:
            self._ask_prefill(prefill, decode)

    def _refuse(self, engine: Engine) -> None:
        """Rather have another engine from now on."""
        self._refused.append(engine)
        self._refused_at = self._desk.loop.time()

    def _forgive(self) -> None:
        """Forget what engines have failed it that may be well again: those that were away, after a while all.

        Not so for its last try, which is not to be spent at who keeps failing.
        """
        refused, fleet = self._refused, self._desk.fleet
        if not refused:
            return
        grudge = _GRUDGE * 2 ** max(0, self._fruitless - 1)
        if self._fruitless < EACH and self._desk.loop.time() - self._refused_at > grudge:
            refused.clear()
        else:
            self._refused = [engine for engine in refused if fleet.may_serve(engine)]

    def _refused_some(self, role: Role) -> bool:
        """Whether there are engines of a role that are only not asked because they have failed this request before."""
        may_serve = self._desk.fleet.may_serve
        return any(engine.role is role and may_serve(engine) for engine in self._refused)

    def _wait(self, role: Role | None) -> None:
        """Wait for an engine of a role, or for room (None)."""
        desk = self._desk
        if role is not None and (self._refused_some(Role.PREFILL) or self._refused_some(Role.DECODE)):
            # All there are have failed this request before, which is better than nothing, a little later.
            self._refused.clear()
            desk.later(self, self._fruitless)
            return
        self._unfit = desk.unfit(self._asked) if role is None else []
        desk.waiting.park(self, role, self._headed or self._ticket is not None)

    def gave_up(self, role: Role | None, seconds: float, retry_after: int) -> None:
        """It waited as long as a request may wait (`pdrouter.handoff.waiting`)."""
        if role is not None:
            self._settle_failed(no_engine(role, seconds, retry_after))
            return
        if self._refused_some(Role.DECODE):  # they may have room, and it is them or nobody
            self._refused.clear()
            self.start()
            return
        headers = b"retry-after: %d\r\n" % retry_after
        message = f"No decode engine had room for the request within {seconds:.0f} s; try again in {retry_after} s."
        self._settle_failed(leg_failure(429, Role.DECODE, "no_room", message, headers))

    # prefill

    def _ask_prefill(self, prefill: Engine, decode: Engine) -> None:
        desk = self._desk
        self._note(prefill, decode)
        self._alone = False
        self.state = State.PREFILL
        self._began = perf_counter()
        if self._record.prefill_sent_at is None:
            self._record.prefill_sent_at = self._began
        self._reserve(decode)
        leg = self._leg = PrefillLeg(self, prefill, desk.loop.time())
        self._call = self._prefill_call(leg, self._way)
        if desk.hedging is not None:
            desk.hedging.start(self)

    def _prefill_call(self, leg: PrefillLeg, way: Way) -> Call:
        desk, engine = self._desk, leg.engine
        request = way.request(engine, prefill_leg(self._body))
        tokens = self._asked.tokens
        queued = self._lacking = desk.routed(Role.PREFILL, self._asked, engine)
        self._only = not engine.in_flight
        return desk.pool.call(engine, request, leg, held=tokens, queued=queued, whole=True)

    def expired(self, deadlines: Deadlines) -> None:
        """Prefill takes long: ask another engine too (`Desk.hedging`)."""
        prefill, decode, desk, asked = self._prefill, self._decode, self._desk, self._asked
        if self.state is not State.PREFILL or self._hedge is not None or prefill is None or decode is None:
            return
        if self._fruitless >= EACH:
            return
        other = desk.choose(Role.PREFILL, asked, [*self._refused, prefill])
        if other is None or not desk.has_room(other, asked) or (desk.picky and not desk.fits(other, decode)):
            return
        if not desk.retries.spend(owing=False):
            return
        desk.hedged += 1
        self._record.retries += 1
        leg, way = PrefillLeg(self, other, desk.loop.time()), self._way.twin()
        self._hedge = Asking(leg, self._prefill_call(leg, way), way)
        self._only = False

    def _turn_to(self, engine: Engine) -> None:
        """Of two prefill legs make an engine's the one that counts."""
        hedge = self._hedge
        if hedge is not None and hedge.leg.engine is engine:
            assert self._leg is not None
            assert self._call is not None
            self._hedge = Asking(self._leg, self._call, self._way)
            self._take_up(hedge)

    def _prefill_lost(self, engine: Engine, failure: Failure) -> None:
        """Prefill failed: wait for the other engine that is asked, or begin again."""
        hedge = self._hedge
        if hedge is None:
            self._again(engine, failure)
            return
        self._fruitless += 1  # both engines may have died of the request
        self._refuse(engine)
        self._hedge = None
        self._take_up(hedge)

    def _take_up(self, asking: Asking) -> None:
        """Go on with a prefill leg."""
        decode = self._decode
        assert decode is not None
        self._leg, self._call, self._way = asking.leg, asking.call, asking.way
        self._note(asking.leg.engine, decode)

    def _forget(self, asking: Asking) -> None:
        """Let a prefill leg end without its pair."""
        decode = self._decode
        assert decode is not None
        Unwanted(self._desk, asking, decode, self._body.get("model"), self._asked.tokens).begin()

    def _reserve(self, decode: Engine | None) -> None:
        """Keep room on a decode engine for when prefill is done."""
        before = self._coming_at
        if before is not None:
            before.own_coming -= self._coming
            self._desk.changed(before)
        self._coming_at = decode
        if decode is not None:
            self._coming = self._desk.needs(self._asked)
            decode.own_coming += self._coming
            self._desk.changed(decode)

    def _note(self, prefill: Engine | None, decode: Engine) -> None:
        self._prefill, self._decode = prefill, decode
        record = self._record
        url = "none" if prefill is None else prefill.url
        if self._place < 0:
            self._place = len(record.decode)
            record.prefill.append(url)
            record.decode.append(decode.url)
        else:
            record.prefill[self._place] = url
            record.decode[self._place] = decode.url

    def prefilled(self, engine: Engine, status: int, headers: Headers, body: bytes) -> None:
        """Prefill has answered."""
        now = perf_counter()
        if self._hedge is not None:
            self._turn_to(engine)
        leg = self._leg
        assert leg is not None
        self._call = None
        self._leg = None  # it refers back to this: no work for the garbage collector, which would hold up all requests
        self._way.ended(status)
        desk = self._desk
        if status != 200:
            desk.fleet.ended(engine, status)
        record = self._record
        if record.prefill_seconds is None:
            record.prefill_seconds = now - self._began
        if status != 200:
            failure = engine_failure(status, body, headers, Role.PREFILL, engine.url)
            if status < 500:
                self._settle_failed(failure)
            else:
                self._prefill_lost(engine, failure)
            return
        assert self._decode is not None
        try:
            came = desk.pool.arrivals.earliest(leg.asked)
            ticket = read_ticket(body, engine, self._decode, self._body.get("model"), came, desk.lease)
        except TicketError as error:
            desk.fleet.failed(engine, "ticket")
            message = f"The prefill engine {engine.url} gave no usable ticket: {error}."
            self._prefill_lost(engine, leg_failure(502, Role.PREFILL, "ticket", message))
            return
        if self._hedge is not None:
            hedge, self._hedge = self._hedge, None
            self._forget(hedge)
        if desk.hedging is not None:
            desk.hedging.stop(self)
        record.ticket_at = now
        desk.fleet.succeeded(engine)
        times = desk.times.get(Role.PREFILL)
        if times is not None and self._only:
            times.prefilled(self._lacking, now - self._began)
        self._ticket = ticket
        self._asked.counted = ticket.prompt_tokens or 0
        desk.issued(ticket, self._asked.tokens)
        decode = self._decode
        if desk.chooses_late or not desk.fleet.may_serve(decode):
            # By now others have begun or ended: the choice made before prefill only served to see whether there is one.
            self._hand_over_to_another(decode if desk.fleet.may_serve(decode) else None)
        else:
            self._hand_over(decode, ticket)

    def prefill_failed(self, engine: Engine, error: UpstreamError) -> None:
        """Prefill has not answered."""
        if isinstance(error, DeadEndError):
            self._dead_end()
            return
        if self._hedge is not None:
            self._turn_to(engine)
        self._call = None
        self._leg = None  # it refers back to this: no work for the garbage collector, which would hold up all requests
        self._way.failed(error.reason)
        message = f"The prefill leg failed: {error}."
        self._desk.broken(engine, error)
        failure = leg_failure(502, Role.PREFILL, error.reason, message)
        if not isinstance(error, ConnectError):
            self._prefill_lost(engine, failure)
            return
        self._refuse(engine)
        hedge = self._hedge
        if hedge is None:
            self._start_over()
        else:
            self._hedge = None
            self._take_up(hedge)

    def _start_over(self) -> None:
        """Begin again at no cost: the engine has not seen the request."""
        self._reserve(None)
        self.state = State.WAITING
        self._desk.later(self, 0)

    def prefill_too_large(self, engine: Engine) -> None:
        """Prefill answers more than can be held."""
        self._break_off()
        self._way.failed("aborted")
        message = f"The answer of the prefill engine {engine.url} is larger than {LARGEST} bytes."
        self._settle_failed(leg_failure(502, Role.PREFILL, "body_over_limit", message))

    # decode

    def _hand_over_to_another(self, otherwise: Engine | None = None) -> None:
        """Choose who decodes, now that there is a ticket."""
        desk, ticket, prefill = self._desk, self._ticket, self._prefill
        assert ticket is not None
        assert prefill is not None
        self._reserve(None)
        ticket.handed = False
        other = prefill if desk.picky else None
        decode = desk.choose(Role.DECODE, self._asked, self._refused, other) or otherwise
        if decode is None:  # one that has failed this request, or a closed way, is better than a second prefill
            decode = desk.choose(Role.DECODE, self._asked, (), other, closed=True)
        if decode is None:
            if not desk.fleet.healthy(Role.DECODE):
                self.state = State.WAITING
                self._wait(Role.DECODE)
            else:
                self._give_back(Cause.RELEASED)
                message = f"No decode engine can fetch from {prefill.url}; see /debug/edges."
                self._again(None, leg_failure(503, Role.DECODE, "no_way", message))
            return
        self._note(prefill, decode)
        self._hand_over(decode, ticket)

    def _hand_over(self, decode: Engine, ticket: Ticket, greeted: bool = False) -> None:
        """Send the ticket; a quiet engine is asked first: frozen, it would read the ticket after its lease."""
        desk = self._desk
        if ticket.cause is not None or ticket.expires < desk.loop.time():
            self._expired()
            return
        if decode.quiet and not greeted:
            self.state = State.GREETING
            self._call = desk.greet(decode, Greeting(self, decode))
            return
        ticket.handed = True
        self._lacking = desk.routed(Role.DECODE, self._asked, decode)
        self._send_decode(decode, decode_leg(self._bare, ticket.params, self._tells_ids()), ticket, 0)

    def greeted(self, engine: Engine) -> None:
        """A decode engine that was quiet has answered."""
        if self.state is State.GREETING and self._ticket is not None:
            self._call = None
            self._hand_over(engine, self._ticket, True)

    def not_greeted(self, engine: Engine, error: UpstreamError) -> None:
        """A decode engine that was quiet has not answered; it has not seen the ticket, which another may have."""
        if isinstance(error, DeadEndError):
            self._dead_end()
            return
        if self.state is not State.GREETING:
            return
        self._call = None
        self.state = State.WAITING
        if isinstance(error, ConnectError | VanishedError):
            self._desk.broken(engine, error)
        # Where there is no other it is asked again, but not all the time.
        self._desk.later(self, 3 if engine in self._refused else 0)
        self._refuse(engine)

    def _tells_ids(self) -> bool:
        """Begin to follow a stream that could go on elsewhere; tell whether ids must be asked for."""
        if self._stream is None:
            if not self._streams or not self._desk.continues:
                return False
            if why_not(self._path, self._body):
                return False
            self._stream = Stream(self._path, self._body)
        return not self._body.get(IDS_FIELD)

    def _decode_alone(self, decode: Engine, reason: str) -> None:
        """Let decode compute the prompt too."""
        self._alone = True
        self._note(None, decode)
        self._record.reason = reason
        body = decode_leg(self._bare, None, True) if self._tells_ids() else self._bare
        self._send_decode(decode, body, None, self._desk.routed(Role.DECODE, self._asked, decode))

    def _send_decode(self, decode: Engine, body: bytes, ticket: Ticket | None, queued: int) -> None:
        desk = self._desk
        self.state = State.DECODE
        self._reserve(None)
        request = self._way.request(decode, salted(body, decode.salt, self._asked.salt))
        if self._record.decode_sent_at is None:
            self._record.decode_sent_at = perf_counter()
        if self._stream is not None:
            self._stream.attempt()
        leg = DecodeLeg(self, decode, self._stream, not self._streams, desk.learns(Role.DECODE))
        call = desk.pool.call(
            decode, request, leg, perishable=ticket, held=desk.needs(self._asked), queued=queued,
            whole=not self._streams,
        )  # fmt: skip
        self._call = call
        if self._paused:
            call.pause()

    def began(self, engine: Engine, status: int, headers: Headers) -> None:
        """The first bytes of decode's answer are there: it has the KV blocks."""
        ticket = self._ticket
        times = self._desk.times.get(Role.DECODE)
        if ticket is not None:
            ticket.fetched = True
        if ticket is not None and self._desk.ledger.settle(ticket, Cause.COLLECTED):
            # Of an answer in one piece nothing is heard before it is complete, so its time is not the handoff's.
            took = self._desk.loop.time() - ticket.received if self._streams else None
            self._desk.edges.worked(ticket.prefill, engine, took)
            if took is not None and times is not None:
                times.handed_over(self._lacking, took)
        if times is not None:
            self._first_at = perf_counter()
            self._met = engine.held_tokens
        if not self._headed:
            self._headed = True
            self._sink.head(status, headers)

    def decoded(self, engine: Engine, answer: bytes | None) -> None:
        """Decode's answer is complete."""
        self._way.ended(200)
        self._desk.fleet.succeeded(engine)
        if self.state is State.SETTLED:
            return
        self.state = State.SETTLED
        self._call = None
        self._count()
        times = self._desk.times.get(Role.DECODE)
        stream = self._stream
        if times is not None and stream is not None and not self._continued:
            held = (self._met + engine.held_tokens) / 2
            times.generated(held, stream.generated, perf_counter() - self._first_at)
        if stream is not None:
            self._record.generated = stream.generated
        self._desk.waiting.wake()
        self._sink.end()
        if answer is not None:
            self._desk.answered(Role.DECODE, self._asked, engine, answer)

    def decode_refused(self, engine: Engine, status: int, headers: Headers, body: bytes) -> None:
        """Decode has answered with an error."""
        self._call = None
        self._way.ended(status)
        self._desk.fleet.ended(engine, status)
        failure = engine_failure(status, body, headers, Role.DECODE, engine.url)
        if status < 500:
            # What failed while the engine parsed the body has left the ticket unused.
            self._give_back(Cause.REFUSED)
            self._settle_failed(failure)
        else:
            self._decode_lost(engine, failure)

    def decode_failed(self, engine: Engine, error: UpstreamError) -> None:
        """Decode has not answered to the end."""
        if isinstance(error, DeadEndError):
            self._dead_end()
            return
        self._way.failed(error.reason)
        self._break_off()
        if self.state is State.SETTLED:
            return
        if isinstance(error, LeaseEndedError):
            self._lease_ended(engine)
            return
        if isinstance(error, TooLateError):
            self._expired()
            return
        if isinstance(error, OtherStreamError):
            self._not_continued(error)
            return
        if isinstance(error, EngineEventError):
            self._desk.fleet.ended(engine, error.status)
            failure = Failure(error.status, error.event, Role.DECODE, f"status_{error.status}")
            if error.status < 500:
                self._give_back(Cause.REFUSED)
                self._settle_failed(failure)
                return
        else:
            self._desk.broken(engine, error)
            failure = leg_failure(502, Role.DECODE, error.reason, f"The decode leg failed: {error}.")
        if isinstance(error, ConnectError):
            self._refuse(engine)
            ticket = self._ticket
            if ticket is None or self._alone:
                self._start_over()
                return
            self._hand_over_to_another()
            return
        self._decode_lost(engine, failure, isinstance(error, StalledError))

    def _decode_lost(self, engine: Engine, failure: Failure, may_wake: bool = False) -> None:
        """Decode failed with the request in its hands; an engine that only stalled may go on with it one day."""
        ticket = self._ticket
        if ticket is not None and ticket.cause is None:
            if self._desk.fleet.may_serve(engine) and engine.failures == 1:  # it served others before this
                self._desk.edges.failed(ticket.prefill, engine, failure.reason)
            if may_wake:
                # It may wake and fetch by this ticket, so the blocks had better stay until the lease ends. Or later.
                self._desk.pool.suspect(engine)
                ticket.handed = False
                self._ticket = None
            else:
                self._give_back(Cause.LOST)
        if self._headed and self._stream is not None:
            self._go_on(engine, failure)
        elif self._headed:
            self._settle_failed(failure)
        else:
            self._again(engine, failure)

    def _go_on(self, engine: Engine, failure: Failure) -> None:
        """Continue a stream on other engines."""
        stream = self._stream
        assert stream is not None
        generated = stream.generated
        if generated > self._furthest:  # what the client has may be told again without an end, which is no progress
            self._furthest = generated
            self._fruitless = 0
        try:
            told = stream.go_on(self._desk.longest_context())
        except CannotGoOnError as error:
            self._not_continued(error)
            return
        if isinstance(told, bytes):
            self.state = State.SETTLED
            self.passed(told)
            self._count()
            self._sink.end()
            return
        self._record.continued += 1
        self._continued = True
        if told is not None:
            self._body = told
            self._bare = encoded(told)
            self._asked = Prompt(self._asked.key, told, self._asked.session)
            if self._path == CHAT:
                self._way.at(COMPLETIONS.encode())
        self._again(engine, failure)

    def _not_continued(self, why: Exception) -> None:
        message = f"The stream broke off and cannot go on at another engine: {why}."
        self._settle_failed(leg_failure(502, Role.DECODE, "not_continued", message))

    def _expired(self) -> None:
        """The ticket's time is over before decode could have it: prefill again, at the same engine for its cache."""
        self._ticket_over()
        self._again(None, leg_failure(504, Role.DECODE, "ticket_expired", "The ticket expired before decode had it."))

    def _ticket_over(self) -> None:
        """Close the ticket; the same prefill engine has the prompt cached."""
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            self._desk.ledger.settle(ticket, Cause.EXPIRED)
            self._same = ticket.prefill

    def _lease_ended(self, decode: Engine) -> None:
        """The lease may have ended in decode's queue: begin again, which is not the request's fault.

        Another engine had better decode, and the second time without any lease. Where none may decode alone, it counts
        from the third time on, for leases of others may end for ever.
        """
        self._ticket_over()
        self._leases_ended += 1
        if self._leases_ended > 2:
            self._again(decode, leg_failure(504, Role.DECODE, "lease_ended", "Its leases ended before decode had it."))
            return
        self._refuse(decode)
        self._record.retries += 1
        self._start_over()

    # failing

    def _again(self, engine: Engine | None, failure: Failure) -> None:
        """Try with other engines, unless this request has had its tries or there are too many tries in all."""
        desk = self._desk
        self._reserve(None)
        self._fruitless += 1
        if engine is not None:
            self._refuse(engine)
            if engine.role is Role.DECODE:
                self._same = self._prefill
            elif self._same is engine:
                self._same = None
        if self._fruitless > EACH or not desk.retries.spend():
            self._settle_failed(failure)
            return
        self._record.retries += 1
        self._ticket = None
        self._alone = False
        self.state = State.WAITING
        desk.later(self, self._fruitless - 1)

    def _give_back(self, cause: Cause) -> None:
        """Have the blocks of a ticket freed that may not have been fetched."""
        ticket, self._ticket = self._ticket, None
        if ticket is not None and ticket.cause is None:
            self._desk.release.give_back(ticket, self._body.get("model"), cause, self._way)

    def _settle_failed(self, failure: Failure) -> None:
        """End without an answer."""
        if self.state is State.SETTLED:
            return
        self.state = State.SETTLED
        self._break_off()
        self._give_back(Cause.RELEASED)
        self._reserve(None)
        self._desk.waiting.wake()
        self._sink.failed(failure)

    def _dead_end(self) -> None:
        """The router itself failed where nothing else can be tried: the sink aborts what is left of this."""
        self.state = State.SETTLED
        self._sink.failed(router_failure())

    def _count(self) -> None:
        record = self._record
        ticket = self._ticket
        if ticket is not None and ticket.prompt_tokens is not None and not self._continued:
            record.prompt_tokens = (record.prompt_tokens or 0) + ticket.prompt_tokens

    def _break_off(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.abort()
        hedge, self._hedge = self._hedge, None
        if hedge is not None:
            hedge.break_off()

    def abort(self) -> None:
        """Break off whatever is under way; the sink hears nothing more."""
        desk = self._desk
        desk.waiting.leave(self)
        if desk.hedging is not None:
            desk.hedging.stop(self)
        state, self.state = self.state, State.SETTLED
        leg, call = self._leg, self._call
        if state is State.PREFILL and leg is not None and call is not None:
            self._call = None
            self._forget(Asking(leg, call, self._way))
            hedge, self._hedge = self._hedge, None
            if hedge is not None:
                self._forget(hedge)
        else:
            self._break_off()
            self._way.failed("aborted")
        self._give_back(Cause.RELEASED)
        self._reserve(None)

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
