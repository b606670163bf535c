"""A day's churn in ten minutes: engines, clients and workers come and go, and nothing may be left behind.

Starts the router before small stand-in engines and produces what a busy day brings (`DAY`) at the pace of --seconds
for a day. After a warm-up and again at the end everything becomes quiet, and what each router process holds is
compared: open files and threads must be exactly back, load rows must be zero, memory may not grow in the second half.
"""

import argparse
import asyncio
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import orjson
import uvloop
from rich.table import Table
from screen import console

# What happens in 24 hours, more of each kind than a bad day brings: 12 engines, a request a second.
DAY = {
    "request": 86_400,
    "client gone in a stream": 8_000,
    "client gone before the answer": 4_000,
    "malformed or oversized request": 4_000,
    "engine restarted, same port": 200,
    "engine restarted, new port": 200,
    "engine added for a while": 100,
    "engine unwell for a while": 300,
    "engine answers 5xx for a while": 200,
    "metrics page missing for a while": 200,
    "metrics page broken for a while": 200,
    "metrics page slow for a while": 200,
    "metrics page cut for a while": 200,
    "worker killed": 24,
}
SECONDS = 600.0
PREFILLS = DECODES = 6
PUBLIC, METRICS, ADMIN = 10001, 29000, 29001
LARGEST_BODY = 65536
PROBES = 3  # connections to an engine that its probes may keep: health, models, metrics
# MiB that a process may grow by in the second half. One that has served 40,000 requests grows by 1 to 3; a worker that
# was killed in the first quarter has served fewer and still fills what its policy remembers.
GROWTH = 8.0
GAUGES = (
    "pd_router_in_flight", "pd_router_queued_tokens", "pd_router_held_tokens", "pd_router_requests_running",
    "pd_router_requests_queued", "pd_router_requests_waiting", "pd_router_tickets", "pd_router_pinned_kv_tokens",
)  # fmt: skip
_NONSENSE = (
    b"GARBAGE\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"POST /v1/completions HTTP/1.1\r\nhost: r\r\ncontent-length: 9\r\n\r\n{\"prompt\"",
    b"POST /v1/completions HTTP/1.1\r\nhost: r\r\ncontent-length: 2\r\n\r\n{]",
    b"POST /v1/completions HTTP/1.1\r\nhost: r\r\ncontent-length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: r\r\ncontent-length: 9999999\r\n\r\n" + b"x" * 4096,
    b"POST /v1/completions HTTP/1.1\r\nhost: r\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n" + b"1000\r\n%b\r\n" % (b"x" * 4096) * 20,
    b"GET / HTTP/1.1\r\n" + b"".join(b"x-%d: y\r\n" % number for number in range(400)) + b"\r\n",
    b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000 + b"\r\n\r\n",
    b"PUT /v1/completions HTTP/1.1\r\nhost: r\r\ncontent-length: 0\r\n\r\n",
    b"GET /nowhere HTTP/1.1\r\nhost: r\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nhost: r\r\n\r\n" * 20,
    b"POST /v1/comp",
    b"",
)  # fmt: skip
_PAGE = """# HELP vllm:num_requests_waiting x
vllm:num_requests_waiting{{model_name="tiny"}} {waiting}
vllm:num_requests_running{{model_name="tiny"}} {running}
vllm:kv_cache_usage_perc{{model_name="tiny"}} 0.5
vllm:cache_config_info{{block_size="16",num_gpu_blocks="1000"}} 1.0
"""


class Engine:
    """A stand-in for an engine, whose misfortunes are told by its attributes."""

    def __init__(self, role: str, host: str, draw: random.Random) -> None:
        self.role = role
        self.host = host
        self.port = 0
        self.well = True
        self.failing = False
        self.page = "good"
        self._draw = draw
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.host}:{self.port}"

    async def start(self, port: int = 0) -> None:
        """Listen, on any port or on the one it had."""
        self._server = await asyncio.start_server(self._accept, self.host, port)
        self.port = self._server.sockets[0].getsockname()[1]

    def kill(self) -> None:
        """End as a killed process does: nobody gets an answer."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        # RuntimeError: what uvloop says of writing to a connection that is closed.
        with contextlib.suppress(asyncio.IncompleteReadError, OSError, RuntimeError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(size[1])) if size else b""
                await self._answer(head.split(b" ", 2)[1].decode(), body, writer)
                await writer.drain()
        self._open.discard(writer)
        writer.close()

    @staticmethod
    def _send(writer: asyncio.StreamWriter, status: int, body: bytes, kind: str = "application/json") -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)

    async def _answer(self, path: str, raw: bytes, writer: asyncio.StreamWriter) -> None:
        if path == "/health":
            self._send(writer, 200 if self.well else 503, b"")
        elif path == "/metrics":
            await self._metrics(writer)
        elif not raw:
            self._send(writer, 200, b'{"object":"list","data":[{"id":"tiny","root":"tiny"}]}')
        elif self.failing:
            self._send(writer, self._draw.choice((500, 502, 503)), b'{"error":{"message":"no"}}')
        else:
            body = orjson.loads(raw)
            usage = {"prompt_tokens": 8, "completion_tokens": 4, "total_tokens": 12}
            choices = [{"index": 0, "text": "x"}]
            told: dict[str, object] = {"id": "c", "model": "tiny", "choices": choices, "usage": usage}
            if body.get("min_tokens", 0) > body.get("max_tokens", 16):  # how the router gives a ticket back
                self._send(writer, 400, b'{"error":{"message":"min_tokens"}}')
            elif (body.get("kv_transfer_params") or {}).get("do_remote_decode"):
                await asyncio.sleep(self._draw.random() * 0.03)
                ticket = {
                    "do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [1], "tp_size": 1,
                    "remote_engine_id": "e", "remote_host": self.host, "remote_port": 5600, "remote_request_id": "r",
                }  # fmt: skip
                self._send(writer, 200, orjson.dumps(told | {"kv_transfer_params": ticket}))
            elif body.get("stream"):
                await self._stream(told, writer)
            else:
                await asyncio.sleep(self._draw.random() * 0.03)
                self._send(writer, 200, orjson.dumps(told))

    async def _stream(self, told: dict[str, object], writer: asyncio.StreamWriter) -> None:
        event = b"data: " + orjson.dumps(told) + b"\n\n"
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(self._draw.choice((1, 4, 8, 60))):
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await writer.drain()
            await asyncio.sleep(0.02)
        done = b"data: [DONE]\n\n"
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(done), done))

    async def _metrics(self, writer: asyncio.StreamWriter) -> None:
        page = _PAGE.format(waiting=self._draw.randrange(5), running=self._draw.randrange(9)).encode()
        if self.page == "missing":
            self._send(writer, 404, b"{}")
        elif self.page == "broken":
            word = self._draw.choice((b"NaN", b"+Inf", b"-3", b"1e400", b"many"))
            self._send(writer, 200, re.sub(rb"(waiting{.*}) \d+", rb"\1 " + word, page), "text/plain")
        elif self.page == "cut":
            writer.write(b"HTTP/1.1 200 X\r\ncontent-length: 9999\r\n\r\n" + page[:100])
            writer.close()
        else:
            if self.page == "slow":
                await asyncio.sleep(3)
            self._send(writer, 200, page, "text/plain")


@dataclass
class Held:
    """What a process holds: open files without connections to engines, those, threads, resident MiB."""

    files: int
    engines: int
    threads: int
    mib: float


class Router:
    """The router's processes, seen from outside."""

    def __init__(self, command: str, host: str, workers: int, policy: str, engines: Iterable[Engine]) -> None:
        self.host = host
        self.workers = workers
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 closed with this process
        told = [part for one in engines for part in (f"--{one.role}", one.url)]
        self.process = subprocess.Popen(
            [
                *command.split(), "--vllm-pd-disaggregation", *told, "--host", host, "--port", str(PUBLIC),
                "--prometheus-host", host, "--prometheus-port", str(METRICS), "--admin-host", host,
                "--admin-port", str(ADMIN), "--workers", str(workers), "--policy", policy, "--log-level", "warning",
                "--health-interval-secs", "0.5", "--max-payload-size", str(LARGEST_BODY),
                "--client-head-timeout-secs", "2", "--client-body-timeout-secs", "2",
                "--max-concurrent-requests", "64",
            ],
            stdout=self.log, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def output(self) -> str:
        """Everything it printed."""
        return os.pread(self.log.fileno(), 1 << 26, 0).decode(errors="replace")

    def pids(self) -> list[int]:
        """The first process, then the workers, the oldest first."""
        first = self.process.pid
        children = Path(f"/proc/{first}/task/{first}/children").read_text(encoding="ascii").split()
        return [first, *map(int, children)]

    def serving(self) -> list[int]:
        """The processes that serve."""
        return self.pids()[1:] if self.workers > 1 else self.pids()[:1]

    def held(self, pid: int, engines: Iterable[Engine]) -> Held:
        """Read what a process holds now."""
        remote = {_address(one.host, one.port) for one in engines}
        to_engines = set()
        for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            if fields[2] in remote:
                to_engines.add(f"socket:[{fields[9]}]")
        links = []
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                links.append(os.readlink(f"/proc/{pid}/fd/{name}"))
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        )
        connected = sum(link in to_engines for link in links)
        mib = int(status["VmRSS"].split()[0]) / 1024
        return Held(len(links) - connected, connected, int(status["Threads"]), mib)

    async def get(self, port: int, path: str, body: bytes | None = None) -> bytes:
        """Ask the metrics or the admin port."""
        async with asyncio.timeout(10):
            reader, writer = await asyncio.open_connection(self.host, port, limit=1 << 24)
            try:
                method = "GET" if body is None else "POST"
                head = f"{method} {path} HTTP/1.1\r\nhost: r\r\nconnection: close\r\ncontent-length: {len(body or b'')}"
                writer.write(head.encode() + b"\r\n\r\n" + (body or b""))
                return (await reader.read()).partition(b"\r\n\r\n")[2]
            finally:
                writer.close()

    async def gauges(self) -> dict[str, float]:
        """Give the metrics page: name with labels, and value."""
        lines = (await self.get(METRICS, "/metrics")).decode().splitlines()
        told = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in told}

    async def engines(self) -> set[tuple[tuple[str, int], ...]]:
        """Give what workers list, each different answer once: engines with what they have to do."""
        seen = set()
        for _ in range(6 * self.workers):
            told = orjson.loads(await self.get(ADMIN, "/list_workers"))["workers"]
            seen.add(tuple(sorted((one["url"], one["in_flight"] + one["held_tokens"]) for one in told)))
        return seen


