"""A router as a process, before fake engines of this process; every request of a test over a connection of its own."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from router.fakes import TICKET, Answer, FakeEngine, Out, Seen, answer_to, read_answer, until, wire
from support.processes import new_address

PUBLIC, METRICS, ADMIN = 10001, 29000, 29001


class Placed(FakeEngine):
    """An engine that tells who computed: a prefill engine in its ticket, a decode engine in `served`.

    A stream of it goes on until `hold` is set.
    """

    def __init__(self, url: str = "") -> None:
        super().__init__(self.serve)
        self.hold = asyncio.Event()
        self.url = url

    async def start(self, host: str = "", port: int = 0) -> None:
        told, _, at_port = self.url.removeprefix("http://").partition(":")
        self._server = await asyncio.start_server(
            self._accept, host or told or new_address(), port or int(at_port or 0)
        )
        at = self._server.sockets[0].getsockname()
        self.url = f"http://{at[0]}:{at[1]}"

    async def serve(self, seen: Seen, out: Out) -> None:
        ticket = seen.body["kv_transfer_params"]
        if ticket["do_remote_decode"]:
            await out.json(answer_to(seen, kv_transfer_params=TICKET | {"remote_engine_id": self.url}))
            return
        served = [ticket["remote_engine_id"], self.url]
        if not seen.body.get("stream"):
            await out.json(answer_to(seen, served=served))
            return
        await out.events()
        await out.chunk(b"data: " + json.dumps({"served": served}).encode() + b"\n\n")
        await self.hold.wait()
        await out.chunk(b"data: [DONE]\n\n")
        await out.end()


class Connection:
    """A client's connection to one worker."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.port: int = writer.get_extra_info("sockname")[1]

    async def complete(self, prompt: str = "hi", **fields: Any) -> Answer:
        self.writer.write(wire("POST", "/v1/completions", _completion(prompt, **fields)))
        return await read_answer(self.reader)

    async def begin(self, prompt: str = "hi") -> list[str]:
        """Begin a stream; give the engines that serve it."""
        self.writer.write(wire("POST", "/v1/completions", _completion(prompt, stream=True)))
        head = await self.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        told = await self.reader.readuntil(b"\n\n")
        served: list[str] = json.loads(told[told.index(b"{") :])["served"]
        return served

    async def rest(self) -> bytes:
        """Give what is left of a stream, up to its last chunk."""
        return await self.reader.readuntil(b"0\r\n\r\n")

    def close(self) -> None:
        self.writer.close()


