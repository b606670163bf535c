"""KV blocks: what they hold, who holds them, and which of them a prefix can reuse.

A block of the real cache holds keys and values that depend on the block's tokens and on everything before them. Here a
block holds the two facts these are a function of: a digest of the context on entry, and the tokens. Whoever reads a
block of another prompt, a stale or an overwritten one therefore continues from a wrong context, as a real engine does.

Allocation follows vLLM's v1 block pool: block 0 is the null block, freed blocks go to the end of one LRU queue with the
tail of a sequence first, and a cached block stays usable until it is handed out again.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from zlib import crc32

TOKEN_BYTES = 4
MASK64 = (1 << 64) - 1
EMPTY_CONTEXT = 0x5EED0F11A11A0001


def mix(a: int, b: int) -> int:
    """Combine two 64-bit integers into one (the finaliser of SplitMix64 over their sum with odd weights)."""
    z = (a * 0x9E3779B97F4A7C15 + b + 0x632BE59BD9B4E019) & MASK64
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK64
    return z ^ z >> 31


@dataclass(slots=True, eq=False)
class Block:
    """One KV block: its place, its holders, its key in the prefix cache, and its content."""

    id: int
    holders: int = 0
    key: int | None = None
    entry: int = 0
    tokens: bytes = b""

    def digest(self, length: int) -> int:
        """Give the digest of the first `length` tokens; positions never written read as zeros."""
        wanted = length * TOKEN_BYTES
        held = self.tokens[:wanted]
        if len(held) < wanted:
            held = held.ljust(wanted, b"\0")
        return crc32(held, self.entry)

    def write(self, offset: int, tokens: bytes, context: int) -> None:
        """Store tokens computed at `offset` in the given context; what stood behind them is gone."""
        if offset == 0:
            self.entry = context & 0xFFFFFFFF
            self.tokens = tokens
        else:
            self.tokens = self.tokens[: offset * TOKEN_BYTES].ljust(offset * TOKEN_BYTES, b"\0") + tokens


class OutOfBlocksError(Exception):
    """No free block is left; the scheduler preempts somebody or waits."""


@dataclass(slots=True)
class BlockPool:
    """All blocks of one engine, with a prefix cache over those that are full.

    Args:
        total: blocks, the null block included.
        block_size: tokens a block.

    """

    total: int
    block_size: int
    blocks: list[Block] = field(init=False)
    _free: OrderedDict[int, Block] = field(init=False)
    _cached: dict[int, Block] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.blocks = [Block(index) for index in range(self.total)]
        self.blocks[0].holders = 1
        self._free = OrderedDict((block.id, block) for block in self.blocks[1:])

    @property
    def free(self) -> int:
        """Blocks that can be handed out, cached ones without a holder included."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Blocks that a prefix can reuse."""
        return len(self._cached)

    @property
    def usage(self) -> float:
        """Share of the blocks that somebody holds, as `vllm:kv_cache_usage_perc` counts it."""
        usable = self.total - 1
        return (usable - len(self._free)) / usable

    def keys(self, tokens: bytes, salt: str | None = None) -> list[int]:
        """Give the prefix-cache keys of the full blocks of a prompt (4 bytes a token, little endian)."""
        size = self.block_size * TOKEN_BYTES
        key = hash(salt)
        keys = []
        for start in range(0, len(tokens) - size + 1, size):
            key = hash((key, tokens[start : start + size]))
            keys.append(key)
        return keys

    def lookup(self, keys: Iterable[int]) -> list[Block]:
        """Give the cached blocks of the longest cached prefix, without holding them."""
        found = []
        for key in keys:
            block = self._cached.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def hold(self, blocks: Iterable[Block]) -> None:
        """Hold blocks that `lookup` found."""
        for block in blocks:
            if block.holders == 0:
                del self._free[block.id]
            block.holders += 1

    def take(self, count: int) -> list[Block]:
        """Hand out `count` blocks, least recently used first; their content stays until it is overwritten.

        Raises:
            OutOfBlocksError: fewer are free; nothing is taken.

        """
        if count > len(self._free):
            raise OutOfBlocksError
        taken = []
        for _ in range(count):
            _, block = self._free.popitem(last=False)
            if block.key is not None:
                if self._cached.get(block.key) is block:
                    del self._cached[block.key]
                block.key = None
            block.holders = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[Block]) -> None:
        """Let go of a sequence's blocks, in the order of the sequence; its tail is evicted first."""
        for block in reversed(blocks):
            block.holders -= 1
            if block.holders == 0:
                self._free[block.id] = block

    def cache(self, block: Block, key: int) -> None:
        """Make a full block findable under its key; the first one cached under a key stays."""
        if block.key is None and key not in self._cached:
            block.key = key
            self._cached[key] = block

    def forget(self) -> bool:
        """Empty the prefix cache, as `/reset_prefix_cache` does; refused while any block is held."""
        if len(self._free) != self.total - 1:
            return False
        for block in self._cached.values():
            block.key = None
        self._cached.clear()
        return True


@dataclass(slots=True)
class Context:
    """What attention sees: the digest of all KV content before the next token, kept up while tokens are computed."""

    block_size: int
    before: int = EMPTY_CONTEXT  # folded digests of the full blocks
    current: int = EMPTY_CONTEXT & 0xFFFFFFFF  # digest of the block being filled
    offset: int = 0  # tokens in it

    @classmethod
    def read(cls, blocks: Sequence[Block], length: int, block_size: int) -> "Context":
        """Read the first `length` positions from the blocks, whatever they hold."""
        context = cls(block_size)
        full, offset = divmod(length, block_size)
        for block in blocks[:full]:
            context.before = mix(context.before, block.digest(block_size))
        context.offset = offset
        context.current = blocks[full].digest(offset) if offset else context.before & 0xFFFFFFFF
        return context

    @property
    def state(self) -> int:
        """The digest of everything before the next token."""
        return mix(self.before, self.current) if self.offset else self.before

    def compute(self, blocks: Sequence[Block], start: int, tokens: bytes) -> None:
        """Compute tokens at positions from `start` on: write their KV content and move on behind them."""
        size = self.block_size
        done, total = 0, len(tokens) // TOKEN_BYTES
        while done < total:
            count = min(size - self.offset, total - done)
            piece = tokens[done * TOKEN_BYTES : (done + count) * TOKEN_BYTES]
            blocks[(start + done) // size].write(self.offset, piece, self.before)
            self.current = crc32(piece, self.current)
            self.offset += count
            done += count
            if self.offset == size:
                self.before = mix(self.before, self.current)
                self.current = self.before & 0xFFFFFFFF
                self.offset = 0