def _address(host: str, port: int) -> str:
    return f"{bytes(map(int, host.split('.')))[::-1].hex().upper()}:{port:04X}"


@dataclass
class Churn:
    """A run: the engines, the router and what happened to them."""

    router: Router
    engines: list[Engine]
    draw: random.Random
    host: str
    done: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    samples: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    killed: int = 0
    _busy: set[Engine] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    def _do(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            console.print(f"churn: {task.exception()!r}")
            self.answers["churn itself failed"] += 1

    # clients

    def _body(self, stream: bool | None = None) -> bytes:
        prompt: object = f"prompt {self.draw.randrange(100)} " + "word " * self.draw.choice((5, 50, 500))
        if stream is None:
            stream = self.draw.random() < 0.5
            if self.draw.random() < 0.1:
                prompt = [prompt] * self.draw.randrange(2, 5)
        told = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "stream": stream, "user": str(self.draw.random())}
        body = orjson.dumps(told)
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: r\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        )
        return head % len(body) + body

    async def request(self) -> None:
        """Send a request and read its answer, every other one over a connection that was used before."""
        kept = self._idle.pop() if self._idle and self.draw.random() < 0.5 else None
        try:
            reader, writer = kept or await asyncio.open_connection(self.router.host, PUBLIC, limit=1 << 20)
        except OSError:
            self.answers["refused"] += 1
            return
        keep = False
        try:
            async with asyncio.timeout(40):
                writer.write(self._body())
                head = await reader.readuntil(b"\r\n\r\n")
                status = head.split(b" ", 2)[1].decode()
                size = re.search(rb"\r\ncontent-length: (\d+)", head)
                if size:
                    await reader.readexactly(int(size[1]))
                else:
                    while chunk := int(await reader.readuntil(b"\r\n"), 16):
                        await reader.readexactly(chunk + 2)
                    await reader.readexactly(2)
            self.answers[status] += 1
            keep = b"connection: close" not in head and len(self._idle) < 32
        except (asyncio.IncompleteReadError, ConnectionError):
            self.answers["cut"] += 1
        except TimeoutError:
            self.answers["no answer within 40 s"] += 1
        finally:
            if keep:
                self._idle.append((reader, writer))
            else:
                writer.close()

    async def _leave(self, stream: bool) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
            reader, writer = await asyncio.open_connection(self.router.host, PUBLIC)
            try:
                writer.write(self._body(stream))
                async with asyncio.timeout(10):
                    if stream:
                        await reader.readuntil(b"\r\n\r\n")
                    await asyncio.sleep(self.draw.random() * 0.05)
            finally:
                writer.transport.abort() if self.draw.random() < 0.5 else writer.close()

    async def _nonsense(self) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            reader, writer = await asyncio.open_connection(self.router.host, PUBLIC)
            try:
                writer.write(self.draw.choice(_NONSENSE))
                async with asyncio.timeout(self.draw.choice((0.01, 0.1, 2.5))):
                    while await reader.read(65536):
                        pass
            finally:
                writer.close()

    # engines

    async def _told(self, what: str, engine: Engine) -> None:
        body = orjson.dumps({"url": engine.url, "role": engine.role})
        with contextlib.suppress(OSError, TimeoutError):
            if b'"success"' in await self.router.get(ADMIN, f"/{what}_worker", body):
                return
        # The worker that was asked was killed: what is not told again would be wrong for ever.
        await asyncio.sleep(0.1)
        await self.router.get(ADMIN, f"/{what}_worker", body)

    async def _with(self, work: Callable[[Engine], Awaitable[None]]) -> None:
        """Let something befall an engine that has no other misfortune; of each role most are left alone."""
        for engine in self.draw.sample(self.engines, len(self.engines)):
            same = sum(one.role == engine.role for one in self._busy)
            if engine not in self._busy and same < PREFILLS // 2:
                self._busy.add(engine)
                try:
                    await work(engine)
                finally:
                    self._busy.discard(engine)
                return

    async def _restart(self, engine: Engine) -> None:
        engine.kill()
        await asyncio.sleep(0.1 + self.draw.random())
        await engine.start(engine.port)

    async def _move(self, engine: Engine) -> None:
        engine.kill()
        if self.draw.random() < 0.5:
            await asyncio.sleep(self.draw.random())
        await self._told("remove", engine)
        await engine.start()
        await self._told("add", engine)

    async def _visit(self) -> None:
        engine = Engine(self.draw.choice(("prefill", "decode")), self.host, self.draw)
        await engine.start()
        await self._told("add", engine)
        await asyncio.sleep(0.5 + 2 * self.draw.random())
        if self.draw.random() < 0.5:
            engine.kill()
        await self._told("remove", engine)
        await asyncio.sleep(0.2)
        engine.kill()

    def _for_a_while(self, name: str, value: object) -> Callable[[Engine], Awaitable[None]]:
        async def befall(engine: Engine) -> None:
            before = getattr(engine, name)
            setattr(engine, name, value)
            await asyncio.sleep(0.5 + 2 * self.draw.random())
            setattr(engine, name, before)

        return befall

    async def _kill_worker(self) -> None:
        serving = self.router.serving()
        if len(serving) == self.router.workers:
            self.killed += 1
            os.kill(self.draw.choice(serving), signal.SIGKILL)

    # all of it

    def _kinds(self) -> dict[str, Callable[[], Awaitable[None]]]:
        kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "request": self.request,
            "client gone in a stream": lambda: self._leave(True),
            "client gone before the answer": lambda: self._leave(False),
            "malformed or oversized request": self._nonsense,
            "engine restarted, same port": lambda: self._with(self._restart),
            "engine restarted, new port": lambda: self._with(self._move),
            "engine added for a while": self._visit,
            "engine unwell for a while": lambda: self._with(self._for_a_while("well", False)),
            "engine answers 5xx for a while": lambda: self._with(self._for_a_while("failing", True)),
        }
        for page in ("missing", "broken", "slow", "cut"):
            befall = self._for_a_while("page", page)
            kinds[f"metrics page {page} for a while"] = lambda befall=befall: self._with(befall)  # type: ignore[misc]
        if self.router.workers > 1:
            kinds["worker killed"] = self._kill_worker
        return kinds

    async def _produce(self, kind: str, make: Callable[[], Awaitable[None]], pace: float, seconds: float) -> None:
        # Workers are killed in the first quarter: those of the second half are then as warm as they will be.
        if kind == "worker killed":
            pace, seconds = pace * 4, seconds / 4
        began, due = time.monotonic(), 0.0
        count = max(1, round(DAY[kind] * pace * seconds))
        for number in range(count):
            due = seconds * (number + self.draw.random()) / count
            await asyncio.sleep(max(0.0, due - (time.monotonic() - began)))
            self.done[kind] += 1
            self._do(make())

    async def _sample(self) -> None:
        while True:
            for pid in self.router.serving():
                with contextlib.suppress(FileNotFoundError, KeyError, ProcessLookupError):
                    mib = self.router.held(pid, ()).mib
                    self.samples.setdefault(pid, []).append((time.monotonic(), mib))
            with contextlib.suppress(OSError, TimeoutError):
                await self.router.get(METRICS, "/metrics")
            await asyncio.sleep(1)

    async def run(self, seconds: float, pace: float, kinds: Iterable[str] | None = None) -> None:
        """Let things happen for some seconds, `pace` days a second; only some kinds if they are told."""
        made = self._kinds()
        sampling = asyncio.ensure_future(self._sample())
        try:
            await asyncio.gather(*(self._produce(kind, made[kind], pace, seconds) for kind in kinds or made))
            while self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            sampling.cancel()
        self._hang_up()

    def _hang_up(self) -> None:
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()

    async def quiet(self, expected: list[Held] | None = None) -> tuple[list[Held], list[str]]:
        """Wait until nothing is under way; give what each process holds, the oldest first, and what is wrong.

        Args:
            expected: what each process held before; without it only the load is looked at.
        """
        deadline = time.monotonic() + 20
        while True:
            held, wrong = await self._look(expected)
            if not wrong or time.monotonic() > deadline:
                return held, wrong
            await asyncio.sleep(0.2)

    async def _look(self, expected: list[Held] | None) -> tuple[list[Held], list[str]]:
        wrong = []
        gauges = await self.router.gauges()
        for name, value in gauges.items():
            if name.partition("{")[0] in GAUGES and value:
                wrong.append(f"{name} is {value:g}")
            if name.startswith("pd_router_engine_healthy") and not value:
                wrong.append(f"{name} is 0")
        if gauges["pd_router_workers"] != self.router.workers:
            wrong.append(f"{gauges['pd_router_workers']:g} workers answer")
        listed = await self.router.engines()
        right = tuple(sorted((one.url, 0) for one in self.engines))
        if listed != {right}:
            if any(load for one in listed for _, load in one):
                # A worker sees the others' load when it chooses; without a request it lists what it saw last.
                for _ in range(4 * self.router.workers):
                    await self.router.get(PUBLIC, "/v1/models")
            wrong.append(f"/list_workers has {sorted({len(one) for one in listed})} engines or their load is not 0")
        held = [self.router.held(pid, self.engines) for pid in self.router.pids()]
        for number, (one, had) in enumerate(zip(held, expected or held, strict=True)):
            if one.files != had.files:
                wrong.append(f"process {number} has {one.files} open files, had {had.files}")
            if one.threads != had.threads:
                wrong.append(f"process {number} has {one.threads} threads, had {had.threads}")
            if expected and one.engines > PROBES * len(self.engines):
                wrong.append(f"process {number} has {one.engines} connections to {len(self.engines)} engines")
        return held, wrong

    def growth(self, began: float, ended: float) -> dict[int, tuple[float, float]]:
        """Give by process: MiB grown in the second half, from median to median, and MiB an hour of its best line."""
        half, found = (began + ended) / 2, {}
        for pid, samples in self.samples.items():
            late = [(at, mib) for at, mib in samples if half <= at <= ended]
            if len(late) < 4 or samples[-1][0] < ended - 5:
                continue
            tenth = max(2, len(late) // 10)
            grown = median(mib for _, mib in late[-tenth:]) - median(mib for _, mib in late[:tenth])
            mean_at = sum(at for at, _ in late) / len(late)
            mean = sum(mib for _, mib in late) / len(late)
            spread = sum((at - mean_at) ** 2 for at, _ in late)
            slope = sum((at - mean_at) * (mib - mean) for at, mib in late) / spread
            found[pid] = grown, slope * 3600
        return found


async def churn(told: argparse.Namespace) -> list[str]:
    """Run it all; print what happened and give what leaked."""
    draw = random.Random(told.seed)
    number = os.getpid()
    host = f"127.{200 + number % 50}.{number // 50 % 250}.1"
    engines = [Engine(role, host, draw) for role in ("prefill",) * PREFILLS + ("decode",) * DECODES]
    for engine in engines:
        await engine.start()
    router = Router(told.router, f"127.{200 + number % 50}.{number // 50 % 250}.2", told.workers, told.policy, engines)
    try:
        return await _churned(told, Churn(router, engines, draw, host))
    finally:
        if router.process.poll() is None:
            router.process.terminate()
            try:
                await asyncio.to_thread(router.process.wait, 40)
            except subprocess.TimeoutExpired:
                router.process.kill()
        for engine in engines:
            engine.kill()


async def _started(router: Router) -> None:
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(OSError, TimeoutError, KeyError):
            gauges = await router.gauges()
            well = [value for name, value in gauges.items() if name.startswith("pd_router_engine_healthy")]
            if gauges["pd_router_workers"] == router.workers and well == [1.0] * (PREFILLS + DECODES):
                return
        if router.process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"churn: the router does not start:\n{router.output()}")
        await asyncio.sleep(0.1)


