"""Which tokens of which sequences one engine step computes: continuous batching as vLLM's v1 scheduler does it.

Running sequences first, then waiting ones, first come first served, within one budget of tokens a step (chunked
prefill); when blocks run out the youngest running sequence is preempted and computes again later. No clock here and no
I/O: the engine says when a step begins and ends.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pdsim.engine.kv import TOKEN_BYTES, Block, BlockPool, OutOfBlocksError
from pdsim.engine.sequence import Sequence, Status


class SchedulerAssertionError(Exception):
    """Something that real vLLM asserts in its scheduler does not hold: the engine core dies of it."""


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens of one sequence to compute in a step: `count` positions from `start` on."""

    sequence: Sequence
    start: int
    count: int


@dataclass(slots=True)
class Scheduler:
    """Queues, running set and blocks of one engine.

    Args:
        pool: the KV blocks.
        max_tokens: tokens a step may compute (`--max-num-batched-tokens`).
        max_sequences: sequences that may run at once (`--max-num-seqs`).
        fetch: called when a sequence has local blocks for a remote prompt; the blocks still to be filled go with it.

    """

    pool: BlockPool
    max_tokens: int
    max_sequences: int
    fetch: Callable[[Sequence, list[Block]], None]
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    fetching: list[Sequence] = field(default_factory=list)
    preempted: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    external_queries: int = 0
    external_hits: int = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        sequence.keys = self.pool.keys(bytes(sequence.data), sequence.salt)
        self.waiting.append(sequence)

    def plan(self) -> list[Work]:
        """Choose the work of the next step and give it its blocks.

        Raises:
            SchedulerAssertionError: a ticket whose handling real vLLM dies of.

        """
        budget = self.max_tokens
        work: list[Work] = []
        for sequence in list(self.running):
            if budget == 0:
                break
            if sequence.status is not Status.RUNNING:
                continue  # preempted above
            count = min(sequence.length - sequence.computed, budget)
            while not self._grow(sequence, sequence.computed + count):
                victim = self.running[-1]
                self._preempt(victim)
                work = [item for item in work if item.sequence is not victim]
                if victim is sequence:
                    break
            if sequence.status is Status.RUNNING:
                budget -= count
                work.append(self._work(sequence, count))
        while self.waiting and budget and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            if sequence.status is Status.FETCHING:
                self.waiting.popleft()
                continue
            count = min(sequence.length - sequence.computed, budget)
            if not self._grow(sequence, sequence.computed + count):
                self._let_go(sequence)
                break
            self.waiting.popleft()
            sequence.status = Status.RUNNING
            self.running.append(sequence)
            budget -= count
            work.append(self._work(sequence, count))
        return work

    def _work(self, sequence: Sequence, count: int) -> Work:
        item = Work(sequence, sequence.computed, count)
        sequence.computed += count
        self._register(sequence)
        return item

    def _register(self, sequence: Sequence) -> None:
        full = sequence.computed // self.pool.block_size
        if full <= sequence.registered:
            return
        if full > len(sequence.keys):
            sequence.keys = self.pool.keys(bytes(sequence.data), sequence.salt)
        for index in range(sequence.registered, min(full, len(sequence.keys))):
            self.pool.cache(sequence.blocks[index], sequence.keys[index])
        sequence.registered = full

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence its cached prefix, or start the fetch of its remote KV; False when it must wait."""
        if sequence.blocks:
            return True
        length = sequence.length
        found: list[Block] = []
        if not sequence.skips_prefix_cache:
            # The last token is always computed: its logits are needed.
            found = self.pool.lookup(sequence.keys[: (length - 1) // self.pool.block_size])
        cached = len(found) * self.pool.block_size
        remote = sequence.wants_remote_kv and not sequence.skips_prefix_cache and length > cached
        self.pool.hold(found)
        if remote:
            try:
                fresh = self.pool.take(-(-length // self.pool.block_size) - len(found))
            except OutOfBlocksError:
                self.pool.release(found)
                return False
            sequence.blocks = [*found, *fresh]
            sequence.status = Status.FETCHING
            sequence.external_tokens = length - cached
            self.external_queries += length - cached
            self.external_hits += length - cached
            self.fetching.append(sequence)
        else:
            sequence.blocks = list(found)
            sequence.computed = cached
            self.external_queries += 0 if sequence.params is None else length - cached
        sequence.registered = len(found)
        sequence.cached_tokens = cached
        if not sequence.skips_prefix_cache:
            self.prefix_queries += length
            self.prefix_hits += cached
        if remote or sequence.wants_remote_kv:
            self.fetch(sequence, sequence.blocks[len(found) :] if remote else [])
        return True

    def fetched(self, sequence: Sequence, loaded: bool) -> None:
        """Let a sequence whose transfer ended run: with its KV, or without when it is to compute the prompt itself."""
        self.fetching.remove(sequence)
        sequence.status = Status.WAITING
        sequence.fetched = True
        size = self.pool.block_size
        if loaded:
            sequence.computed = sequence.length - 1  # the last token is computed again for its logits
            for index in range(sequence.registered, min(sequence.length // size, len(sequence.keys))):
                self.pool.cache(sequence.blocks[index], sequence.keys[index])
            sequence.registered = sequence.length // size
        else:
            sequence.computed = sequence.registered * size
            sequence.external_tokens = 0
        self.waiting.appendleft(sequence)

    def _grow(self, sequence: Sequence, length: int) -> bool:
        missing = -(-length // self.pool.block_size) - len(sequence.blocks)
        if missing > 0:
            try:
                sequence.blocks += self.pool.take(missing)
            except OutOfBlocksError:
                return False
        return True

    def _let_go(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.registered = 0
        sequence.context = None

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._let_go(sequence)
        sequence.status = Status.WAITING
        sequence.preemptions += 1
        self.preempted += 1
        self.waiting.appendleft(sequence)

    def finish(self, sequence: Sequence, keep_blocks: bool = False) -> None:
        """Take a sequence out, wherever it is; its blocks go back unless they are kept for a remote decode."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING and sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence.status is Status.FETCHING:
            self.fetching.remove(sequence)
        sequence.status = Status.FINISHED
        if not keep_blocks:
            self.pool.release(sequence.blocks)
            sequence.blocks = []

    def tokens_of(self, item: Work) -> bytes:
        """Give the token bytes of some work."""
        return bytes(item.sequence.data[item.start * TOKEN_BYTES : (item.start + item.count) * TOKEN_BYTES])
