"""Whatever happens in whatever order, a handoff ends once and gives back everything that it took.

The handoff is the real one; time, connections and engines are driven by hand, so that every order can be had.
"""

import heapq
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdrouter.discovery.found import Found
from pdrouter.fleet.engine import Engine, Role
from pdrouter.fleet.fleet import Fleet
from pdrouter.handoff.desk import Desk, Rules
from pdrouter.handoff.failure import Failure
from pdrouter.handoff.pair import Pair
from pdrouter.handoff.retries import EACH
from pdrouter.handoff.ticket import Cause, Ticket
from pdrouter.handoff.way import Way
from pdrouter.observe.record import Record
from pdrouter.openai.features import Prompt
from pdrouter.policies import POLICIES, RoutingKey
from pdrouter.upstream.arrivals import Arrivals
from pdrouter.upstream.errors import ClosedError, ConnectError, StalledError, TooLateError, UpstreamError
from router.fakes import TICKET

LEASE = 10.0
IDS = b'"prompt_token_ids":[1,2],"token_ids":[%d]'


class Loop:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0
        self._timers: list[tuple[float, int, Any]] = []
        self._count = 0

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, what: Callable[..., object], *args: Any) -> Any:
        self._count += 1
        timer = Timer(what, args)
        heapq.heappush(self._timers, (self.now + seconds, self._count, timer))
        return timer

    def call_soon(self, what: Callable[..., object], *args: Any) -> Any:
        return self.call_later(0, what, *args)

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            at, _, timer = heapq.heappop(self._timers)
            self.now = max(self.now, at)
            timer.run()
        self.now = end