async def _churned(told: argparse.Namespace, run: Churn) -> list[str]:
    router = run.router
    await _started(router)
    # Warm-up: what is made once, with the first request, the first failure and so on, is no leak.
    plain = [kind for kind in DAY if kind.startswith(("request", "client", "malformed", "metrics"))]
    await run.run(min(20.0, max(1.5, told.seconds / 10)), 1 / SECONDS, plain)
    before, wrong = await run.quiet()
    if wrong:
        return [f"after the warm-up: {one}" for one in wrong]
    run.done.clear()
    run.answers.clear()
    run.samples.clear()
    began = time.monotonic()
    await run.run(told.seconds, 1 / SECONDS)
    ended = time.monotonic()
    after, wrong = await run.quiet(before)
    grown = run.growth(began, ended)
    sent = run.answers["200"]
    await asyncio.gather(*(run.request() for _ in range(50)))
    if run.answers["200"] != sent + 50:
        wrong.append(f"of 50 requests in the quiet after it {run.answers['200'] - sent} were answered with 200")
    for pid, (mib, _) in grown.items():
        if mib > GROWTH:
            wrong.append(f"process {pid} grew by {mib:.1f} MiB in the second half, more than {GROWTH:g}")
    for odd in ("no answer within 40 s", "churn itself failed"):
        if run.answers[odd]:
            wrong.append(f"{run.answers[odd]} requests: {odd}")
    output = router.output()
    died = len(re.findall(r"worker=\d+ ended code=", output))
    if died != run.killed:
        wrong.append(f"{died} workers ended, {run.killed} were killed")
    if "Traceback" in output:
        wrong.append("the log has a Traceback:\n" + output[output.index("Traceback") - 300 :][:3000])
    _print(told, run, ended - began, before, after, grown)
    return wrong


