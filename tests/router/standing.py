"""A router process that stands for many tests, strict engines behind it, and plain sockets towards it.

The engines read with h11, another implementation than the router's: what is no well-formed request to it is noted.
"""

import asyncio
import json
import re
import select
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import h11
import uvloop

from router.fakes import TICKET, USAGE, Answer, until
from router.served import METRICS, PUBLIC, Served, named
from support.processes import new_address

MARKER = "SMUGGLED"
"""The prompt of a request that must not reach an engine."""


def post(prompt: Any = "hi", path: str = "/v1/completions", headers: str = "", **fields: Any) -> bytes:
    """A request for text, as an ordinary client sends it."""
    body = json.dumps({"prompt": prompt} | fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: router\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


SMUGGLED = post(MARKER)
HEALTH = b"GET /health HTTP/1.1\r\nHost: router\r\n\r\n"
CLOSING_HEALTH = b"GET /health HTTP/1.1\r\nHost: router\r\nConnection: close\r\n\r\n"


@dataclass
class Reached:
    """A request that an engine got."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def header(self, name: str) -> list[str]:
        return [value for told, value in self.headers if told == name]


class Witness:
    """An engine of either role that notes every request, and every byte that is none."""

    def __init__(self) -> None:
        self.reached: list[Reached] = []
        self.malformed: list[str] = []
        self.answer: bytes | None = None
        self.kind = "application/json"
        self.streams = False
        self.status = 200
        self.extra: list[tuple[str, str]] = []
        self.hold: threading.Event | None = None
        self.url = ""
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, new_address(), 0)
        at = self._server.sockets[0].getsockname()
        self.url = f"http://{at[0]}:{at[1]}"

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        peer = h11.Connection(h11.SERVER)
        asked: h11.Request | None = None
        body = b""
        try:
            while True:
                event = peer.next_event()
                if event is h11.NEED_DATA:
                    data = await reader.read(1 << 18)
                    if not data:
                        return
                    peer.receive_data(data)
                elif isinstance(event, h11.Request):
                    asked, body = event, b""
                elif isinstance(event, h11.Data):
                    body += event.data
                elif isinstance(event, h11.EndOfMessage) and asked is not None:
                    writer.write(b"".join([piece async for piece in self._answers(asked, body, peer)]))
                    await writer.drain()
                    peer.start_next_cycle()
        except h11.RemoteProtocolError as error:
            self.malformed.append(str(error))
        except (ConnectionError, RuntimeError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answers(self, asked: h11.Request, body: bytes, peer: h11.Connection) -> Any:
        headers = [(name.decode(), value.decode("latin-1")) for name, value in asked.headers]
        one = Reached(asked.method.decode(), asked.target.decode("latin-1"), headers, body)
        own = one.header("x-request-id") == []  # the router's questions of its own
        if own and one.target == "/v1/models":
            told: Any = {"data": [{"id": "tiny", "root": "tiny"}]}
        elif own:
            told = {"version": "0.32.0"} if one.target == "/version" else {}
        else:
            self.reached.append(one)
            if self.hold is not None:
                await until(self.hold.is_set, "the test lets the engine answer", 60)
            told = self._told(one)
        raw = self.answer if self.answer is not None and not own else json.dumps(told).encode()
        kind = [("content-type", "application/json" if own else self.kind)]
        if own or not self.streams:
            kind.append(("content-length", str(len(raw))))
        status = 200 if own else self.status
        kind += [] if own else self.extra
        for event in (h11.Response(status_code=status, headers=kind), h11.Data(data=raw), h11.EndOfMessage()):
            yield peer.send(event) or b""

    def _told(self, one: Reached) -> Any:
        try:
            asked = one.json
        except ValueError:
            return {}
        if not isinstance(asked, dict):
            return {}
        wanted = asked.get("kv_transfer_params")
        ticket = TICKET if isinstance(wanted, dict) and wanted.get("do_remote_decode") else None
        n = asked.get("n")
        choices = [{"index": number, "text": "x"} for number in range(n if isinstance(n, int) and 0 < n < 9 else 1)]
        # The ids of models are the clients' own: the fleet's is not what is tested here.
        return {"id": "c", "model": asked.get("model") or "tiny", "choices": choices, "usage": USAGE,
                "kv_transfer_params": ticket}  # fmt: skip

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def read_answers(raw: bytes, methods: Sequence[str] = ()) -> list[Answer]:
    """Take a connection's answers apart; the last one is incomplete when bytes are missing.

    `methods` are those of the requests, POST where it ends.
    """
    found: list[Answer] = []
    while raw:
        method = methods[len(found)] if len(found) < len(methods) else "POST"
        head, blank, raw = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version == "HTTP/1.1"
        headers = dict(line.split(": ", 1) for line in lines)
        if status == "100":
            continue
        answer = Answer(int(status), headers, b"", bool(blank))
        if headers.get("transfer-encoding") == "chunked":
            size = -1
            while size and raw:
                told, _, raw = raw.partition(b"\r\n")
                size = int(told, 16)
                answer.body += raw[:size]
                raw = raw[size + 2 :]
            answer.complete = size == 0
        elif (method != "HEAD" or headers.get("connection") == "close") and raw and status not in ("204", "304"):
            # A refusal comes with its reason when it was not known that the method was HEAD.
            size = int(headers["content-length"])
            answer.body, raw = raw[:size], raw[size:]
            answer.complete = len(answer.body) == size
        found.append(answer)
    return found


class Wire:
    """A connection of raw bytes."""

    def __init__(self, host: str, port: int = PUBLIC, buffer: int = 0) -> None:
        self.socket = socket.socket()
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.settimeout(20)
        self.socket.connect((host, port))

    def send(self, raw: bytes) -> None:
        """Send all; that the router has already closed is no fault."""
        with suppress(ConnectionError):
            self.socket.sendall(raw)

    def rest(self) -> bytes:
        """Read until the router closes."""
        found = bytearray()
        with suppress(ConnectionResetError):
            while data := self.socket.recv(1 << 16):
                found += data
        return bytes(found)

    def until(self, pattern: bytes) -> bytes:
        """Read until a pattern has come."""
        found = bytearray()
        while not re.search(pattern, found):
            data = self.socket.recv(1 << 16)
            assert data, f"closed after {bytes(found)!r}"
            found += data
        return bytes(found)

    def open(self) -> bool:
        """Tell whether the router has neither closed nor sent anything."""
        return not select.select([self.socket], [], [], 0)[0]

    def close(self) -> None:
        self.socket.close()


class Standing:
    """A router process, its engines, and clients of it."""

    def __init__(self, router: Served, prefill: Witness, decode: Witness) -> None:
        self.router = router
        self.prefill = prefill
        self.decode = decode
        self.engines = [prefill, decode]
        self._wires: list[Wire] = []

    @property
    def host(self) -> str:
        return self.router.host

    def wire(self, port: int = PUBLIC, buffer: int = 0) -> Wire:
        """Open a connection; it is closed with the router at the latest."""
        wire = Wire(self.host, port, buffer)
        self._wires.append(wire)
        return wire

    def close(self) -> None:
        """Close what clients have open."""
        for wire in self._wires:
            wire.close()

    def forget(self) -> None:
        """Begin anew with what engines noted."""
        for one in self.engines:
            one.reached.clear()

    def prompts(self) -> list[Any]:
        """The prompts that reached the decode engine."""
        return [one.json.get("prompt") for one in self.decode.reached if one.body]

    def reached(self) -> list[Reached]:
        """All requests that reached engines."""
        return [one for engine in self.engines for one in engine.reached]

    def malformed(self) -> list[str]:
        """What engines could not read."""
        return [what for engine in self.engines for what in engine.malformed]

    def ended(self, raw: bytes, methods: Sequence[str] = ()) -> list[Answer]:
        """Send bytes and read until the router closes the connection."""
        wire = self.wire()
        try:
            wire.send(raw)
            return read_answers(wire.rest(), methods)
        finally:
            wire.close()

    def answered(self, raw: bytes, methods: Sequence[str] = ()) -> list[Answer]:
        """Send bytes and then a request for /health that closes; give the answers before its."""
        found = self.ended(raw + CLOSING_HEALTH, methods)
        assert found, "no answer at all"
        assert found[-1].body == b'{"status":"ok"}', f"the connection was not usable any more: {found}"
        return found[:-1]

    def one(self, raw: bytes, method: str = "POST") -> Answer:
        """Send one request; give its answer."""
        (answer,) = self.answered(raw, [method])
        return answer

    def serves(self) -> None:
        """Check that an ordinary request is served."""
        assert self.one(post("ordinary")).status == 200

    def metric(self, name: str) -> float:
        """Give a number of the metrics page, rows of other labels added up."""
        wire = self.wire(METRICS)
        wire.send(CLOSING_HEALTH.replace(b"/health", b"/metrics"))
        page = wire.rest().decode()
        wire.close()
        return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if re.match(rf"{name}[ {{]", line))

    def log(self) -> str:
        return self.router.output()


@contextmanager
def standing(*flags: str, before: Sequence[str] = (), **environment: str) -> Iterator[Standing]:
    """Start a prefill and a decode engine, in a thread, and a router process that knows them.

    `before` are words in front of the router's command, `environment` is added to its own.
    """
    ready: list[Standing] = []
    failed: list[BaseException] = []
    begun, done = threading.Event(), threading.Event()

    async def main() -> None:
        async with AsyncExitStack() as stack:
            engines = [Witness(), Witness()]
            for engine in engines:
                await engine.start()
                stack.push_async_callback(engine.stop)
            told = [*named(engines[:1], engines[1:]), "--health-interval-secs", "0.5", *flags]
            router = Served(told, new_address(), before, environment)
            stack.push_async_callback(router.stop)
            await router.ready(1, 2)
            ready.append(Standing(router, engines[0], engines[1]))
            begun.set()
            await until(done.is_set, "the tests end", 600)

    def live() -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(main())
        except BaseException as error:
            failed.append(error)
            begun.set()

    thread = threading.Thread(target=live)
    thread.start()
    try:
        begun.wait(60)
        if failed:
            raise failed[0]
        yield ready[0]
    finally:
        for one in ready:
            one.close()
        done.set()
        thread.join(30)
