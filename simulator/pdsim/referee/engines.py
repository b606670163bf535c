"""The simulated engines behind the router: started, disturbed, and made well again."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any
from urllib.parse import urlsplit

import httpx

from pdsim.referee.case import NotApplicableError, Plan
from pdsim.referee.places import Places

MODEL = "tiny"
SPEED = 10.0
KEEP_REQUESTS = 2000
START_SECONDS = 120.0
PORTS = {"prefill": 8000, "decode": 8200, "both": 8300}


class RefereeError(Exception):
    """The referee cannot go on; the message says why and what to do."""


async def until(condition: Callable[[], Awaitable[Any]], seconds: float) -> Any:
    """Poll until the condition gives something true; give that, or nothing when the time is over."""
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        value = await condition()
        if value or asyncio.get_running_loop().time() > deadline:
            return value
        await asyncio.sleep(0.02)


@dataclass(slots=True, eq=False)
class Engine:
    """One simulated engine, a process of ours or one that ran before us."""

    role: str
    url: str
    client: httpx.AsyncClient
    flags: Sequence[str] = ()
    side_port: int = 5600
    process: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = None
    paused: bool = False

    @property
    def name(self) -> str:
        """Host and port."""
        return urlsplit(self.url).netloc

    def start(self) -> None:
        """Start the process; it answers later."""
        parts = urlsplit(self.url)
        self.log = self.log or tempfile.TemporaryFile()  # noqa: SIM115 closed by `stop`
        command = [sys.executable, "-m", "pdsim.engine", "--role", self.role, "--host", str(parts.hostname)]
        command += ["--port", str(parts.port), "--side-channel-port", str(self.side_port), "--model", MODEL]
        command += ["--keep-requests", str(KEEP_REQUESTS), *self.flags]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT)
        self.paused = False

    async def answers(self) -> bool:
        """Whether it answers."""
        try:
            return (await self.client.get(self.url + "/health", timeout=2)).status_code == 200
        except httpx.HTTPError:
            return False

    async def ready(self, seconds: float = START_SECONDS) -> None:
        """Wait until it answers.

        Raises:
            RefereeError: it does not.
        """

        async def there() -> bool:
            if self.process is not None and self.process.poll() is not None:
                raise RefereeError(f"the engine {self.url} ended with {self.process.returncode}: {self.tail()}")
            return await self.answers()

        if not await until(there, seconds):
            raise RefereeError(f"the engine {self.url} does not answer within {seconds:g} s")

    def tail(self) -> str:
        """The last lines that it printed."""
        if self.log is None:
            return "(no log)"
        self.log.seek(0)
        return " | ".join(self.log.read().decode(errors="replace").splitlines()[-3:])

    def _ours(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            raise NotApplicableError("needs to end engine processes, and these engines are not the referee's")
        return self.process

    @property
    def alive(self) -> bool:
        """Whether the process runs, as far as that can be seen."""
        return self.process is None or self.process.poll() is None

    def kill(self) -> None:
        """End it at once (SIGKILL)."""
        process = self._ours()
        process.kill()
        process.wait()

    def pause(self) -> None:
        """Let it stand still (SIGSTOP): its machine still accepts connections, and nobody answers."""
        self._ours().send_signal(signal.SIGSTOP)
        self.paused = True

    def go_on(self) -> None:
        """Go on after `pause`."""
        self._ours().send_signal(signal.SIGCONT)
        self.paused = False

    async def end(self) -> None:
        """End it as an orchestrator does (SIGTERM) and wait until it is gone."""
        process = self._ours()
        process.terminate()
        await asyncio.to_thread(process.wait)

    async def restart(self) -> None:
        """Start it again at the same address, under a new engine id, and wait until it answers."""
        self.start()
        await self.ready()

    def stop(self) -> None:
        """End it for good."""
        if self.process is not None and self.process.poll() is None:
            if not self.paused:
                self.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(3)
            self.process.kill()
            self.process.wait()
        if self.log is not None:
            self.log.close()
            self.log = None

    # --- what it tells and takes --------------------------------------------------------------------------------

    async def get(self, path: str) -> Any:
        """Get JSON."""
        return (await self.client.get(self.url + path, timeout=5)).json()

    async def state(self) -> dict[str, Any]:
        """Give `/sim/state`."""
        told: dict[str, Any] = await self.get("/sim/state")
        return told

    async def requests(self) -> list[dict[str, Any]]:
        """Give the POST requests that reached it."""
        told: list[dict[str, Any]] = await self.get("/sim/requests")
        return told

    async def violations(self) -> list[dict[str, Any]]:
        """Give the breaches of the handoff protocol that it saw."""
        told: list[dict[str, Any]] = await self.get("/sim/violations")
        return told

    async def fault(self, kind: str, **fields: Any) -> None:
        """Ask for a fault."""
        await self.client.post(self.url + "/sim/fault", json={"kind": kind} | fields, timeout=5)

    async def idle(self) -> bool:
        """Whether nothing runs, waits or is kept for somebody."""
        state = await self.state()
        return not state["running"] and not state["waiting"] and not state["blocks"]["pinned"]

    async def heal(self) -> None:
        """Make it well and forget what was: faults, tickets, cached prefixes, requests, violations."""
        if self.paused:
            self.go_on()
        for _ in range(2):  # one whose core has just died ends a moment later
            if not self.alive:
                self.start()
            with contextlib.suppress(RefereeError):
                await self.ready()
                break
        else:
            await self.ready()
        await self.fault("none")
        await self.fault("expire_leases")
        if not await until(self.idle, 3) and self.process is not None:
            self.kill()
            await self.restart()
        await self.client.post(self.url + "/reset_prefix_cache", timeout=5)
        for path in ("/sim/violations", "/sim/requests"):
            await self.client.delete(self.url + path, timeout=5)


@dataclass(slots=True)
class Fleet:
    """Prefill and decode engines, and a plain one that tells what the right answer is."""

    plan: Plan
    prefills: list[Engine]
    decodes: list[Engine]
    plain: Engine
    attached: bool = field(default=False)

    @property
    def engines(self) -> list[Engine]:
        """The engines behind the router."""
        return [*self.prefills, *self.decodes]

    async def start(self) -> None:
        """Start those that do not run yet, and wait for all."""
        for engine in [*self.engines, self.plain]:
            if engine.process is None and not await engine.answers():
                engine.start()
        await asyncio.gather(*(engine.ready() for engine in [*self.engines, self.plain]))

    async def heal(self) -> None:
        """Make all well."""
        await asyncio.gather(*(engine.heal() for engine in [*self.engines, self.plain]))

    def stop(self) -> None:
        """End what is ours."""
        for engine in [*self.engines, self.plain]:
            engine.stop()


def fleet(plan: Plan, places: Places, client: httpx.AsyncClient, named: tuple[list[str], list[str]] | None) -> Fleet:
    """Make the engines of a plan, not started; those named by URL are taken as they are, or started there.

    The decode engines follow vLLM's default when KV cannot be fetched: the request fails.
    """

    def settings(lease_seconds: float) -> list[str]:
        return ["--kv-lease-duration", f"{lease_seconds * SPEED:g}", "--speed", f"{SPEED:g}"]

    flags = {
        "prefill": settings(plan.lease_seconds),
        "decode": [*settings(plan.decode_lease_seconds or plan.lease_seconds), "--kv-load-failure-policy", "fail"],
        "both": settings(plan.lease_seconds),
    }
    if plan.prefill_blocks is not None:
        flags["prefill"] += ["--num-gpu-blocks", str(plan.prefill_blocks)]
    if plan.decode_seats is not None:
        flags["decode"] += ["--max-num-seqs", str(plan.decode_seats)]

    def made(role: str, url: str | None = None) -> Engine:
        if url is None:
            host = places.host()
            return Engine(role, f"http://{host}:{places.port(PORTS[role])}", client, flags[role], places.port(5600))
        return Engine(role, url, client, flags[role], (urlsplit(url).port or 80) + 1000)

    if named is None:
        prefills = [made("prefill") for _ in range(plan.prefills)]
        decodes = [made("decode") for _ in range(plan.decodes)]
    else:
        prefills, decodes = [made("prefill", url) for url in named[0]], [made("decode", url) for url in named[1]]
    return Fleet(plan, prefills, decodes, made("both"), named is not None)