def _print(
    told: argparse.Namespace, run: Churn, took: float, before: list[Held], after: list[Held],
    grown: dict[int, tuple[float, float]],
) -> None:  # fmt: skip
    share = told.seconds / SECONDS
    title = f"{took:.0f} s, {share:.3g} of a day ({24 * share:.3g} hours), {told.workers} worker(s), {told.policy}"
    events = Table(title=title, title_justify="left")
    for column in ("what happened", "times", "a day"):
        events.add_column(column, justify="left" if column == "what happened" else "right")
    for kind, count in run.done.items():
        events.add_row(kind, f"{count:,}", f"{DAY[kind]:,}")
    console.print(events)
    told_answers = ", ".join(f"{count:,} times {answer}" for answer, count in sorted(run.answers.items()))
    console.print(f"answers to requests: {told_answers}")
    table = Table(title="What each process of the router holds when all is quiet", title_justify="left")
    for column in ("process", "open files", "to engines", "threads", "MiB", "2nd half, MiB", "MiB/hour"):
        table.add_column(column, justify="right")
    for number, (pid, one, other) in enumerate(zip(run.router.pids(), before, after, strict=True)):
        more = grown.get(pid)
        table.add_row(
            f"{number}", f"{one.files} -> {other.files}", f"{one.engines} -> {other.engines}",
            f"{one.threads} -> {other.threads}", f"{one.mib:.1f} -> {other.mib:.1f}",
            *(("-", "-") if more is None else (f"{more[0]:+.1f}", f"{more[1]:+.1f}")),
        )  # fmt: skip
    console.print(table)


def main() -> None:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long; 600 (default) are a day's churn")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of the router (default 2)")
    parser.add_argument("--policy", default="pd_cost", help="how engines are chosen (default pd_cost)")
    parser.add_argument("--seed", type=int, default=1, help="of what happens when (default 1)")
    parser.add_argument("--router", default=f"{sys.executable} -m pdrouter", help="the program to run")
    told = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        wrong = runner.run(churn(told))
    for one in wrong:
        console.print(f"[red]churn: {one}[/red]", markup=True)
    if wrong:
        sys.exit(1)
    console.print("churn: nothing leaked")


if __name__ == "__main__":
    main()
