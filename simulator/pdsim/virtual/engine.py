"""One engine in virtual time: vLLM's scheduler as `pdsim.engine.scheduler` has it, without content.

What makes it quick: between two changes of its batch an engine that only decodes goes through steps whose times form an
arithmetic series, so they are taken together and cut where somebody comes. The sequences' own counters are kept as
sums. `tests/virtual/test_engine.py` compares each time with that of the simulated engine's scheduler, step by step.
"""

from collections import deque
from heapq import heapify, heappop, heappush
from math import sqrt
from typing import Any, Protocol

from pdsim.timing import Chunk, Profile
from pdsim.virtual.cache import BlockCache
from pdsim.virtual.clock import Clock

BLOCK = 128
LEASE_SECONDS = 30.0
_EDGE = 1e-9  # seconds: closer than this, two times are one


class Sequence:
    """A prompt on one engine and what it generates.

    `length` are the tokens that are there, `output` those that are still to be generated, `end` is the position after
    the last one whose KV is computed when it ends.
    """

    __slots__ = (
        "about", "blocks", "cached", "computed", "deadline", "end", "fetching", "finish", "first", "held",
        "keys", "length", "output", "residue", "source", "submitted",
    )  # fmt: skip

    def __init__(
        self, about: Any, keys: list[int], length: int, output: int, source: "tuple[Engine, Sequence] | None" = None
    ) -> None:
        self.about = about
        self.keys = keys
        self.length = length
        self.output = output
        self.source = source  # the prefill engine that holds its KV, and its sequence there
        self.held: list[int] = []
        self.blocks = self.computed = self.cached = 0
        self.end = self.finish = self.residue = 0
        self.fetching = False
        self.first = self.deadline = self.submitted = 0.0


class Listener(Protocol):
    """Hears what becomes of sequences, at the time at which the engine's process could tell."""

    def prefilled(self, now: float, sequence: Sequence) -> None:
        """Its one token is there; the blocks stay until they are fetched."""

    def began(self, now: float, sequence: Sequence) -> None:
        """It will have its first token at `sequence.first`, which is not over yet."""

    def decoded(self, now: float, sequence: Sequence) -> None:
        """Its last token is there."""

    def fetched(self, now: float, sequence: Sequence, blocks: int) -> None:
        """Its KV has come from the prefill engine."""


