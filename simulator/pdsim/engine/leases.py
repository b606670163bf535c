"""Prefills whose KV blocks wait to be collected: pinned under a lease, as vLLM's NIXL connector keeps them.

A lease lasts `duration` seconds from the end of the prefill. The decode engine's heartbeats (every sixth of it)
extend it by two thirds; its notification ends it; else it expires and the blocks are free to be overwritten while the
ticket is still out there. Source: vLLM 0.32, nixl/base_scheduler.py and base_worker.py.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

from pdsim.engine.kv import Block, BlockPool
from pdsim.engine.sequence import Sequence

REMEMBERED = 20_000


def prompt_digest(prompt: bytes) -> int:
    """Digest a prompt's token bytes, to tell whose ticket a ticket is."""
    return crc32(prompt)


@dataclass(slots=True, eq=False)
class Lease:
    """Blocks of one finished prefill."""

    request_id: str
    blocks: list[Block]
    params: dict[str, Any]
    prompt: int
    model: str
    deadline: float
    readers: int = 0
    state: str = "pinned"  # then `collected` or `expired`


@dataclass(slots=True)
class Leases:
    """All leases of one engine; times are event-loop seconds. `freed` hears when blocks of one have become free."""

    pool: BlockPool
    duration: float
    freed: Callable[[], object]
    open: dict[str, Lease] = field(default_factory=dict)
    ended: OrderedDict[str, Lease] = field(default_factory=OrderedDict)
    expired: int = 0
    late_notifications: int = 0

    @property
    def pinned(self) -> int:
        """Blocks held by open leases."""
        return len({block.id for lease in self.open.values() for block in lease.blocks})

    def grant(self, sequence: Sequence, params: dict[str, Any], model: str, now: float) -> None:
        """Pin the blocks of a finished prefill."""
        digest = prompt_digest(bytes(sequence.data[: len(sequence.prompt) * 4]))
        self.open[sequence.request_id] = Lease(
            sequence.request_id, sequence.blocks, params, digest, model, now + self.duration
        )

    def find(self, request_id: str) -> Lease | None:
        """Find a lease, open or ended."""
        return self.open.get(request_id) or self.ended.get(request_id)

    def extend(self, request_id: str, now: float) -> None:
        """Take a heartbeat."""
        lease = self.open.get(request_id)
        if lease is not None:
            lease.deadline = max(lease.deadline, now + self.duration * 2 / 3)

    def collect(self, request_id: str) -> None:
        """Take the notification that the decode engine has the blocks or does not want them."""
        lease = self.open.pop(request_id, None)
        if lease is None:
            self.late_notifications += 1
            return
        self._end(lease, "collected")

    def expire(self, now: float) -> list[Lease]:
        """End the leases whose time is over; give them."""
        over = [lease for lease in self.open.values() if lease.deadline <= now]
        for lease in over:
            del self.open[lease.request_id]
            self.expired += 1
            self._end(lease, "expired")
        return over

    def _end(self, lease: Lease, state: str) -> None:
        lease.state = state
        self.pool.release(lease.blocks)
        self.ended[lease.request_id] = lease
        if len(self.ended) > REMEMBERED:
            self.ended.popitem(last=False)
        self.freed()