def _completion(prompt: str, **fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": 8} | fields).encode()


class Served:
    """The router's processes, and clients of it."""

    def __init__(
        self, flags: Sequence[str], host: str, before: Sequence[str] = (), environment: dict[str, str] | None = None
    ) -> None:
        self.host = host
        self._connections: list[Connection] = []
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 closed by stop()
        places = ["--host", host, "--port", str(PUBLIC), "--prometheus-host", host, "--prometheus-port", str(METRICS)]
        places += ["--admin-host", host, "--admin-port", str(ADMIN)]
        self.process = subprocess.Popen(
            [*before, sys.executable, "-m", "pdrouter", "--vllm-pd-disaggregation", *places, *flags],
            stdout=self._log, stderr=subprocess.STDOUT, env=os.environ | (environment or {}),
        )  # fmt: skip

    def output(self) -> str:
        return os.pread(self._log.fileno(), 1 << 24, 0).decode()

    def workers(self) -> list[int]:
        """Pids of the workers that there are."""
        with suppress(psutil.NoSuchProcess):
            return [
                one.pid for one in psutil.Process(self.process.pid).children() if one.status() != psutil.STATUS_ZOMBIE
            ]
        return []

    async def ended(self, seconds: float = 8.0) -> int:
        """Wait for the end; give the exit status."""
        await until(lambda: self.process.poll() is not None, "the router ends", seconds)
        return self.process.returncode

    async def stop(self) -> None:
        """End it, whatever state it is in, and its workers."""
        for connection in self._connections:
            connection.close()
            with suppress(ConnectionError):
                await connection.writer.wait_closed()
        workers = self.workers()
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(AssertionError):
                await self.ended(5)
            if self.process.poll() is None:
                self.process.kill()
        self.process.wait()
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._log.close()

    async def connect(self, worker: int | None = None) -> Connection:
        """Open a connection, to one worker if that is told: as many are opened as it takes to meet it."""
        while True:
            connection = Connection(*await asyncio.open_connection(self.host, PUBLIC))
            self._connections.append(connection)
            if worker is None or await self.worker_of(connection) == worker:
                return connection
            connection.close()

    async def worker_of(self, connection: Connection) -> int:
        """Pid of the worker that accepted a connection; 0 when that was killed meanwhile."""
        for _ in range(1000):
            if connection.reader.at_eof() or connection.reader.exception() is not None:
                return 0
            inode = self._inode(connection.port)
            for pid in self.workers() if inode else ():
                with suppress(OSError):
                    for fd in os.listdir(f"/proc/{pid}/fd"):
                        with suppress(OSError):
                            if os.readlink(f"/proc/{pid}/fd/{fd}") == f"socket:[{inode}]":
                                return pid
            await asyncio.sleep(0.005)
        raise AssertionError("no worker accepted the connection")

    def _inode(self, port: int) -> str:
        """The router's end of the connection from a client's port."""
        local = socket.inet_aton(self.host)[::-1].hex().upper()
        for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            if fields[1] == f"{local}:{PUBLIC:04X}" and int(fields[2].rpartition(":")[2], 16) == port:
                return fields[9] if fields[9] != "0" else ""
        return ""

    async def ask(self, port: int, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        reader, writer = await asyncio.open_connection(self.host, port, limit=2**22)
        try:
            told = {name.replace("_", "-"): value for name, value in headers.items()}
            writer.write(wire(method, path, body, told))
            return await read_answer(reader, method)
        finally:
            writer.close()

    async def complete(self, prompt: str = "hi", **fields: Any) -> Answer:
        return await self.ask(PUBLIC, "POST", "/v1/completions", _completion(prompt, **fields))

    async def metrics(self) -> dict[str, float]:
        """Give the metrics page: name with labels, and value."""
        page = (await self.ask(METRICS, "GET", "/metrics")).body.decode()
        lines = (line.rpartition(" ") for line in page.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    async def total(self, name: str) -> float:
        """Give a metric, its rows added up."""
        page = await self.metrics()
        return sum(value for told, value in page.items() if told.partition("{")[0] == name)

    async def listed(self) -> dict[str, dict[str, Any]]:
        """Give /list_workers of one worker, by URL."""
        answer = await self.ask(ADMIN, "GET", "/list_workers")
        return {one["url"]: one for one in answer.json["workers"]}

    async def change(self, what: str, **told: str) -> Answer:
        return await self.ask(ADMIN, "POST", f"/{what}_worker", json.dumps(told).encode())

    async def ready(self, workers: int, engines: int) -> None:
        """Wait until all workers answer and find all engines well."""

        async def well() -> bool:
            assert self.process.poll() is None, self.output()
            try:
                page = await self.metrics()
            except (OSError, asyncio.IncompleteReadError):
                return False
            found = [value for name, value in page.items() if name.startswith("pd_router_engine_healthy{")]
            return page["pd_router_workers"] == workers and found == [1.0] * engines

        await eventually(well, "all workers find all engines well", 60)


async def eventually(condition: Any, what: str, seconds: float = 8.0) -> None:
    """Poll until what the coroutine function gives is true; fail when it never is."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not await condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.02)


def named(prefills: Sequence[FakeEngine], decodes: Sequence[FakeEngine]) -> list[str]:
    """Give the flags that name engines."""
    told = [part for one in prefills for part in ("--prefill", one.url)]
    return told + [part for one in decodes for part in ("--decode", one.url)]


@asynccontextmanager
async def served(
    *flags: str, workers: int = 2, prefills: int = 1, decodes: int = 2
) -> AsyncIterator[tuple[Served, list[Placed]]]:
    """Start engines and a router; give it and its engines, prefill first, when all workers know them all."""
    async with AsyncExitStack() as stack:
        engines = [Placed() for _ in range(prefills + decodes)]
        for engine in engines:
            await engine.start()
            stack.push_async_callback(engine.stop)
        told = [*named(engines[:prefills], engines[prefills:]), "--workers", str(workers)]
        told += ["--health-interval-secs", "0.2"]
        router = Served([*told, *flags], new_address())
        stack.push_async_callback(router.stop)
        await router.ready(workers, prefills + decodes)
        yield router, engines