class Engine:
    """Queue, batch and blocks of one engine."""

    __slots__ = (
        "_boundary", "_busy", "_cut_done", "_decodes", "_finishing", "_frontend_free", "_in_flight",
        "_joined", "_link", "_link_free", "_listener", "_next_look", "_order", "_partial", "_per_key",
        "_per_token", "_ready", "_run_begin", "_run_first", "_run_growth", "_run_lead", "_run_steps", "_running",
        "_seen", "_steps", "_stuck", "_tokenizing", "_version", "cache", "clock", "context", "expired", "gaps",
        "keeps", "max_sequences", "name", "preempted", "profile", "text", "waiting",
    )  # fmt: skip

    def __init__(
        self, name: str, keeps: bool, profile: Profile, clock: Clock, listener: Listener, *, key_tokens: int,
        kv_tokens: int = 0, text: bool = False, max_sequences: int = 1024, link: float = 0.0,
    ) -> None:  # fmt: skip
        """Prepare.

        Args:
            name: its identity.
            keeps: whether it prefills for others: each sequence ends with its first token and its blocks are kept.
            profile: how long things take.
            clock: virtual time.
            listener: hears what becomes of sequences.
            key_tokens: tokens that each prefix key stands for, a multiple of 128.
            kv_tokens: tokens that its KV cache holds; 0 for the profile's.
            text: whether prompts come as text and not as token ids.
            max_sequences: sequences that may run at once (`--max-num-seqs`).
            link: bytes a second over its network port, shared by all its transfers; 0 for what the profile measured.
        """
        self.name = name
        self.keeps = keeps
        self.profile = profile
        self.clock = clock
        self.cache = BlockCache((kv_tokens or profile.kv_cache_tokens) // BLOCK, key_tokens // BLOCK)
        self.waiting: deque[Sequence] = deque()
        self.text = text
        self.max_sequences = max_sequences
        self.context = 0
        self.preempted = self.expired = 0
        self.gaps: list[tuple[float, int]] = []  # times between tokens, and how many gaps had each
        self._listener = listener
        self._per_key = key_tokens
        self._per_token = profile.frontend_seconds(1) - profile.frontend_seconds(0)
        self._frontend_free = self._next_look = 0.0
        self._tokenizing: list[Sequence] = []
        self._in_flight = 0
        self._link, self._link_free = link, 0.0
        self._seen: list[Sequence] = []
        self._running: dict[Sequence, None] = {}
        self._decodes = 0
        self._steps = 0
        self._boundary = [0] * BLOCK  # decoding sequences that need another block, by the step's number modulo 128
        self._finishing: list[tuple[int, int, Sequence]] = []
        self._order = 0
        self._partial: Sequence | None = None
        self._busy = self._stuck = self._cut_done = False
        self._ready: list[Sequence] = []  # their prompts are complete with the step under way
        self._joined = 0
        self._version = 0
        self._run_begin = self._run_first = self._run_growth = self._run_lead = 0.0
        self._run_steps = 0

    @property
    def running(self) -> int:
        """Sequences in the batch, as `vllm:num_requests_running`."""
        return self._decodes + len(self._ready) + (self._partial is not None)

    @property
    def queued(self) -> int:
        """Sequences that wait, as `vllm:num_requests_waiting`."""
        return len(self.waiting) + self._in_flight + len(self._seen)

    # --- requests

    def submit(self, now: float, sequence: Sequence) -> None:
        """Take a request at the moment in which it reaches the engine's port; calls must come in the order of time."""
        profile, clock = self.profile, self.clock
        sequence.submitted = now
        if self.text:
            if not self._tokenizing:
                clock.at(now + profile.frontend_seconds(0) + profile.tokenize_window, self._tokenize)
            self._tokenizing.append(sequence)
            return
        tokens = sequence.length
        self._frontend_free = max(
            now + profile.frontend_seconds(tokens), self._frontend_free + self._per_token * tokens
        )
        clock.at(self._frontend_free, self._enqueue, sequence)

    def _tokenize(self, now: float, _: None) -> None:
        batch, self._tokenizing = self._tokenizing, []
        seconds = self.profile.tokenize_seconds(max(sequence.length for sequence in batch))
        self.clock.at(now + seconds, self._enqueue_all, batch)

    def _enqueue_all(self, now: float, batch: list[Sequence]) -> None:
        self.waiting += batch
        self._look(now)

    def _enqueue(self, now: float, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        self._look(now)

    def _look(self, now: float) -> None:
        """Begin to step, or see to it that the next step is planned anew."""
        if not self._busy:
            self._plan(now)
        elif not self._stuck and not self._cut_done:
            self._cut(now)

    # --- steps

    def _cut(self, now: float) -> None:
        """End the run of steps with the one under way."""
        self._cut_done = True
        first, growth, steps = self._run_first, self._run_growth, self._run_steps
        if steps == 1:
            return
        elapsed = max(now - self._run_begin - self._run_lead, 0.0)
        if growth:
            half = first - growth / 2
            count = int((sqrt(half * half + 2 * growth * elapsed) - half) / growth)
        else:
            count = int(elapsed / first)
        # Rounding may be off by one either way; the step under way ends at `now` or later.
        while count > 0 and self._length(count) >= now - self._run_begin - _EDGE:
            count -= 1
        while self._length(count) < now - self._run_begin - _EDGE:
            count += 1
        count = max(count, 1)
        if count < steps:
            self._run_steps = count
            self._version += 1
            self.clock.at(max(now, self._run_begin + self._length(count)), self._end_run, self._version)

    def _length(self, steps: int) -> float:
        """Give the time of the first steps of the run."""
        return self._run_lead + steps * self._run_first + self._run_growth * steps * (steps - 1) / 2

    def _end_run(self, now: float, version: int) -> None:
        if version != self._version:
            return
        steps, decodes = self._run_steps, self._decodes
        if decodes:
            first = self._length(1)  # those that joined in it have no gap before it
            if decodes > self._joined:
                self.gaps.append((first, decodes - self._joined))
            if steps > 1:
                self.gaps.append(((self._length(steps) - first) / (steps - 1), (steps - 1) * decodes))
            if steps > 1:
                grown = self._growth(self._steps + 1, steps - 1)
                if grown:
                    self.cache.take(grown)
            self._steps += steps
            self.context += steps * decodes
            finishing = self._finishing
            while finishing and finishing[0][0] <= self._steps:
                number, _, sequence = heappop(finishing)
                if number == sequence.finish:
                    self._finish(now, sequence)
        ready, self._ready = self._ready, []
        for sequence in ready:
            self._prompt_done(now, sequence)
        self._plan(now)

    def _growth(self, begin: int, steps: int) -> int:
        """Give how many blocks the decoding sequences take within steps."""
        boundary, start = self._boundary, begin % BLOCK
        rounds, rest = divmod(steps, BLOCK)
        end = start + rest
        grown = sum(boundary[start:end]) if end <= BLOCK else sum(boundary[start:]) + sum(boundary[: end - BLOCK])
        return grown + rounds * self._decodes

    def _prompt_done(self, now: float, sequence: Sequence) -> None:
        """The step that just ended computed the end of a prompt, and its next token."""
        if not sequence.first:
            sequence.first = now
            if not self.keeps:
                self._listener.began(now, sequence)
        sequence.output -= 1
        if sequence.output > 0:
            self._join(sequence, sequence.length)
            return
        if self.keeps:
            sequence.deadline = now + LEASE_SECONDS
            self._listener.prefilled(now, sequence)
        else:
            self.cache.release(sequence.held, sequence.blocks)
            self._listener.decoded(now, sequence)

    def _join(self, sequence: Sequence, position: int) -> None:
        """Let a sequence decode from a position on, beginning with the next step."""
        self._running[sequence] = None
        self._decodes += 1
        self.context += position
        sequence.end = position + sequence.output
        sequence.finish = self._steps + sequence.output
        residue = sequence.residue = (self._steps - position) % BLOCK
        self._boundary[residue] += 1
        self._order += 1
        heappush(self._finishing, (sequence.finish, self._order, sequence))

    def _part(self, sequence: Sequence, position: int) -> None:
        del self._running[sequence]
        self._decodes -= 1
        self.context -= position
        self._boundary[sequence.residue] -= 1
        self.cache.release(sequence.held, -(-position // BLOCK))

    def _finish(self, now: float, sequence: Sequence) -> None:
        if self.keeps:  # its last prompt token ran as a decode does
            del self._running[sequence]
            self._decodes -= 1
            self.context -= sequence.end
            self._boundary[sequence.residue] -= 1
            sequence.deadline = now + LEASE_SECONDS
            self._listener.prefilled(now, sequence)
            return
        self._part(sequence, sequence.end)
        self._listener.decoded(now, sequence)

    def _preempt(self) -> None:
        """Take the youngest decoding sequence out; it computes everything again later."""
        sequence = next(reversed(self._running))
        left = sequence.finish - self._steps
        position = sequence.end - left
        self._part(sequence, position)
        sequence.finish = -1
        sequence.length, sequence.output = position + 1, left
        sequence.computed = sequence.blocks = 0
        sequence.held, sequence.source = [], None
        self.waiting.appendleft(sequence)
        self.preempted += 1
        if len(self._finishing) > 2 * self._decodes + 64:
            self._finishing = [one for one in self._finishing if one[0] == one[2].finish]
            heapify(self._finishing)

    def _plan(self, now: float) -> None:
        """Begin the next step, or a run of steps in which nothing but decoding happens."""
        cache, profile = self.cache, self.profile
        needed = self._boundary[self._steps % BLOCK] if self._decodes else 0
        while needed > cache.free:
            self._preempt()
            needed = self._boundary[self._steps % BLOCK] if self._decodes else 0
        if needed:
            cache.take(needed)
        budget = profile.max_num_batched_tokens - self._decodes
        chunks: list[Chunk] = []
        partial = self._partial
        if partial is not None:
            self._partial = None
            budget -= self._chunk(partial, budget, chunks)
        joined = fresh = 0
        self._stuck = False
        waiting = self.waiting
        while waiting and budget > 0 and self._decodes + len(self._ready) < self.max_sequences:
            sequence = waiting[0]
            if not sequence.blocks and not self._admit(now, sequence):
                self._stuck = True
                break
            if sequence.fetching:
                waiting.popleft()
                continue
            if sequence.length - sequence.computed == 1:
                position = sequence.computed
                missing = -(-sequence.length // BLOCK) - sequence.blocks
                if missing > cache.free:
                    self._let_go(sequence)
                    self._stuck = True
                    break
                if missing > 0:
                    cache.take(missing)
                    sequence.blocks += missing
                waiting.popleft()
                self._join(sequence, position)
                joined += 1
                fresh += not sequence.first
                budget -= 1
                continue
            waiting.popleft()
            count = self._chunk(sequence, budget, chunks)
            if not count:
                self._stuck = True
                break
            budget -= count
        if not chunks and not self._decodes:
            self._busy = False
            return
        self._busy = True
        self._cut_done = bool(chunks)
        self._joined = joined
        self._version += 1
        self._run_begin = now
        if chunks:
            self._run_steps, self._run_growth = 1, 0.0
            self._run_first, self._run_lead = profile.step_seconds(chunks, self._decodes, self.context, fresh), 0.0
        else:
            first, growth = profile.decode_run(self._decodes, self.context)
            self._run_first, self._run_growth = first, growth
            self._run_lead = profile.decode_join * fresh
            self._run_steps = self._lasting()
        if joined:
            self._told(now)
        self.clock.at(now + self._length(self._run_steps), self._end_run, self._version)

    def _lasting(self) -> int:
        """Give how many steps the batch stays as it is: until a sequence ends or blocks run out."""
        finishing = self._finishing
        while finishing[0][0] != finishing[0][2].finish:
            heappop(finishing)
        steps = finishing[0][0] - self._steps
        free = self.cache.free
        if self._decodes * (steps // BLOCK + 1) > free:
            while steps > 1 and self._growth(self._steps + 1, steps - 1) > free:
                steps -= 1
        return steps

    def _told(self, now: float) -> None:
        """Tell the first tokens of those that joined: the first step of the run brings them."""
        at = now + self._run_lead + self._run_first
        count = self._joined
        for sequence in reversed(self._running):
            if not sequence.first:
                sequence.first = at
                if not self.keeps:
                    self._listener.began(now, sequence)
            count -= 1
            if not count:
                return

    def _chunk(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Compute what the budget allows of a prompt; give how much, 0 when blocks ran out and it waits again."""
        count = min(sequence.length - sequence.computed, budget)
        missing = -(-(sequence.computed + count) // BLOCK) - sequence.blocks
        if missing > self.cache.free:
            self._let_go(sequence)
            self.waiting.appendleft(sequence)
            return 0
        if missing > 0:
            self.cache.take(missing)
            sequence.blocks += missing
        chunks.append(Chunk(count, sequence.computed))
        before = sequence.computed // self._per_key
        sequence.computed += count
        self.cache.register(sequence.keys[before : sequence.computed // self._per_key], sequence.held)
        if sequence.computed < sequence.length:
            self._partial = sequence
        else:
            self._ready.append(sequence)
        return count

    def _let_go(self, sequence: Sequence) -> None:
        self.cache.release(sequence.held, sequence.blocks)
        sequence.held = []
        sequence.blocks = sequence.computed = 0

    def _admit(self, now: float, sequence: Sequence) -> bool:
        """Give a waiting sequence its cached prefix, or begin to fetch its KV; False when it must wait."""
        cache, keys = self.cache, sequence.keys
        # The last token is always computed: its logits are needed.
        found = cache.lookup(keys, (sequence.length - 1) // self._per_key)
        held = keys[:found]
        cache.hold(held)
        cached = found * self._per_key
        if sequence.source is not None and sequence.submitted > sequence.source[1].deadline:
            self._expire(now, sequence)
        if sequence.source is None:
            sequence.computed = cached
            sequence.blocks = found * cache.per_key
        else:
            total = -(-sequence.length // BLOCK)
            fresh = total - found * cache.per_key
            if fresh > cache.free:
                cache.release(held, found * cache.per_key)
                return False
            cache.take(fresh)
            sequence.blocks = total
            self._fetch(now, sequence, sequence.length - cached, fresh)
        sequence.held = held
        sequence.cached = cached
        return True

    # --- transfers

    def _expire(self, now: float, sequence: Sequence) -> None:
        """The lease ended before the engine had heard of the request: its prompt is computed here."""
        source = sequence.source
        assert source is not None
        source[0].collect(now, source[1])
        sequence.source = None
        self.expired += 1

    def _fetch(self, now: float, sequence: Sequence, tokens: int, blocks: int) -> None:
        source = sequence.source
        assert source is not None
        end = now + self.profile.transfer_seconds(tokens, self._in_flight)
        other = source[0]
        if self._link:
            # Both ports are busy with it for as long as its bytes take.
            moving = blocks * BLOCK * self.profile.kv_bytes_per_token / self._link
            free = max(now, self._link_free, other._link_free) + moving
            self._link_free = other._link_free = free
            end = max(end, free)
        self._in_flight += 1
        sequence.fetching = True
        self.clock.at(end, self._transferred, (sequence, blocks))

    def _transferred(self, now: float, moved: tuple[Sequence, int]) -> None:
        sequence, blocks = moved
        source = sequence.source
        assert source is not None
        self._in_flight -= 1
        source[0].collect(now, source[1])
        self._listener.fetched(now, sequence, blocks)
        if self._next_look <= now:
            self._next_look = now + self.profile.transfer_notice
        if not self._seen:
            self.clock.at(self._next_look, self._noticed)
        self._seen.append(sequence)

    def _noticed(self, now: float, _: None) -> None:
        """The scheduler sees the transfers that ended since its last look."""
        seen, self._seen = self._seen, []
        for sequence in seen:
            sequence.fetching = False
            sequence.source = None
            sequence.computed = sequence.length - 1  # the last token is computed again for its logits
            known = len(sequence.held)
            self.cache.register(sequence.keys[known : sequence.length // self._per_key], sequence.held)
            self.waiting.appendleft(sequence)
        self._stuck = False
        self._look(now)

    def collect(self, now: float, sequence: Sequence) -> None:
        """Free the blocks of a prefill that was fetched."""
        self.cache.release(sequence.held, sequence.blocks)
        sequence.held, sequence.blocks = [], 0
        if self.waiting and not self._busy:
            self._plan(now)
