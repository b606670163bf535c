"""Attacks on a router's public port, each a coroutine that goes on until it is cancelled."""

import asyncio
import contextlib
import functools
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: r\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: r\r\n\r\n"
TRICKLE = 0.5  # seconds between two bytes of a slow client


@dataclass(frozen=True)
class Attack:
    """An attack.

    `mib` is how much the router may grow by, MiB; `fills` tells that the attack lies in buffers that have to be filled
    first, which takes the router some seconds of work that an engine would never give it at once.
    """

    name: str
    connections: int
    mib: float
    client: "Callable[[Target], Awaitable[None]]"
    fills: bool = False


class Target:
    """The router as attackers see it."""

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.answers: Counter[str] = Counter()
        self.connected: asyncio.Semaphore = asyncio.Semaphore(0)

    async def connect(self, unread: bool = False) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection; with `unread` its buffer is small and nothing is taken out of it."""
        end = socket.socket()
        end.setblocking(False)
        if unread:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.get_running_loop().sock_connect(end, (self.host, self.port))
        self.connected.release()
        return await asyncio.open_connection(sock=end, limit=1024)

    def note(self, answer: bytes) -> None:
        """Count how an attacker was answered."""
        status = answer[9:12].decode("latin-1")
        self.answers[status if status.isdigit() else "closed"] += 1


async def _trickle(target: Target, begin: bytes, piece: bytes) -> None:
    reader, writer = await target.connect()
    try:
        writer.write(begin)
        answer = asyncio.ensure_future(reader.read(64))
        while not answer.done():
            await asyncio.wait([answer], timeout=TRICKLE)
            writer.write(piece)
        target.note(answer.result())
    finally:
        writer.close()


async def _slow_head(target: Target) -> None:
    await _trickle(target, b"GET /health HTTP/1.1\r\nHost: r\r\nX: ", b"y")


async def _slow_body(target: Target) -> None:
    await _trickle(target, HEAD + b'Content-Length: 1000000\r\n\r\n{"prompt":"', b"y")


async def _between(target: Target) -> None:
    reader, writer = await target.connect()
    try:
        writer.write(HEALTH)
        await reader.readuntil(b'"ok"}')
        target.note(await reader.read(64))
    finally:
        writer.close()


async def _once(target: Target, raw: bytes) -> None:
    """Send, take the answer, and do it again: on the same connection while that is open."""
    reader, writer = await target.connect()
    try:
        while True:
            writer.write(raw)
            head = await reader.readuntil(b"\r\n\r\n")
            target.note(head)
            size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
            await reader.readexactly(size)
            if b"connection: close" in head.lower():
                return
    except asyncio.IncompleteReadError:
        target.note(b"")
    finally:
        writer.close()


def _body(body: bytes) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _batch(prompts: int, shared: int) -> bytes:
    return _body(b'{"prompt":["x"%b],"user":"%b"}' % (b',"x"' * (prompts - 1), b"u" * shared))


async def _unread(target: Target, prompt: bytes) -> None:
    """Ask for much and take nothing of it."""
    _, writer = await target.connect(unread=True)
    try:
        writer.write(_body(b'{"prompt":"%b","stream":%b}' % (prompt, b"true" if prompt == b"endless" else b"false")))
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        while not writer.transport.is_closing():
            await asyncio.sleep(TRICKLE)
            writer.write(b"\r\n")
            await writer.drain()
        target.note(b"")
    finally:
        writer.transport.abort()


async def _ahead(target: Target) -> None:
    """Send requests without end and take no answer."""
    _, writer = await target.connect(unread=True)
    try:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        while True:
            writer.write(HEALTH * 1000)
            await writer.drain()
    finally:
        writer.transport.abort()


MALFORMED = [
    b"GARBAGE\r\n\r\n",
    HEAD + b"Content-Length: -5\r\n\r\n",
    HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    HEAD + b"X : y\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]


async def _malformed(target: Target) -> None:
    for raw in MALFORMED:
        await _once(target, raw)


_MANY = b"".join(b"X-%d: %b\r\n" % (number, b"y" * 200) for number in range(110))


def _deep(depth: int) -> bytes:
    return _body(b'{"prompt":' + b"[" * depth + b"]" * depth + b"}")


def _wide(value: bytes, count: int) -> bytes:
    return _body(b'{"prompt":"x","x":[' + value * count + b"1]}")


def _repeats(raw: Callable[[], bytes]) -> Callable[[Target], Awaitable[None]]:
    made = functools.cache(raw)  # some have 60 MB: they are made when they are sent
    return lambda target: _once(target, made())


ATTACKS = [
    Attack("slow heads", 1000, 64, _slow_head),
    Attack("slow bodies", 1000, 64, _slow_body),
    Attack("connections without requests", 1000, 64, _between),
    Attack("slow readers of endless streams", 1000, 448, lambda target: _unread(target, b"endless"), True),
    Attack("slow readers of 256 KB answers", 1000, 448, lambda target: _unread(target, b"whole"), True),
    Attack("requests ahead, answers not taken", 200, 256, _ahead, True),
    Attack("malformed requests", 64, 64, _malformed),
    Attack("heads of 110 headers, 24 KB", 32, 64, _repeats(lambda: HEALTH[:-2] + _MANY + b"\r\n")),
    Attack("heads over the limit", 32, 64, _repeats(lambda: HEALTH[:-2] + b"x: y\r\n" * 40_000)),
    Attack("JSON of depth 300,000", 16, 128, _repeats(lambda: _deep(300_000))),
    Attack("JSON of depth 1,000", 32, 64, _repeats(lambda: _deep(1000))),
    Attack("JSON of 20 million values", 2, 448, _repeats(lambda: _wide(b"[],", 20_000_000))),
    Attack("JSON of 600,000 objects", 2, 448, _repeats(lambda: _wide(b"{},", 600_000))),
    Attack("bodies in tiny chunks", 8, 128, _repeats(lambda: CHUNKED + b"6\r\n      \r\n" * 100_000 + b"0\r\n\r\n")),
    Attack(
        "bodies over the limit", 16, 64, _repeats(lambda: HEAD + b"Content-Length: 9999999999\r\n\r\n" + bytes(65536))
    ),
    Attack("bodies of 60 MB", 4, 512, _repeats(lambda: _body(b'{"prompt":"' + b"x" * 60_000_000))),
    Attack("a batch that repeats 1 MB", 4, 64, _repeats(lambda: _batch(1000, 1_000_000))),
]


async def go_on(attack: Attack, target: Target, opened: Callable[[], None], over: Awaitable[object]) -> None:
    """Keep an attack's connections busy; a connection that is closed is opened again.

    Args:
        attack: what to do.
        target: to whom.
        opened: called when all connections have been opened.
        over: ends when it is enough.
    """

    async def again() -> None:
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, RuntimeError):
                await attack.client(target)
            await asyncio.sleep(0.01)

    clients = [asyncio.ensure_future(again()) for _ in range(attack.connections)]
    async with asyncio.timeout(60):
        for _ in range(attack.connections):
            await target.connected.acquire()
    opened()
    await over
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
