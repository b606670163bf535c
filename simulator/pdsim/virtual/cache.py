"""The KV blocks of one engine, counted: who holds them, and which prefixes they keep.

Rules of `pdsim.engine.kv.BlockPool`: one queue of free blocks, first freed first handed out, of a sequence its tail
first; a cached block can be used until it is handed out again. Here blocks are handled in groups, since nothing depends
on their content: a key stands for as many blocks as a trace's hash covers, and what has no key is a mere number.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice


class BlockCache:
    """Free, held and cached blocks."""

    __slots__ = ("_fresh", "_holders", "_queue", "_unkeyed", "free", "per_key", "total")

    def __init__(self, total: int, per_key: int) -> None:
        """Prepare.

        Args:
            total: blocks that can be used.
            per_key: blocks that belong to one key.
        """
        self.total = total
        self.per_key = per_key
        self.free = total
        self._fresh = total  # never used, or left over of a group that was broken up
        self._queue: OrderedDict[int, int] = OrderedDict()  # free groups that were used: key -> blocks
        self._holders: dict[int, int] = {}  # cached keys: how many sequences hold them
        self._unkeyed = 0  # their groups have negative keys

    @property
    def usage(self) -> float:
        """Share of the blocks that somebody holds, as `vllm:kv_cache_usage_perc`."""
        return (self.total - self.free) / self.total

    def lookup(self, keys: Sequence[int], most: int) -> int:
        """Give how many of the first `most` keys are cached, from the first on."""
        holders, count = self._holders, 0
        for key in islice(keys, most):
            if key not in holders:
                break
            count += 1
        return count

    def hold(self, keys: Sequence[int]) -> None:
        """Hold cached keys."""
        holders, queue, freed = self._holders, self._queue, 0
        for key in keys:
            count = holders[key]
            if count == 0:
                del queue[key]
                freed += 1
            holders[key] = count + 1
        self.free -= freed * self.per_key

    def take(self, blocks: int) -> None:
        """Hand out free blocks, which there must be."""
        self.free -= blocks
        fresh, queue = self._fresh, self._queue
        while fresh < blocks:
            key, size = queue.popitem(last=False)
            if key >= 0:
                del self._holders[key]
            fresh += size
        self._fresh = fresh - blocks

    def register(self, keys: Sequence[int], held: list[int]) -> None:
        """Make blocks that are held findable under keys; those that are new are added to `held`."""
        holders = self._holders
        for key in keys:
            if key not in holders:
                holders[key] = 1
                held.append(key)

    def release(self, held: Sequence[int], blocks: int) -> None:
        """Let go of a sequence: the keys that it holds, and `blocks` in all."""
        holders, queue, per_key = self._holders, self._queue, self.per_key
        rest = blocks - len(held) * per_key
        freed = 0
        if rest > 0:
            self._unkeyed -= 1
            queue[self._unkeyed] = rest
        for key in reversed(held):
            count = holders[key] - 1
            holders[key] = count
            if count == 0:
                queue[key] = per_key
                freed += 1
        self.free += freed * per_key + rest
