"""A fleet in virtual time: engines, a router, and the requests that come."""

import gc
from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdrouter.policies import READ_METRICS
from pdsim.timing import load_profile
from pdsim.virtual.clock import Clock
from pdsim.virtual.engine import BLOCK, Engine
from pdsim.virtual.router import Journey, Router, Row
from pdsim.virtual.workload import Workload


@dataclass(frozen=True)
class Setup:
    """What is simulated. Times are seconds.

    Args:
        prefill: prefill engines; with none, decode engines do both.
        decode: decode engines.
        prefill_policy: name of the policy that chooses prefill engines.
        decode_policy: the same for decode engines; empty for the same.
        speed: how many times quicker than in the trace requests come.
        concurrency: requests at once, the next one coming when one has ended; 0 for the trace's own times.
        gpu: name of the timing profile.
        kv_tokens: tokens that each engine's KV cache holds; 0 for the profile's.
        text: whether prompts are text and not token ids.
        hop: from the router to an engine or back.
        scrape_interval: between two looks at engines' metrics.
        report_lag: how old metrics are when they are seen.
        link: bytes a second over each engine's network port, shared by its transfers; 0 for what the profile has.
    """

    prefill: int = 8
    decode: int = 8
    prefill_policy: str = "pd_cost"
    decode_policy: str = ""
    speed: float = 1.0
    concurrency: int = 0
    gpu: str = "h200"
    kv_tokens: int = 0
    text: bool = False
    hop: float = 0.0005
    scrape_interval: float = 0.25
    report_lag: float = 0.01
    link: float = 0.0


Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """What one seed gave. Arrays have one entry a request, in the order of arrival.

    Args:
        ttft: seconds to the first token, as the client sees it.
        latency: seconds to the last.
        output: tokens generated.
        prompt: tokens of the prompt.
        cached: tokens of the prompt that were not computed.
        moved: tokens whose KV moved, in whole blocks.
        moved_bytes: all that moved.
        gaps: lengths of times between tokens, seconds.
        gap_counts: how many there were of each.
        seconds: from the first arrival to the last token.
        bypassed: requests that decode served alone.
        preempted: sequences that were thrown out for want of KV blocks.
        events: things that happened in the simulation.
    """

    ttft: Floats
    latency: Floats
    output: Floats
    prompt: Floats
    cached: Floats
    moved: Floats
    moved_bytes: int
    gaps: Floats
    gap_counts: Floats
    seconds: float
    bypassed: int
    preempted: int
    events: int


class Fleet:
    """Puts the parts together."""

    def __init__(self, setup: Setup, workload: Workload, seed: int) -> None:
        """Prepare.

        Args:
            setup: what is simulated.
            workload: what is asked.
            seed: of the arrivals within the trace's resolution and of the policies' random choices.
        """
        profile = load_profile(setup.gpu)
        self.clock = Clock()
        names = setup.prefill_policy, setup.decode_policy or setup.prefill_policy
        self.router = Router(self.clock, names, seed, workload.block_tokens, setup.hop)
        kv_tokens = (setup.kv_tokens or profile.kv_cache_tokens) // BLOCK * BLOCK

        def engines(keeps: bool, count: int, network: int, port: int) -> list[Row]:
            urls = [f"http://127.1.{network}.{number + 1}:{port}" for number in range(count)]
            made = [
                Engine(
                    url, keeps, profile, self.clock, self.router, key_tokens=workload.block_tokens,
                    kv_tokens=kv_tokens, text=setup.text, link=setup.link,
                ) for url in urls
            ]  # fmt: skip
            return [Row(engine, kv_tokens, self.clock) for engine in made]

        self.router.of(engines(True, setup.prefill, 1, 8000), engines(False, setup.decode, 2, 8200))
        self._bytes = profile.kv_bytes_per_token
        self._setup = setup
        self._workload = workload
        self._left = len(workload.requests)
        self._arrivals = workload.arrivals(setup.speed, seed)
        self._next = 0
        self._scrapes = not READ_METRICS.isdisjoint(names)

    def run(self) -> Run:
        """Let all requests be served."""
        if self._setup.concurrency:
            self.router.over = self._over
            for _ in range(min(self._setup.concurrency, self._left)):
                self._send(0.0)
        elif self._arrivals:
            self.clock.at(self._arrivals[0][0], self._arrive)
        if self._scrapes:
            self.clock.at(0.0, self._scrape)
        # A run makes many objects and no cycles of them, for which the collector would look in vain again and again.
        collecting = gc.isenabled()
        gc.disable()
        try:
            self.clock.run()
        finally:
            if collecting:
                gc.enable()
        return self._told()

    def _arrive(self, now: float, _: None) -> None:
        self._send(now)
        if self._next < len(self._arrivals):
            self.clock.at(self._arrivals[self._next][0], self._arrive)

    def _send(self, now: float) -> None:
        number = self._arrivals[self._next][1]
        self._next += 1
        self._left -= 1
        self.router.arrive(now, self._workload.requests[number], number)

    def _over(self, now: float, journey: Journey) -> None:
        self.router._over(now, journey)
        if self._next < len(self._arrivals):
            self._send(now)

    def _scrape(self, now: float, _: None) -> None:
        rows = [*self.router.prefills, *self.router.decodes]
        told = [(float(row.engine.queued), float(row.engine.running), row.engine.cache.usage) for row in rows]
        self.clock.at(now + self._setup.report_lag, self._report, (now, rows, told))
        if self._left or any(row.in_flight for row in rows) or self.router.parked:
            self.clock.at(now + self._setup.scrape_interval, self._scrape)

    def _report(self, now: float, told: tuple[float, Ordered[Row], Ordered[tuple[float, float, float]]]) -> None:
        at, rows, values = told
        for row, (waiting, running, usage) in zip(rows, values, strict=True):
            row.waiting, row.running, row.kv_usage, row.scraped_at = waiting, running, usage, at

    def _told(self) -> Run:
        journeys = self.router.journeys
        engines = [row.engine for row in (*self.router.prefills, *self.router.decodes)]
        gaps = [gap for row in self.router.decodes for gap in row.engine.gaps]
        ttft, latency, output, prompt, cached, moved = np.array(
            [
                (
                    one.first - one.arrived, one.done - one.arrived, one.asked.output, one.asked.tokens, one.cached,
                    one.fetched * BLOCK,
                ) for one in journeys
            ], dtype=float,
        ).reshape(-1, 6).T  # fmt: skip
        lengths, counts = np.array(gaps, dtype=float).reshape(-1, 2).T
        begin = journeys[0].arrived if journeys else 0.0
        return Run(
            ttft, latency, output, prompt, cached, moved, int(moved.sum()) * self._bytes, lengths, counts,
            max((one.done for one in journeys), default=0.0) - begin, self.router.bypassed,
            sum(engine.preempted for engine in engines), self.clock.happened,
        )  # fmt: skip