class Timer:
    def __init__(self, what: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._what: Callable[..., object] | None = what
        self._args = args

    def cancel(self) -> None:
        self._what = None

    def run(self) -> None:
        if self._what is not None:
            self._what(*self._args)


class Call:
    """A request to an engine that waits for the test to answer it."""

    def __init__(self, pool: "Pool", engine: Engine, request: bytes, receiver: Any, counted: bool, held: int) -> None:
        self.engine, self.request, self.receiver = engine, request, receiver
        self.perishable: Ticket | None = None
        self.begun = False
        self._pool, self._counted, self._held = pool, counted, held
        if counted:
            engine.own_in_flight += 1
            engine.own_held += held

    def over(self) -> None:
        if self in self._pool.open:
            self._pool.open.remove(self)
            if self._counted:
                self.engine.own_in_flight -= 1
                self.engine.own_held -= self._held

    def abort(self) -> None:
        self.over()

    def fail(self, error: UpstreamError) -> None:
        self.abort()
        self.receiver.failed(error)

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class Pool:
    rows = None

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.arrivals = Arrivals(loop)  # type: ignore[arg-type]
        self.open: list[Call] = []

    def call(
        self, engine: Engine, request: bytes, receiver: Any, *, perishable: Any = None, counted: bool = True,
        held: int = 0, queued: int = 0, whole: bool = False,
    ) -> Call:  # fmt: skip
        call = Call(self, engine, request, receiver, counted, held)
        call.perishable = perishable
        self.open.append(call)
        return call

    def suspect(self, engine: Engine) -> None: ...

    def left(self, engine: Engine) -> None:
        for call in [one for one in self.open if one.engine is engine]:
            call.over()
            call.receiver.failed(ClosedError("gone"))


class Observer:
    def finished(self, record: Record) -> None: ...


class Admission:
    running = 1


class Sink:
    """Counts how often the client's answer ended."""

    def __init__(self) -> None:
        self.heads = self.ends = 0
        self.pieces: list[bytes] = []
        self.failures: list[Failure] = []

    def head(self, status: int, headers: Any) -> None:
        self.heads += 1

    def body(self, data: bytes) -> None:
        assert self.heads == 1, "no body before the head"
        assert self.ends + len(self.failures) == 0, "no body after the end"
        self.pieces.append(data)

    def end(self) -> None:
        self.ends += 1

    def failed(self, failure: Failure) -> None:
        self.failures.append(failure)


def prefilled(life: str) -> bytes:
    ticket = TICKET | {"remote_engine_id": life}
    usage = {"prompt_tokens": 7, "total_tokens": 8, "completion_tokens": 1}
    return json.dumps({"model": "tiny", "usage": usage, "kv_transfer_params": ticket}, separators=(",", ":")).encode()


def chunk(number: int, finish: str | None = None) -> bytes:
    return (
        b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"tiny","choices":[{"index":0,"text":'
        b'"w%d",'
        b'"logprobs":null,"finish_reason":%b,"stop_reason":null,%b}]}\n\n'
        % (number, json.dumps(finish).encode(), IDS % number)
    )


class World:
    """A router's inside with one request in it."""

    def __init__(self, stream: bool, hedge: float = 0, **fields: Any) -> None:
        self.loop = Loop()
        loop: Any = self.loop
        self.fleet = Fleet(loop)
        self.pool = Pool(self.loop)
        policies: Any = {role: POLICIES["round_robin"](role.value) for role in Role}
        rules = Rules(
            lease=LEASE, request_timeout=600, queue_size=4, queue_timeout=20, continues=True, decode_only=True,
            hedge=hedge, api_key=None,
        )  # fmt: skip
        pool: Any = self.pool
        observer: Any = Observer()
        admission: Any = Admission()
        self.desk = Desk(loop, self.fleet, pool, policies, observer, None, None, admission, rules)
        self.fleet.watch(self.desk)
        self.fleet.listen(self.desk)
        self.fleet.on_choice = self.desk.waiting.wake
        self.found = [
            Found(f"http://{role[0]}{n}:1", f"{role}{n}", Role(role)) for role in ("prefill", "decode") for n in (1, 2)
        ]
        self.fleet.report("test", self.found)
        self.engines = list(self.fleet)
        for engine in self.engines:
            self.fleet.mark(engine, True, "test")
            if engine.role is Role.DECODE:
                engine.kv_tokens = 70  # room for one request
        self.issued: list[Ticket] = []
        issue = self.desk.ledger.issued

        def issued(ticket: Ticket, tokens: int) -> bool:
            self.issued.append(ticket)
            return issue(ticket, tokens)

        self.settled: list[tuple[Ticket, Cause]] = []
        settle = self.desk.ledger.settle

        def settle_once(ticket: Ticket, cause: Cause) -> bool:
            first = settle(ticket, cause)
            if first:
                self.settled.append((ticket, cause))
            return first

        # Both are looked up at each call, so the ledger itself is what is watched.
        self.ledger = self.desk.ledger
        object.__setattr__(self.ledger, "issued", issued)
        object.__setattr__(self.ledger, "settle", settle_once)
        body: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 50, "stream": stream} | fields
        self.sink = Sink()
        self.record = Record("r", "/v1/completions", generation=True)
        self.pair = Pair(
            self.desk, Way(b"POST", b"/v1/completions", b"", "r"), "/v1/completions", body, json.dumps(body).encode(),
            Prompt(RoutingKey("k", "test"), body), self.record, self.sink,
        )  # fmt: skip
        self.gone = False
        self.number = 0
        self.pair.start()

    def is_prefill(self, call: Call) -> bool:
        return call.engine.role is Role.PREFILL

    def do(self, what: str, which: int) -> None:
        """One event: something an engine, the client, the clock or an administrator does."""
        calls = self.pool.open
        call = calls[which % len(calls)] if calls else None
        engine = self.engines[which % len(self.engines)]
        if what == "time":
            self.loop.pass_time(which % 7 + 0.01)
        elif what == "client gone":
            if not (self.gone or self.sink.ends or self.sink.failures):
                self.gone = True
                self.pair.abort()
        elif what == "down":
            self.fleet.mark(engine, False, "test")
        elif what == "up":
            self.fleet.mark(engine, True, "test")
        elif what == "way closed":
            self.desk.edges.failed(self.engines[which % 2], self.engines[2 + which // 2 % 2], "test")
        elif what == "other kind":
            self.fleet.grouped(engine, ("", "old", "new")[which % 3])
        elif what == "leaves":
            self.fleet.report("test", [one for one in self.found if one.url != engine.url])
            self.fleet.report("test", self.found)
            for one in self.fleet:
                self.fleet.mark(one, True, "test")
        elif call is not None:
            self.answer(call, what, which)
        self.loop.pass_time(0)

    def answer(self, call: Call, what: str, which: int) -> None:
        receiver = call.receiver
        errors: dict[str, UpstreamError] = {
            "refused": ConnectError("no"), "closed": ClosedError("no"), "stalled": StalledError("no"),
            "late": TooLateError("no"),
        }  # fmt: skip
        if call.request.startswith(b"GET /health"):
            if what in ("ok", "closed", "refused", "stalled"):
                call.over()
                if what == "ok":
                    receiver.head(200, [])
                    receiver.end()
                else:
                    receiver.failed(errors[what])
            return
        if what in errors:
            if (what == "late" and call.perishable is None) or (what in ("refused", "late") and call.begun):
                return
            call.over()
            receiver.failed(errors[what])
        elif what == "5xx" or (what == "4xx" and not call.begun):
            if call.begun:
                return
            call.over()
            receiver.head(500 if what == "5xx" else 400, [(b"content-type", b"application/json")])
            receiver.body(b'{"error":{"message":"no"}}')
            receiver.end()
        elif b'"min_tokens":2' in call.request:
            if what == "ok":
                call.over()
                receiver.head(400, [])
                receiver.end()
        elif self.is_prefill(call):
            if what in ("ok", "bad ticket"):
                call.over()
                receiver.head(200, [])
                receiver.body(prefilled(f"life{which % 2}") if what == "ok" else b'{"model":"tiny"}')
                receiver.end()
        elif what in ("ok", "piece", "error event"):
            self.decode(call, what, b'"stream":true' in call.request.replace(b" ", b""))

    def decode(self, call: Call, what: str, stream: bool) -> None:
        receiver = call.receiver
        if not call.begun:
            receiver.head(200, [])
        call.begun = True
        self.number += 1
        if not stream:
            receiver.body(b'{"choices":[]}')
        elif what == "error event":
            receiver.body(b'data: {"error":{"code":500,"message":"no"}}\n\n')
        else:
            receiver.body(chunk(self.number, "length" if what == "ok" else None))
        if what == "ok" and call in self.pool.open:
            if stream:
                receiver.body(b"data: [DONE]\n\n")
            call.over()
            receiver.end()

    def get_well(self) -> None:
        """Let all engines be well and answer whatever they are asked, for longer than a request may wait."""
        for _ in range(60):
            for engine in self.fleet:
                self.fleet.mark(engine, True, "test")
            for call in list(self.pool.open):
                if call in self.pool.open:
                    self.answer(call, "ok", 0)
            self.loop.pass_time(1)

    def finish(self) -> None:
        """Let the client leave and all leases end."""
        self.do("client gone", 0)
        for _ in range(4):
            for call in list(self.pool.open):
                if call in self.pool.open:
                    self.answer(call, "ok" if not self.is_prefill(call) else "closed", 0)
            self.loop.pass_time(3 * LEASE)


EVENTS = (
    "ok", "ok", "ok", "piece", "piece", "bad ticket", "4xx", "5xx", "refused", "closed", "stalled", "late",
    "error event", "time", "client gone", "down", "up", "up", "leaves", "way closed", "other kind",
)  # fmt: skip


@pytest.mark.parametrize("hedge", [0, 1.5], ids=["", "hedged"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(events=st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 30)), max_size=30))
def test_every_handoff_ends_once_and_every_ticket_is_settled_once(
    stream: bool, hedge: float, events: list[tuple[str, int]]
) -> None:
    world = World(stream, hedge)
    world.loop.pass_time(0)
    for what, which in events:
        world.do(what, which)
        for engine in world.engines:
            assert engine.own_in_flight >= 0
            assert engine.own_coming >= 0
            assert engine.own_pinned >= 0
        assert len(world.settled) == len({id(ticket) for ticket, _ in world.settled})
    world.finish()
    sink = world.sink
    assert sink.ends + len(sink.failures) + world.gone == 1, (sink.ends, sink.failures, world.gone)
    assert sink.heads <= 1
    assert {id(ticket) for ticket, _ in world.settled} == {id(ticket) for ticket in world.issued}
    assert len(world.ledger) == 0
    assert sum(world.ledger.ended.values()) == len(world.issued)
    assert len(world.desk.waiting) == 0
    for engine in [*world.engines, *world.fleet]:
        told = (engine.own_in_flight, engine.own_held, engine.own_queued, engine.own_coming, engine.own_pinned)
        assert told == (0, 0, 0, 0, 0), engine.url


@pytest.mark.parametrize("hedge", [0, 1.5], ids=["", "hedged"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    events=st.lists(
        st.tuples(st.sampled_from([one for one in EVENTS if one != "client gone"]), st.integers(0, 30)), max_size=30
    )
)
def test_a_request_ends_by_itself_when_engines_are_well_again(
    stream: bool, hedge: float, events: list[tuple[str, int]]
) -> None:
    world = World(stream, hedge)
    world.loop.pass_time(0)
    for what, which in events:
        world.do(what, which)
    world.get_well()
    assert world.sink.ends + len(world.sink.failures) == 1, world.pair.state
    assert [one.reason for one in world.sink.failures if one.reason == "no_room"] == [], "it is in nobody's way"
    assert world.pool.open == []
    assert len(world.desk.waiting) == 0


@given(
    texts=st.lists(st.sampled_from(["ok", "piece", "closed", "refused", "5xx", "stalled", "down", "up"]), max_size=40)
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_continued_stream_has_every_piece_once_and_in_order(texts: list[str]) -> None:
    """Each piece that an engine told before it failed stays; the next engine goes on with the ids after it."""
    world = World(True)
    world.loop.pass_time(0)
    for number, what in enumerate(texts):
        world.do(what, number)
    sent = b"".join(world.sink.pieces)
    words = [
        json.loads(event[6:])["choices"][0]["text"] for event in sent.split(b"\n\n") if event.startswith(b"data: {")
    ]
    assert words == sorted(words, key=lambda word: int(word[1:])), "in the order in which they were generated"
    assert len(words) == len(set(words))
    assert b'"token_ids":[' not in sent, "ids that the client did not ask for"
    for call in world.pool.open:
        told = call.request.partition(b"\r\n\r\n")[2]
        if world.record.continued and b'"prompt":[' in told and b'"min_tokens":2' not in told:
            prompt = json.loads(told)["prompt"]
            assert prompt[:2] == [1, 2]
            assert [f"w{one}" for one in prompt[2:]] == words[: len(prompt) - 2], "what was told is the new prompt"


def test_a_stream_that_only_repeats_itself_gets_no_further_and_ends() -> None:
    """A long stop string holds text back: each continuation begins before what the client has, and dies there."""
    world = World(True, stop=["a rather long stop string"])
    died = 0
    for _ in range(200):
        for engine in world.fleet:
            world.fleet.mark(engine, True, "test")
        for call in world.pool.open[:1]:
            if world.is_prefill(call) or b'"min_tokens":2' in call.request or call.request.startswith(b"GET"):
                world.answer(call, "ok", 0)
                continue
            died += 1
            call.receiver.head(200, [])
            call.begun = True
            told = json.loads(call.request.partition(b"\r\n\r\n")[2])["prompt"]
            for number in range(len(told) - 2 if isinstance(told, list) else 0, 2):
                call.receiver.body(chunk(number))
            world.answer(call, "closed", 0)
        world.loop.pass_time(0.6)
    assert [failure.reason for failure in world.sink.failures] == ["closed"]
    assert died == 1 + EACH
