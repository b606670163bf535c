"""The simulated engine's scheduler and blocks, stepped one by one: what the virtual engine must equal."""

import heapq
import struct
from dataclasses import dataclass, field
from typing import Any

from pdsim.engine.kv import Block, BlockPool
from pdsim.engine.scheduler import Scheduler
from pdsim.engine.sequence import Sampling, Sequence, Status
from pdsim.timing import Chunk, Profile


@dataclass(order=True)
class Event:
    time: float
    number: int
    call: Any = field(compare=False)


class World:
    """One heap for all engines."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[Event] = []
        self._number = 0

    def at(self, time: float, call: Any) -> None:
        self._number += 1
        heapq.heappush(self._heap, Event(time, self._number, call))

    def run(self) -> None:
        while self._heap:
            event = heapq.heappop(self._heap)
            self.now = event.time
            event.call()


class ReferenceEngine:
    """`pdsim.engine.engine.Engine` without sockets and content."""

    def __init__(self, world: World, profile: Profile, blocks: int, keeps: bool) -> None:
        self.world, self.profile, self.keeps = world, profile, keeps
        self.pool = BlockPool(blocks + 1, 128)
        self.scheduler = Scheduler(self.pool, profile.max_num_batched_tokens, 1024, self._fetch)
        self.firsts: dict[str, float] = {}
        self.ends: dict[str, float] = {}
        self.cached: dict[str, int] = {}
        self.gaps: list[float] = []  # between tokens of the same sequence
        self._last: dict[str, float] = {}
        self.done: Any = lambda sequence: None
        self.preempted = 0
        self._free = self._next_look = 0.0
        self._stepping = False
        self._in_flight = 0
        self._sources: dict[Sequence, tuple[ReferenceEngine, Sequence]] = {}

    def submit(
        self, name: str, prompt: list[int], output: int, source: "tuple[ReferenceEngine, Sequence] | None"
    ) -> None:
        params = {"do_remote_prefill": True, "remote_block_ids": [[1]]} if source else None
        if self.keeps:
            params = {"do_remote_decode": True}
        sequence = Sequence(name, prompt, Sampling(output), params, None, self.world.now)
        if source:
            self._sources[sequence] = source
        profile, count = self.profile, len(prompt)
        after_last = self._free + profile.frontend_seconds(count) - profile.frontend_seconds(0)
        self._free = max(self.world.now + profile.frontend_seconds(count), after_last)
        self.world.at(self._free, lambda: self._enqueue(sequence))

    def _enqueue(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence)
        self._wake()

    def _wake(self) -> None:
        if not self._stepping:
            self._step()

    def _step(self) -> None:
        work = self.scheduler.plan()
        if not work:
            self._stepping = False
            return
        self._stepping = True
        chunks = [Chunk(item.count, item.start) for item in work if item.count > 1]
        decodes = [item.start for item in work if item.count == 1]
        joining = sum(item.count == 1 and not item.sequence.outputs for item in work)
        seconds = self.profile.step_seconds(chunks, len(decodes), sum(decodes), joining)
        self.world.at(self.world.now + seconds, lambda: self._end(work))

    def _end(self, work: list[Any]) -> None:
        for item in work:
            sequence = item.sequence
            if sequence.status is not Status.RUNNING or item.start + item.count != sequence.length:
                continue
            sequence.outputs.append(7)
            sequence.data += struct.pack("<I", 7)
            self.firsts.setdefault(sequence.request_id, self.world.now)
            if sequence.request_id in self._last:
                self.gaps.append(self.world.now - self._last[sequence.request_id])
            self._last[sequence.request_id] = self.world.now
            self.cached.setdefault(sequence.request_id, sequence.cached_tokens)
            if len(sequence.outputs) >= sequence.sampling.max_tokens:
                self.ends[sequence.request_id] = self.world.now
                self.scheduler.finish(sequence, keep_blocks=self.keeps)
                self.done(sequence)
        self._step()

    def _fetch(self, sequence: Sequence, blocks: list[Block]) -> None:
        if not blocks:
            sequence.fetched = True
            self._collect(sequence)
            return
        seconds = self.profile.transfer_seconds(sequence.external_tokens, self._in_flight)
        self._in_flight += 1
        self.world.at(self.world.now + seconds, lambda: self._moved(sequence))

    def _collect(self, sequence: Sequence) -> None:
        engine, kept = self._sources.pop(sequence)
        engine.pool.release(kept.blocks)
        kept.blocks = []
        if engine.scheduler.waiting:
            engine._wake()

    def _moved(self, sequence: Sequence) -> None:
        self._in_flight -= 1
        self._collect(sequence)
        if self._next_look <= self.world.now:
            self._next_look = self.world.now + self.profile.transfer_notice
        self.world.at(self._next_look, lambda: self._seen(sequence))

    def _seen(self, sequence: Sequence) -> None:
        self.scheduler.fetched(sequence, loaded=True)
        self.world.at(self.world.now, self._wake)
