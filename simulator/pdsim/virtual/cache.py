"""The KV blocks of one engine, counted: who holds them, and which prefixes they keep.

Rules of `pdsim.engine.kv.BlockPool`: one queue of free blocks, first freed first handed out, of a sequence its tail
first; a cached block can be used until it is handed out again. Here blocks are handled in groups, since nothing depends
on their content: a key stands for as many blocks as a trace's hash covers, and what has no key is a mere number.
"""

from collections import deque
from collections.abc import Sequence


class BlockCache:
    """Free, held and cached blocks.

    Keys are numbers of 0 and more. They are taken for any objects here: compiled, numbers would be converted back and
    forth.
    """

    __slots__ = ("_cached", "_fresh", "_idle", "_more", "_queue", "_stale", "free", "per_key", "total")

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
        self._cached: set[object] = set()  # keys
        self._idle: set[object] = set()  # those of them that nobody holds
        self._more: dict[object, int] = {}  # by how many more than one the others are held, where they are
        # Free groups in the order in which they became free: a key, or less than 0 for so many blocks without one. A
        # key that is held again stays where it was, so `_stale` counts its places that do not count.
        self._queue: deque[object] = deque()
        self._stale: dict[object, int] = {}

    @property
    def usage(self) -> float:
        """Share of the blocks that somebody holds, as `vllm:kv_cache_usage_perc`."""
        return (self.total - self.free) / self.total

    def lookup(self, keys: Sequence[object], most: int) -> int:
        """Give how many of the first `most` keys are cached, from the first on."""
        cached, count = self._cached, 0
        for key in keys:
            if count == most or key not in cached:
                break
            count += 1
        return count

    def hold(self, keys: Sequence[object]) -> None:
        """Hold cached keys."""
        idle, stale, more, freed = self._idle, self._stale, self._more, 0
        for key in keys:
            if key in idle:
                idle.discard(key)
                stale[key] = stale.get(key, 0) + 1
                freed += 1
            else:
                more[key] = more.get(key, 0) + 1
        self.free -= freed * self.per_key

    def take(self, blocks: int) -> None:
        """Hand out free blocks, which there must be."""
        self.free -= blocks
        fresh = self._fresh
        if fresh < blocks:
            queue, stale, idle, cached, per_key = self._queue, self._stale, self._idle, self._cached, self.per_key
            while fresh < blocks:
                key = queue.popleft()
                if key in stale:
                    places = stale.pop(key) - 1
                    if places:
                        stale[key] = places
                elif key in idle:
                    idle.discard(key)
                    cached.discard(key)
                    fresh += per_key
                else:
                    assert isinstance(key, int)
                    fresh -= key
        self._fresh = fresh - blocks

    def register(self, keys: Sequence[int], held: list[int]) -> None:
        """Make blocks that are held findable under keys; those that are new are added to `held`."""
        cached = self._cached
        new = keys if cached.isdisjoint(keys) else [key for key in keys if key not in cached]
        cached.update(new)
        held.extend(new)

    def release(self, held: Sequence[object], blocks: int) -> None:
        """Let go of a sequence: the keys that it holds, and `blocks` in all."""
        rest = blocks - len(held) * self.per_key
        if rest > 0:
            self._queue.append(-rest)
        more = self._more
        if more and not more.keys().isdisjoint(held):
            held = [key for key in held if not self._shared(key)]
        self._queue.extend(reversed(held))
        self._idle.update(held)
        self.free += len(held) * self.per_key + rest

    def _shared(self, key: object) -> bool:
        """Let one of several go of a key; give whether there are several."""
        more = self._more.pop(key, 0)
        if more > 1:
            self._more[key] = more - 1
        return more > 0
