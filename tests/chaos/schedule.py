"""A seeded schedule of faults on a fleet, each of which ends by itself."""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from chaos.fleet import Difference, Fleet
from support.processes import Process

PAUSE = 1.2  # seconds between the end of a fault and the next one: engines get well, and requests meet a whole fleet


@dataclass
class Schedule:
    """Draws faults and does them, one after another."""

    fleet: Fleet
    draw: random.Random
    done: Counter[str] = field(default_factory=Counter)
    windows: list[tuple[str, float, float, str]] = field(default_factory=list)

    async def run(self, seconds: float) -> None:
        """Do faults for some time."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        faults: dict[str, Callable[[Process], Awaitable[None]]] = {
            "SIGKILL": self._kill, "SIGSTOP": self._stop, "refuse": self._refuse, "hang": self._hang,
            "slow": self._slow, "5xx": self._status, "die in a stream": self._die, "no request id": self._no_id,
            "edge broken": self._edge, "worker SIGKILL": self._worker,
        }  # fmt: skip
        names = list(faults)
        order: list[str] = []
        while loop.time() < end:
            if not order:
                order = self.draw.sample(names, len(names))
            name = order.pop()
            engine = self.draw.choice(self.fleet.engines)
            began = time.monotonic()
            await faults[name](engine)
            self.done[name] += 1
            self.windows.append((name, began, time.monotonic(), engine.url))
            await asyncio.sleep(PAUSE)
        await self._well()

    def stood(self, at: float) -> bool:
        """Whether an engine stood still at a time (seconds since the epoch) or had just gone on."""
        then = at - time.time() + time.monotonic()
        return any(name in ("SIGSTOP", "hang") and began < then < end + 1 for name, began, end, _ in self.windows)

    def told(self) -> str:
        """Tell for each fault how long the requests of its time were without a byte."""
        lines = [
            f"{'fault':16} {'times':>5} {'requests':>8} {'silence p50':>12} {'p99':>6} {'max':>6} s (simulated engines)"
        ]
        for name, count in sorted(self.done.items()):
            silent = sorted(
                one.silence
                for one in self.fleet.outcomes
                if any(fault == name and one.began < end and one.ended > began for fault, began, end, _ in self.windows)
            )
            if silent:
                p50, p99, most = silent[len(silent) // 2], silent[len(silent) * 99 // 100], silent[-1]
                lines.append(f"{name:16} {count:5} {len(silent):8} {p50:12.2f} {p99:6.2f} {most:6.2f}")
        return "\n".join(lines)

    def around(self, different: list[Difference], breaches: list[Any]) -> str:
        """Tell what stood wrong next to the faults of its time; times are seconds since the first fault."""
        start = self.windows[0][1]
        lines = [
            (began, f"{began - start:7.2f} to {end - start:7.2f} fault: {told}, drawn {engine}")
            for told, began, end, engine in self.windows
        ]
        for one in different:
            at = one.got.began
            lines.append((at, f"{at - start:7.2f} to {one.got.ended - start:7.2f} differs: {one.got.ids}"))
        for breach in breaches:
            at = breach["at"] - time.time() + time.monotonic()
            lines.append((at, f"{at - start:7.2f} breach: {breach}"))
        return "\n".join(line[:300] for _, line in sorted(lines))

    async def _well(self) -> None:
        """Wait until the router finds every engine well again."""
        for _ in range(600):
            told = await asyncio.to_thread(self.fleet.router.get, "/ready")
            if (told["prefill"]["healthy"], told["decode"]["healthy"]) == (
                len(self.fleet.prefills), len(self.fleet.decodes),
            ):  # fmt: skip
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"the router does not find all engines well: {told}")

    async def _tell(self, one: Process, **fault: Any) -> None:
        async with httpx.AsyncClient(timeout=20) as client:
            answer = await client.post(one.url + "/sim/fault", json=fault)
            assert answer.status_code == 200, answer.text

    async def _kill(self, one: Process) -> None:
        self.fleet.kill(one)
        await asyncio.sleep(0.5 + self.draw.random())
        self.fleet.restart(one)
        await self._well()

    async def _stop(self, one: Process) -> None:
        one.process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(self.draw.choice([6, 9]))  # about as long as a lease, or for certain longer
        finally:
            one.process.send_signal(signal.SIGCONT)
        await self._well()

    async def _refuse(self, one: Process) -> None:
        await self._tell(one, kind="refuse", seconds=1.5)
        await asyncio.sleep(1.5)
        await self._well()

    async def _hang(self, one: Process) -> None:
        await self._tell(one, kind="hang", seconds=8)
        await asyncio.sleep(8)
        await self._well()

    async def _slow(self, one: Process) -> None:
        await self._tell(one, kind="slow", factor=8, seconds=2)
        await asyncio.sleep(2)

    async def _status(self, one: Process) -> None:
        await self._tell(one, kind="status", code=self.draw.choice([500, 502, 503]), count=3)
        await asyncio.sleep(0.5)
        await self._tell(one, kind="none")

    async def _die(self, one: Process) -> None:
        await self._tell(one, kind="die_mid_stream", after_tokens=self.draw.choice([0, 1, 5, 20]), count=3)
        await asyncio.sleep(1)
        await self._tell(one, kind="none")

    async def _no_id(self, one: Process) -> None:
        await self._tell(self.draw.choice(self.fleet.prefills), kind="drop_remote_request_id", count=3)
        await asyncio.sleep(0.5)

    async def _edge(self, one: Process) -> None:
        decode, prefill = self.draw.choice(self.fleet.decodes), self.draw.choice(self.fleet.prefills)
        await self._tell(decode, kind="edge", host=prefill.url.split("//")[1].split(":")[0], port=5600)
        await asyncio.sleep(2)
        await self._tell(decode, kind="none")

    async def _worker(self, one: Process) -> None:
        workers = psutil.Process(self.fleet.router.process.pid).children()
        if not workers:
            return
        one_of_them = self.draw.choice(workers)
        with self.fleet.worker_dies():
            one_of_them.kill()
            await asyncio.to_thread(psutil.wait_procs, [one_of_them], 5)
        await self._well()
