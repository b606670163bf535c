"""What attacks cost other clients: p99 of ordinary requests without and with each attack (`make bench-attack`).

The router runs on a core of its own where there are two. Attackers, ordinary clients and stand-in engines share the
rest, attackers with the lowest priority, so that what ordinary clients wait for is the router and not their own turn.
Fails when an ordinary request fails, when the router grows by more than an attack may cost, or when it logs a failure
of its own.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import quantiles
from typing import Any

import uvloop
from attacks import ATTACKS, Attack, Target, go_on
from rich.table import Table
from screen import console

PUBLIC, METRICS, PREFILL, DECODE = 10001, 29000, 8000, 8200
AT_ONCE = 8  # ordinary requests under way
MOST_LEAD = 10.0  # seconds after an attack's connections are open, in which its buffers become full
PAUSE = 0.01  # seconds between an ordinary client's answer and its next request
_BODY = b'{"model":"tiny","prompt":"an ordinary prompt of a few words","max_tokens":8,"stream":%b}'
_TICKET = {
    "do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [1], "tp_size": 1,
    "remote_engine_id": "e", "remote_host": "127.0.0.1", "remote_port": 5600, "remote_request_id": "r",
}  # fmt: skip


_USAGE = {"prompt_tokens": 8, "total_tokens": 9, "completion_tokens": 1}


def _answer(text: str) -> bytes:
    choices = [{"index": 0, "text": text}]
    return json.dumps({"id": "c", "model": "tiny", "choices": choices, "usage": _USAGE}).encode()


_SMALL, _LARGE = _answer("x"), _answer("x" * 256_000)


# engines


class Engine(asyncio.Protocol):
    """A stand-in for an engine that answers at once."""

    def __init__(self) -> None:
        self._data = b""
        self._going = asyncio.Event()
        self._going.set()
        self._stream: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport (asyncio)."""
        self._transport: Any = transport

    def pause_writing(self) -> None:
        """The router does not keep up (asyncio)."""
        self._going.clear()

    def resume_writing(self) -> None:
        """It does again (asyncio)."""
        self._going.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop streaming (asyncio)."""
        self._going.set()
        if self._stream is not None:
            self._stream.cancel()

    def data_received(self, data: bytes) -> None:
        """Answer each complete request (asyncio)."""
        self._data += data
        while b"\r\n\r\n" in self._data:
            head, _, rest = self._data.partition(b"\r\n\r\n")
            found = re.search(rb"content-length: (\d+)", head)
            size = int(found[1]) if found else 0
            if len(rest) < size:
                return
            body, self._data = rest[:size], rest[size:]
            self._answer(head.split(b" ", 2)[1], body)

    def _send(self, told: object) -> None:
        raw = told if isinstance(told, bytes) else json.dumps(told).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self._transport.write(head % len(raw) + raw)

    def _answer(self, path: bytes, body: bytes) -> None:
        if path == b"/v1/models":
            self._send({"data": [{"id": "tiny", "root": "tiny"}]})
        elif path == b"/version":
            self._send({"version": "0.32.0"})
        elif not body:
            self._send({})
        elif b'"do_remote_decode":true' in body:
            choices = [{"index": 0, "text": "x"}]
            self._send({"id": "c", "model": "tiny", "choices": choices, "usage": _USAGE, "kv_transfer_params": _TICKET})
        elif b'"stream":true' in body:
            self._stream = asyncio.ensure_future(self._events(b'"endless"' in body))
        else:
            self._send(_LARGE if b'"whole"' in body else _SMALL)

    async def _events(self, endless: bool) -> None:
        kind = b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        self._transport.write(b"HTTP/1.1 200 OK\r\n" + kind)
        event = b'data: {"id":"c","choices":[{"index":0,"text":"%b"}]}\n\n' % (b"x" * (16_000 if endless else 4))
        chunk = b"%x\r\n%b\r\n" % (len(event), event)
        if endless:  # at once what buffers on the way take, so that all are full soon
            self._transport.write(chunk * 40)
        while endless and not self._transport.is_closing():
            await self._going.wait()
            self._transport.write(chunk)
            await asyncio.sleep(0.2)
        self._transport.write(chunk * 8)
        done = b"data: [DONE]\n\n"
        self._transport.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(done), done))


async def _engines(host: str) -> None:
    loop = asyncio.get_running_loop()
    for port in (PREFILL, DECODE):
        await loop.create_server(Engine, host, port)
    await asyncio.Event().wait()


# ordinary clients


class Ordinary:
    """Clients that behave, one after another on connections of their own."""

    def __init__(self, host: str) -> None:
        self._host = host
        self.seconds: list[float] = []
        self.outcomes: Counter[str] = Counter()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stream: bool) -> str:
        body = _BODY % (b"true" if stream else b"false")
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: r\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
        writer.write(head % len(body) + body)
        told = await reader.readuntil(b"\r\n\r\n")
        if not told.startswith(b"HTTP/1.1 200 "):
            return told[9:12].decode()
        if stream:
            rest = await reader.readuntil(b"\r\n0\r\n\r\n")
            return "200" if b"[DONE]" in rest else "a cut stream"
        await reader.readexactly(int(told.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        return "200"

    async def _client(self, number: int, until: float) -> None:
        reader, writer = await asyncio.open_connection(self._host, PUBLIC)
        try:
            while time.perf_counter() < until:
                number += 1
                began = time.perf_counter()
                async with asyncio.timeout(30):
                    outcome = await self._ask(reader, writer, number % 2 == 0)
                self.seconds.append(time.perf_counter() - began)
                self.outcomes[outcome] += 1
                if number % 20 == 0:  # and now and then somebody new comes
                    writer.close()
                    reader, writer = await asyncio.open_connection(self._host, PUBLIC)
                await asyncio.sleep(PAUSE)
        except (OSError, asyncio.IncompleteReadError) as error:
            self.outcomes[type(error).__name__] += 1
        finally:
            writer.close()

    async def run(self, seconds: float) -> None:
        """Send requests for some seconds; those that are under way then are waited for."""
        until = time.perf_counter() + seconds
        await asyncio.gather(*(self._client(number, until) for number in range(AT_ONCE)))


# processes


def _be(core: int | None, nice: int) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.nice(nice)
    if core is not None:
        os.sched_setaffinity(0, {core})


def _run(work: Any) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


def _serve_engines(core: int | None, host: str) -> None:
    _be(core, 0)
    _run(_engines(host))


def _behave(core: int | None, host: str, told: Connection) -> None:
    _be(core, 0)
    while seconds := told.recv():
        clients = Ordinary(host)
        _run(clients.run(seconds))
        told.send((clients.seconds, clients.outcomes))


async def _attacked(attack: Attack, host: str, told: Connection) -> Counter[str]:
    target = Target(host, PUBLIC)
    await go_on(attack, target, lambda: told.send("opened"), asyncio.to_thread(told.recv))
    return target.answers


def _attack(core: int | None, host: str, told: Connection) -> None:
    _be(core, 10)
    while asked := told.recv():
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            told.send(runner.run(_attacked(next(one for one in ATTACKS if one.name == asked), host, told)))


class Helper:
    """A process that does as told."""

    def __init__(self, work: Any, *arguments: Any) -> None:
        self.told, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=work, args=(*arguments, theirs), daemon=True)
        self.process.start()


class Router:
    """The router, watched."""

    def __init__(self, command: str, core: int | None, host: str, engines: str) -> None:
        self.host = host
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 closed with this process
        flags = ["--prefill", f"http://{engines}:{PREFILL}", "--decode", f"http://{engines}:{DECODE}", "--host", host]
        flags += ["--port", str(PUBLIC), "--prometheus-host", host, "--prometheus-port", str(METRICS)]
        pinned = [] if core is None else ["taskset", "-c", str(core)]
        self.process = subprocess.Popen([*pinned, *command.split(), *flags], stdout=self.log, stderr=subprocess.STDOUT)
        self._most = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def output(self) -> str:
        """Everything it printed."""
        return os.pread(self.log.fileno(), 1 << 28, 0).decode(errors="replace")

    def mib(self) -> float:
        """Resident memory now."""
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8").splitlines()
            return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024
        return 0.0

    def _watch(self) -> None:
        while self.process.poll() is None:
            self._most = max(self._most, self.mib())
            time.sleep(0.02)

    def most(self) -> float:
        """The most resident memory since this was last asked."""
        most, self._most = self._most, self.mib()
        return most

    def ready(self) -> None:
        """Wait until it serves."""
        deadline = time.monotonic() + 30
        while "healthy=true" not in self.output() or self.output().count("healthy=true") < 2:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"bench-attack: the router does not start:\n{self.output()}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()


# measuring


@dataclass
class Measured:
    """Ordinary requests while an attack goes on, and before it. Times are milliseconds."""

    attack: str
    connections: int
    quiet_p99: float
    p50: float
    p99: float
    longest: float
    requests: int
    failures: dict[str, int]
    mib: float
    grown: float
    allowed: float
    attackers: dict[str, int]


def _percentiles(seconds: list[float]) -> tuple[float, float]:
    if len(seconds) < 2:
        return float("nan"), float("nan")
    cuts = quantiles(seconds, n=100, method="inclusive")
    return cuts[49] * 1000, cuts[98] * 1000


def _measure(
    attack: Attack, router: Router, clients: Helper, attackers: Helper, quiet: float, seconds: float
) -> Measured:
    clients.told.send(quiet)
    calm, _ = clients.told.recv()
    router.most()
    before = router.mib()
    attackers.told.send(attack.name)
    attackers.told.recv()
    deadline = time.monotonic() + MOST_LEAD
    grows = attack.fills
    while grows and time.monotonic() < deadline:
        mib = router.mib()
        time.sleep(0.5)
        grows = router.mib() > mib + 1
    clients.told.send(seconds)
    told, outcomes = clients.told.recv()
    attackers.told.send(())
    answers = attackers.told.recv()
    most = router.most()
    failures = {outcome: count for outcome, count in outcomes.items() if outcome != "200"}
    p50, p99 = _percentiles(told)
    return Measured(
        attack.name, attack.connections, _percentiles(calm)[1], p50, p99, max(told, default=0) * 1000, len(told),
        failures, most, most - before, attack.mib, dict(answers),
    )  # fmt: skip


def wrong(measured: list[Measured], output: str) -> list[str]:
    """Say what must not be."""
    found = []
    for one in measured:
        if one.failures or not one.requests:
            found.append(f"{one.attack}: of {one.requests} ordinary requests failed {one.failures or 'all'}")
        if one.grown > one.allowed:
            found.append(f"{one.attack}: the router grew by {one.grown:.0f} MiB, more than {one.allowed:g}")
    if "Traceback" in output:
        found.append("the router failed: " + output[output.index("Traceback") - 200 :][:2000])
    return found


COLUMNS = (
    "attack", "connections", "p99 before, ms", "p50, ms", "p99, ms", "longest, ms", "ordinary requests",
    "failed", "memory, MiB", "attackers were answered",
)  # fmt: skip


def _row(one: Measured) -> tuple[str, ...]:
    answers = ", ".join(f"{count:,} times {what}" for what, count in sorted(one.attackers.items())) or "nothing"
    return (
        one.attack, f"{one.connections:,}", f"{one.quiet_p99:.1f}", f"{one.p50:.1f}", f"{one.p99:.1f}",
        f"{one.longest:.0f}", f"{one.requests:,}", f"{sum(one.failures.values())}", f"{one.mib:.0f}", answers,
    )  # fmt: skip


def _markdown(measured: list[Measured], seconds: float) -> str:
    cpus = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    told = f"{cpus[0] if cpus else platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}"
    lines = [
        f"Machine: {told}, Python {platform.python_version()}. {time.strftime('%Y-%m-%d')}, "
        f"{seconds:g} s of each attack; engines are stand-ins that answer at once.",
        "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|",
    ]  # fmt: skip
    lines += [f"| {' | '.join(_row(one))} |" for one in measured]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Attack, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each attack is measured (default 10)")
    parser.add_argument("--quiet", type=float, default=5.0, help="how long without an attack before each (default 5)")
    parser.add_argument("--only", action="append", metavar="NAME", help="only this attack; repeat for more")
    parser.add_argument("--router", default=f"{sys.executable} -m pdrouter", help="the program to run")
    parser.add_argument("--json", type=Path, help="write the figures as JSON to this file")
    parser.add_argument("--report", type=Path, help="write the table as Markdown between the marks in this file")
    told = parser.parse_args()
    chosen = [one for one in ATTACKS if not told.only or one.name in told.only]
    if not chosen:
        parser.error(f"--only knows {', '.join(one.name for one in ATTACKS)}")
    measured, output = _measured(told, chosen)
    table = Table(
        title=f"Ordinary requests, {AT_ONCE} at once, {told.seconds:g} s of each attack", title_justify="left"
    )
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in (COLUMNS[0], COLUMNS[-1]) else "right")
    for one in measured:
        table.add_row(*_row(one))
    console.print(table)
    if told.json is not None:
        told.json.write_text(json.dumps([asdict(one) for one in measured], indent=1) + "\n", encoding="utf-8")
    if told.report is not None:
        text = told.report.read_text(encoding="utf-8")
        before, _, rest = text.partition("<!-- attacks -->\n")
        _, _, after = rest.partition("<!-- end -->")
        page = f"{before}<!-- attacks -->\n{_markdown(measured, told.seconds)}<!-- end -->{after}"
        told.report.write_text(page, encoding="utf-8")
    found = wrong(measured, output)
    for one in found:
        console.print(f"bench-attack: {one}", style="red", markup=False)
    if found:
        sys.exit(1)


def _measured(told: argparse.Namespace, chosen: list[Attack]) -> tuple[list[Measured], str]:
    cores = sorted(os.sched_getaffinity(0))
    core, rest = (cores[0], cores[1]) if len(cores) > 1 else (None, None)
    number = os.getpid()
    engines, host = (f"127.{150 + number % 50}.{number // 50 % 250}.{last}" for last in (1, 2))
    serving = multiprocessing.Process(target=_serve_engines, args=(rest, engines), daemon=True)
    serving.start()
    router = Router(told.router, core, host, engines)
    clients, attackers = Helper(_behave, rest, host), Helper(_attack, rest, host)
    try:
        router.ready()
        clients.told.send(1.0)  # what is made with the first requests is made before anything is measured
        clients.told.recv()
        measured = []
        for attack in chosen:
            console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {attack.name}")
            measured.append(_measure(attack, router, clients, attackers, told.quiet, told.seconds))
        return measured, router.output()
    finally:
        router.stop()
        for process in (serving, clients.process, attackers.process):
            process.terminate()


if __name__ == "__main__":
    main()
