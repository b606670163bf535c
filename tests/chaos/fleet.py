"""A local fleet under constant mixed load, whose every answer is compared with a plain engine's."""

import asyncio
import json
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

from support.processes import Process, engine, router, start_all, until
from support.requests import CHAT, COMPLETIONS, completion, prompt

Request = tuple[str, dict[str, Any]]


@dataclass
class Outcome:
    """What became of one request. Times are `time.monotonic` seconds."""

    request: Request
    began: float
    status: int = 0
    text: str = ""
    finish: str | None = None
    usage: dict[str, Any] | None = None
    error: str = ""
    ids: set[str] = field(default_factory=set)
    events: list[float] = field(default_factory=list)

    @property
    def gap(self) -> float:
        """Longest time between two events of a stream."""
        return max((later - earlier for earlier, later in pairwise(self.events)), default=0.0)

    @property
    def ended(self) -> float:
        """When its last event came."""
        return self.events[-1] if self.events else self.began

    @property
    def silence(self) -> float:
        """Longest time without an event, from sending it on; of a whole answer, its time."""
        return max((later - earlier for earlier, later in pairwise([self.began, *self.events])), default=0.0)

    def told(self) -> tuple[Any, ...]:
        """What must be as a plain engine says it."""
        return self.status, self.error, self.text, self.finish, self.usage


def requests(seed: int, tokens: tuple[int, ...] = (4, 40, 120)) -> Iterator[Request]:
    """Give requests of many kinds without end, the same for the same seed."""
    draw = random.Random(seed)
    shared = [prompt(seed * 100 + number, 300) for number in range(4)]
    number = 0
    while True:
        number += 1
        head = draw.choice(shared) + " " if draw.random() < 0.3 else ""
        text = head + prompt(seed * 100_000 + number, draw.choice([5, 60, 200, 400]))
        fields: dict[str, Any] = {"max_tokens": draw.choice(tokens), "user": f"u{draw.randrange(32)}"}
        fields |= draw.choice([{}, {}, {"stop": ["zz", "qx"]}, {"ignore_eos": True}, {"min_tokens": 2}])
        if draw.random() < 0.75:
            fields |= {"stream": True}
            fields |= draw.choice([{}, {"stream_options": {"include_usage": True}}])
        if draw.random() < 0.3:
            messages = [{"role": "user", "content": text}]
            yield CHAT, {"model": "tiny", "messages": messages, "temperature": 0} | fields
        else:
            yield COMPLETIONS, completion(text, **fields)


