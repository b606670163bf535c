"""Streams of bytes that are nearly HTTP, and what has to hold when a router gets one, whatever it is.

An independent parser (h11) says which requests a stream has. The router may understand fewer of them, never others:

* nothing fails inside the router, and it serves afterwards;
* each request is answered at most once and in order, and every answer is well-formed;
* what the router understood as complete gets an answer, or the connection is closed;
* engines get well-formed requests only, each made of one that a client sent: same JSON but for what a leg changes.
"""

import asyncio
import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import h11
import orjson
import uvloop
from hypothesis import strategies as st

from pdrouter.app import Router
from pdrouter.openai.legs import WANT_TICKET
from pdrouter.settings import Settings
from router.fakes import TICKET, Answer, until
from router.standing import CLOSING_HEALTH, Reached, Witness, read_answers

# strategies

TOKENS = [
    b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\n\n", b"\0", b" ", b"\t", b":", b",", b";", b"=", b'"', b"\\", b"%0a",
    b"\x7f", b"\xff", b"\x0b", b"\x80", b"0", b"f", b"-", b"+", b"0x", b"#", b"?", b"/", b"//", b"..", b"*", b"@", b"http://a",
    b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"POST ", b"GET ", b"HEAD ", b"CONNECT ",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"Host: a\r\n", b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: identity\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"Connection: close\r\n",
    b"Connection: Upgrade\r\nUpgrade: h2c\r\n", b"Expect: 100-continue\r\n", b"Expect: x\r\n", b" folded\r\n",
    b"0\r\n\r\n", b"1\r\n", b"5;a=b\r\n", b"ffffffffffffffff\r\n", b"10000000000000000\r\n", b"{", b"}", b"[", b"]",
    b"null", b"NaN", b"1e999", b"\\ud800", b'"kv_transfer_params":{},', b'"stream":true,', b'"n":2,', b"A" * 5000,
    b"X: y\r\n" * 200, b"[" * 300, b'{"prompt":"x"}',
]  # fmt: skip

_PLACES = [
    b"/v1/completions", b"/v1/completions", b"/v1/chat/completions", b"/v1/messages", b"/v1/models", b"/health",
    b"/ready", b"/nothing", b"/v1/completions?a=b", b"http://h/v1/completions", b"*", b"/v1/%63ompletions",
    b"/tokenize",
]  # fmt: skip
_HEADERS = [
    b"X-Request-Id: a.b-1", b"X-Session-Id: s", b"Traceparent: 00-1-2-01", b"Authorization: Bearer k", b"X: y",
    b"Content-Type: application/json", b"Connection: keep-alive", b"Accept: */*", b"Baggage: \xff",
    b"Expect: 100-continue", b"Connection: close", b"Connection: Upgrade\r\nUpgrade: websocket", b"X-Request-Id: a b",
    b"Content-Encoding: gzip", b"X-Request-Timeout: 1e-3", b"X-Request-Timeout: nan",
]  # fmt: skip

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12,
)  # fmt: skip
_prompts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40), st.lists(st.integers(0, 9), max_size=6),
    st.lists(st.text("ab", max_size=3), max_size=4), st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=4),
    values,
)  # fmt: skip
_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "prompt": _prompts,
    "messages": st.lists(st.fixed_dictionaries({"role": values, "content": values}), max_size=3) | values,
    "model": st.just("tiny") | values, "max_tokens": st.integers(-1, 9) | values, "n": st.integers(-1, 3) | values,
    "stream": st.booleans() | values, "user": values, "session_params": values, "echo": values, "logprobs": values,
    "tools": values, "cache_salt": values, "kv_transfer_params": values,
    "vllm_xargs": st.dictionaries(st.sampled_from(["kv_transfer_params", "ec_transfer_params", "a"]), values) | values,
    "x": values,
    "max_completion_tokens": values, "min_tokens": values, "stream_options": values, "prompt_logprobs": values,
    "use_beam_search": values, "prompt_embeds": values, "ec_transfer_params": values, "return_token_ids": values,
}  # fmt: skip


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """JSON as clients send it, with fields that mean something, of types that they may not have."""
    names = draw(st.lists(st.sampled_from(sorted(_FIELDS)), max_size=5, unique=True))
    told = {"prompt": "x"} | {name: draw(_FIELDS[name]) for name in names}
    try:
        raw = orjson.dumps(told)
    except TypeError:  # an integer of more than 64 bits
        raw = b'{"prompt":123456789012345678901234567890}'
    depth = draw(st.sampled_from([0] * 20 + [98, 99, 253, 254, 1022, 1023]))
    if depth:
        raw = b'%b,"%b":%b}' % (raw[:-1], draw(st.sampled_from([b"x", b"tools"])), b"[" * depth + b"]" * depth)
    return raw


