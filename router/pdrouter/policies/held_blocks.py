"""Which engines hold which blocks, each as many as it has room for: those that were used longest ago go first.

Engines are bits, so that a block's holders are one number.
"""

from collections import deque
from collections.abc import Sequence

_UNTIDY = 64  # places that do not count, over one a block, from which they are left out


class _Uses:
    """The blocks that one engine holds, in the order of their last use."""

    __slots__ = ("bit", "order", "size", "stale")

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.size = 0
        # A block that is used again is put at the end and stays where it was too: `stale` counts such places.
        self.order: deque[object] = deque()
        self.stale: dict[object, int] = {}

    def tidy(self) -> None:
        """Leave out the places that do not count."""
        latest_first = dict.fromkeys(reversed(self.order))
        self.order = deque(reversed(latest_first))
        self.stale.clear()


class HeldBlocks:
    """The blocks of all engines of an index.

    Attributes:
        holders: by block, the bits of the engines that hold it.
        bits: by an engine's name, its bit.
    """

    __slots__ = ("_uses", "bits", "holders")

    def __init__(self) -> None:
        self.bits: dict[str, int] = {}
        self.holders: dict[object, int] = {}
        self._uses: dict[str, _Uses] = {}

    def size(self, name: str) -> int:
        """Give how many blocks an engine holds."""
        uses = self._uses.get(name)
        return uses.size if uses else 0

    def use(self, name: str, blocks: Sequence[object], capacity: int) -> None:
        """Record that an engine used blocks, the last of which it will keep longest.

        They are numbers, which are taken for any objects here: compiled, they would be converted back and forth.
        """
        uses = self._uses.get(name)
        if uses is None:
            bit = self.bits[name] = self._free_bit()
            uses = self._uses[name] = _Uses(bit)
        bit, size, order, stale, holders = uses.bit, uses.size, uses.order, uses.stale, self.holders
        for block in blocks:
            engines = holders.get(block, 0)
            if engines & bit:
                stale[block] = stale.get(block, 0) + 1
            else:
                holders[block] = engines | bit
                size += 1
        order.extend(blocks)
        while size > capacity:
            block = order.popleft()
            if block in stale:
                places = stale.pop(block) - 1
                if places:
                    stale[block] = places
            else:
                self._forget(block, bit)
                size -= 1
        uses.size = size
        if len(order) > 2 * size + _UNTIDY:
            uses.tidy()

    def gone(self, name: str) -> None:
        """Forget all of an engine."""
        uses = self._uses.pop(name, None)
        if uses is not None:
            del self.bits[name]
            for block in set(uses.order):
                if self.holders.get(block, 0) & uses.bit:
                    self._forget(block, uses.bit)

    def _free_bit(self) -> int:
        bit, taken = 1, set(self.bits.values())
        while bit in taken:
            bit <<= 1
        return bit

    def _forget(self, block: object, bit: int) -> None:
        left = self.holders[block] & ~bit
        if left:
            self.holders[block] = left
        else:
            del self.holders[block]