async def ask(client: httpx.AsyncClient, url: str, request: Request) -> Outcome:
    """Send one request and read its answer."""
    path, body = request
    told = Outcome(request, time.monotonic())
    try:
        async with client.stream("POST", url + path, json=body) as answer:
            told.status = answer.status_code
            if not body.get("stream") or answer.status_code != 200:
                whole = json.loads(await answer.aread())
                told.events.append(time.monotonic())
                if "error" in whole:
                    told.error = whole["error"]["message"]
                else:
                    told.usage = {name: whole["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
                    _take(told, whole["choices"][0])
                return told
            done = False
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                assert not done, "nothing may follow [DONE]"
                told.events.append(time.monotonic())
                if line == "data: [DONE]":
                    done = True
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    told.error = chunk["error"]["message"]
                    continue
                told.ids.add(chunk["id"])
                if chunk.get("usage"):
                    told.usage = {name: chunk["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
                if chunk["choices"]:
                    _take(told, chunk["choices"][0])
            if not done and not told.error:
                told.error = "no [DONE]"
    except httpx.HTTPError as error:
        told.error = f"{type(error).__name__}: {error}"
    return told


def _take(told: Outcome, choice: dict[str, Any]) -> None:
    if "message" in choice:
        told.text += choice["message"]["content"]
    elif "delta" in choice:
        told.text += choice["delta"].get("content") or ""
    else:
        told.text += choice["text"]
    told.finish = choice["finish_reason"] or told.finish


@dataclass
class Difference:
    """An answer that is not as a plain engine gives it."""

    got: Outcome
    want: Outcome

    def __str__(self) -> str:
        got, want = self.got, self.want
        return f"{got.request}\n  got  {got.told()} ids {got.ids}\n  want {want.told()}"


@dataclass
class Fleet:
    """Engines, a plain one to compare with, and the router."""

    prefills: list[Process]
    decodes: list[Process]
    plain: Process
    router: Process
    outcomes: list[Outcome] = field(default_factory=list)
    _sent: int = 0
    _running: set[int] = field(default_factory=set)
    _excused: set[int] = field(default_factory=set)
    _dying: bool = False

    @property
    def engines(self) -> list[Process]:
        return [*self.prefills, *self.decodes]

    @property
    def metrics(self) -> dict[str, float]:
        """The router's metrics page: name with labels, and value."""
        page = httpx.get(self.router.url.replace(":10001", ":29000") + "/metrics").text
        lines = (line.rpartition(" ") for line in page.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    def total(self, name: str) -> float:
        """A metric, its rows added up."""
        return sum(value for told, value in self.metrics.items() if told.partition("{")[0] == name)

    def kill(self, one: Process) -> None:
        """End an engine as a crash does."""
        one.process.send_signal(signal.SIGKILL)
        one.process.wait()

    def restart(self, one: Process) -> None:
        """Start an engine again at its address."""
        if one.process.poll() is None:
            self.kill(one)
        one.log.close()
        one.start()

    @contextmanager
    def worker_dies(self) -> Iterator[None]:
        """Excuse the requests that are under way or sent meanwhile: one of the router's processes is killed."""
        self._excused |= self._running
        self._dying = True
        try:
            yield
        finally:
            self._dying = False

    async def under_load(
        self, faults: Any, clients: int = 16, seed: int = 1, tokens: tuple[int, ...] = (4, 40, 120), keep: bool = True
    ) -> None:
        """Let clients send one request after another until `faults` (a coroutine) is over.

        With `keep` they keep their connections, else each request has its own.
        """
        made = requests(seed, tokens)
        limits = httpx.Limits(max_connections=clients + 4, max_keepalive_connections=None if keep else 0)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:

            async def one() -> None:
                while not over.is_set():
                    number = self._sent = self._sent + 1
                    self._running.add(number)
                    if self._dying:
                        self._excused.add(number)
                    outcome = await ask(client, self.router.url, next(made))
                    self._running.discard(number)
                    # Streams of a killed worker process break: nobody else has their sockets.
                    if number not in self._excused or not outcome.error:
                        self.outcomes.append(outcome)

            over = asyncio.Event()
            work = [asyncio.ensure_future(one()) for _ in range(clients)]
            try:
                await faults
            finally:
                over.set()
            await asyncio.gather(*work)

    async def compare(self) -> list[Difference]:
        """Ask the plain engine everything and give what differs, in the order of asking."""
        limits = httpx.Limits(max_connections=16, max_keepalive_connections=0)  # engines close idle ones at any time
        async with httpx.AsyncClient(timeout=300, limits=limits) as client:
            gate = asyncio.Semaphore(16)

            async def one(outcome: Outcome) -> Difference | None:
                async with gate:
                    right = await ask(client, self.plain.url, outcome.request)
                if outcome.told() == right.told() and len(outcome.ids) <= 1:
                    return None
                return Difference(outcome, right)

            told = await asyncio.gather(*map(one, sorted(self.outcomes, key=lambda one: one.began)))
        return [one for one in told if one is not None]

    def told(self) -> None:
        """Print what the faults cost."""
        gaps = sorted(one.gap for one in self.outcomes)
        print(
            f"{len(self.outcomes)} requests; longest gap in a stream: p50 {gaps[len(gaps) // 2]:.2f} s, "
            f"p99 {gaps[len(gaps) * 99 // 100]:.2f} s, max {gaps[-1]:.2f} s; "
            f"tries {self.total('pd_router_retries_total'):.0f}, "
            f"streams continued {self.total('pd_router_continued_streams_total'):.0f}"
        )

    def violations(self) -> list[Any]:
        """What engines that live say the router did against the protocol."""
        return [entry for one in self.engines for entry in one.get("/sim/violations")]

    def quiet(self) -> None:
        """Fail unless everything is given back: tickets, load rows, pinned blocks."""
        for one in self.engines:
            until(one.ready, 60, f"{one.url} answers")
        names = ("pd_router_tickets", "pd_router_pinned_kv_tokens", "pd_router_in_flight", "pd_router_held_tokens",
                 "pd_router_queued_tokens", "pd_router_requests_running", "pd_router_requests_waiting")  # fmt: skip
        until(lambda: not any(self.total(name) for name in names), 8, "the router's account is empty")
        pinned = lambda: [one.get("/sim/state")["blocks"]["pinned"] for one in self.engines]  # noqa: E731
        until(lambda: not any(pinned()), 8, f"no block is left pinned: {pinned()}")


@contextmanager
def fleet(prefills: int = 2, decodes: int = 4, speed: float = 4, *flags: str, lease: float = 30) -> Iterator[Fleet]:
    """Start a fleet and give it."""
    told = ["--speed", str(speed), "--kv-lease-duration", str(lease * speed)]  # the engines' clock runs so much faster
    some = [engine("prefill", *told) for _ in range(prefills)]
    others = [engine("decode", *told) for _ in range(decodes)]
    plain = engine("both", "--speed", "50")
    everything = [*some, *others, plain]
    start_all(everything)
    try:
        with router(some, others, "--kv-lease-seconds", str(lease), *flags) as started:
            until(lambda: started.get("/ready")["decode"]["healthy"] == decodes, 20, "all engines are healthy")
            yield Fleet(some, others, plain, started)
    finally:
        for one in everything:
            one.stop(signal.SIGKILL)