@st.composite
def spoilt(draw: st.DrawFn, raw: bytes, most: int = 3) -> bytes:
    """Bytes with a few changes: tokens put in, pieces left out, doubled or overwritten."""
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, len(raw)))
        size = draw(st.sampled_from([0, 0, 1, 2, 5, 20]))
        token = draw(st.sampled_from([*TOKENS, raw[at : at + 20]]))
        raw = raw[:at] + token + raw[at + size :]
    return raw


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A request, mostly a good one."""
    body = draw(bodies())
    if draw(st.integers(0, 3)) == 0:
        body = draw(spoilt(body))
    headers = [b"Host: h", *draw(st.lists(st.sampled_from(_HEADERS), max_size=4))]
    if draw(st.booleans()):
        headers.append(b"Content-Length: %d" % len(body))
    else:
        headers.append(b"Transfer-Encoding: chunked")
        cuts = sorted(draw(st.lists(st.integers(0, len(body)), max_size=3)))
        parts = [body[one:other] for one, other in zip([0, *cuts], [*cuts, len(body)], strict=True)]
        extension = draw(st.sampled_from([b"", b"", b";a=b", b';a="b c"']))
        body = b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts if part)
        body += b"0\r\n" + draw(st.sampled_from([b"", b"", b"X-Request-Id: t\r\n"])) + b"\r\n"
    method = draw(st.sampled_from([b"POST"] * 6 + [b"GET", b"HEAD", b"PUT", b"OPTIONS", b"CONNECT"]))
    line = b"%b %b HTTP/%b" % (method, draw(st.sampled_from(_PLACES)), draw(st.sampled_from([b"1.1"] * 9 + [b"1.0"])))
    return b"\r\n".join([line, *headers, b"", b""]) + body


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[int]]:
    """What a client sends over one connection, and where it is cut into pieces."""
    raw = b"".join(draw(st.lists(requests(), min_size=1, max_size=4)))
    raw = draw(spoilt(raw))
    return raw, sorted(draw(st.lists(st.integers(0, len(raw)), max_size=3)))


# what a stream means


@dataclass
class Understood:
    """What another parser makes of a stream: its complete requests, and whether it ends in good order.

    `rest` is `idle` after a complete request, `partial` in the middle of one, `closed` after one that asked to close,
    `wrong` where a request is none.
    """

    requests: list[Reached]
    rest: str


def _repaired(raw: bytes) -> bytes:
    """Take out what llhttp passes over before and in a request line and h11 does not; it changes no request's meaning.

    RFC 9112 section 2.2 lets a server ignore empty lines there, section 3 lets it take several spaces for one.
    """
    line, end, rest = raw.lstrip(b"\r\n").partition(b"\r\n")
    return re.sub(rb" +", b" ", line) + end + rest


def understand(raw: bytes) -> Understood:
    """Let h11 read a stream."""
    found: list[Reached] = []
    peer = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    asked: h11.Request | None = None
    body = b""
    raw = _repaired(raw)
    if raw:  # to h11 no bytes are the end of the connection
        peer.receive_data(raw)
    while True:
        try:
            event = peer.next_event()
        except h11.RemoteProtocolError:
            return Understood(found, "wrong")
        if event is h11.NEED_DATA:
            return Understood(found, "partial" if asked is not None or peer.trailing_data[0] else "idle")
        if event is h11.PAUSED:
            return Understood(found, "closed")
        if isinstance(event, h11.Request):
            asked, body = event, b""
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage) and asked is not None:
            headers = [(name.decode(), value.decode("latin-1")) for name, value in asked.headers]
            found.append(Reached(asked.method.decode(), asked.target.decode("latin-1"), headers, body))
            asked = None
            told = ",".join(value for name, value in headers if name == "connection").lower()
            options = [option.strip() for option in told.split(",")]
            # An offer of another protocol is passed over, and HTTP/1.0 may ask for what is usual in 1.1.
            stays = peer.their_state in (h11.DONE, h11.MIGHT_SWITCH_PROTOCOL) or "keep-alive" in options
            if not stays or "close" in options:
                return Understood(found, "closed")
            rest = _repaired(peer.trailing_data[0])
            peer = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
            if rest:
                peer.receive_data(rest)


# what the router changes in a leg, and what clients may not set
_LEGS = {
    "kv_transfer_params", "ec_transfer_params", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n",
    "min_tokens", "return_token_ids", "prompt", "vllm_xargs",
}  # fmt: skip


def _kept(told: Any) -> Any:
    return {name: value for name, value in told.items() if name not in _LEGS} if isinstance(told, dict) else told


def made_of(reached: Reached, sent: Sequence[Reached]) -> bool:
    """Tell whether a request to an engine comes from one that a client sent."""
    if not reached.body:
        return any(not one.body for one in sent)
    told = orjson.loads(reached.body)
    for one in sent:
        try:
            asked = orjson.loads(one.body)
        except orjson.JSONDecodeError:
            if one.body == reached.body:  # a form
                return True
            continue
        if not isinstance(asked, dict) or _kept(asked) != _kept(told):
            continue
        prompt = asked.get("prompt")
        if told.get("prompt") == prompt or (isinstance(prompt, list) and told.get("prompt") in prompt):
            return True
    return False


def _routers_own(reached: Reached) -> bool:
    """Tell whether what leads an engine elsewhere is the router's and not a client's."""
    try:
        told = orjson.loads(reached.body)
    except orjson.JSONDecodeError:
        return True
    if not isinstance(told, dict):
        return True
    extra = told.get("vllm_xargs")
    named = {"kv_transfer_params", "ec_transfer_params"} & set(extra if isinstance(extra, dict) else ())
    ticket = told.get("kv_transfer_params", TICKET)
    return ticket in (dict(WANT_TICKET), TICKET) and "ec_transfer_params" not in told and not named


def depth(value: Any) -> int:
    """Count how many objects and lists stand within one another."""
    deepest, left = 0, [(value, 1)]
    while left:
        one, level = left.pop()
        if isinstance(one, dict | list):
            deepest = max(deepest, level)
            left += [(inner, level + 1) for inner in (one.values() if isinstance(one, dict) else one)]
    return deepest


class Trap(logging.Handler):
    """Keeps what says that something failed inside the router."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.failures: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.failures.append(self.format(record))

    def failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Take what nobody caught (the event loop's exception handler)."""
        self.failures.append(f"{context.get('message')}: {context.get('exception')!r}")


class Played:
    """A router of this process, strict engines, and a loop that all of them share."""

    def __init__(self, **settings: Any) -> None:
        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self.engines = [Witness(), Witness()]
        self.trap = Trap()
        self._settings = settings

    def __enter__(self) -> "Played":
        self.runner.run(self._start())
        return self

    def __exit__(self, *error: object) -> None:
        self.runner.run(self._stop())
        self.runner.close()
        logging.getLogger("pdrouter").removeHandler(self.trap)

    async def _start(self) -> None:
        logging.getLogger("pdrouter").addHandler(self.trap)
        asyncio.get_running_loop().set_exception_handler(self.trap.failed)
        for engine in self.engines:
            await engine.start()
        told: dict[str, Any] = {
            "host": "127.0.0.1", "port": 0, "prometheus_host": "127.0.0.1", "prometheus_port": 0,
            "log_level": "warning",
            "drain_timeout_secs": 0.1, "client_head_timeout_secs": 0.3, "client_body_timeout_secs": 0.3,
            "client_idle_timeout_secs": 0.3,
            "policy": "pd_cost", "max_payload_size": 100_000, "max_header_size": 8192, "health_interval_secs": 60.0,
        }  # fmt: skip
        prefill, decode = self.engines
        self.router = Router(Settings((prefill.url,), (decode.url,), **(told | self._settings)))
        await self.router.start()
        await until(self.router.fleet.ready, "engines are well")

    async def _stop(self) -> None:
        await self.router.stop()
        for engine in self.engines:
            await engine.stop()

    def play(self, raw: bytes, cuts: Sequence[int] = ()) -> list[Answer]:
        """Send a stream, check all that has to hold, and give the answers."""
        return self.runner.run(self._play(raw, cuts))

    async def _play(self, raw: bytes, cuts: Sequence[int]) -> list[Answer]:
        for engine in self.engines:
            engine.reached.clear()
        told = understand(raw)
        if told.rest == "idle":
            raw += CLOSING_HEALTH
        methods = [one.method for one in told.requests]
        got = await self._send(raw, cuts, len(told.requests) if told.rest == "partial" else None, methods)
        answers = read_answers(got, methods)
        self._judge(told, answers)
        return answers

    async def _send(self, raw: bytes, cuts: Sequence[int], enough: int | None, methods: Sequence[str]) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.router.public.port)
        got = b""
        try:
            for one, other in zip([0, *cuts], [*cuts, len(raw)], strict=True):
                writer.write(raw[one:other])
                await asyncio.sleep(0)
            async with asyncio.timeout(8):
                with suppress(ConnectionError):
                    while enough is None or sum(one.complete for one in read_answers(got, methods)) < enough:
                        data = await reader.read(1 << 16)
                        if not data:
                            break
                        got += data
        except TimeoutError:
            raise AssertionError(f"neither answered nor closed; so far {got!r}") from None
        finally:
            writer.transport.abort()
        return got

    def _judge(self, told: Understood, answers: list[Answer]) -> None:
        failures, self.trap.failures = self.trap.failures, []
        assert failures == []
        for engine in self.engines:
            malformed, engine.malformed = engine.malformed, []
            assert malformed == []
        statuses = [answer.status for answer in answers]
        # The last answer may be cut, or be one more: to what is no request, or to the request that ends the stream.
        assert len(statuses) <= len(told.requests) + 1, statuses
        assert all(answer.complete for answer in answers[:-1]), statuses
        for answer in answers[:-1]:
            assert answer.headers.get("connection") != "close", statuses
        assert 500 not in statuses, answers
        for engine in self.engines:
            for reached in engine.reached:
                assert made_of(reached, told.requests), (reached, told.requests)
                assert _routers_own(reached), reached
                names = [name for name, _ in reached.headers]
                assert names.count("host") == names.count("content-length") == names.count("x-request-id") == 1

    def serves(self) -> None:
        """Check that nothing is left behind, and that an ordinary request is served."""
        self.runner.run(self._quiet())
        answers = self.play(b'POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 14\r\n\r\n{"prompt":"x"}')
        assert [answer.status for answer in answers] == [200, 200]

    async def _quiet(self) -> None:
        router = self.router
        await until(
            lambda: router.public.held == router.admission.running == router.admission.waiting == 0,
            "nothing is under way", 20,
        )  # fmt: skip
        for engine in router.fleet:
            await until(lambda engine=engine: engine.in_flight == engine.held_tokens == 0, "engines are idle", 20)
