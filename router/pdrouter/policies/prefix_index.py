"""Which blocks of prompts each engine of one role holds, as far as the router can know.

An engine holds what it was sent and what it generated, until its KV cache is full. As vLLM does, the index forgets the
prefix that was used longest ago first, and of a prefix its last block first. Every use of a block is a use of all the
blocks before it, so a block is never forgotten later than one that follows it: what an engine holds of a prompt is
always a beginning without holes. Who holds a block is one number (`held_blocks`) that only loses bits from block to
block of a prompt: where it changes is found by bisection, for all engines at once.

Memory: an engine has at most as many blocks as its KV cache has (`kv_tokens / 64`), or `DEFAULT_TOKENS` while that is
unknown, and never more than `MOST_TOKENS`. A block takes 135 bytes, up to 460 where prompts come back often: 2 to 7 MB
for the 919,808 tokens of one H200 with an 8B model, 30 MB at most. Looking up a prompt of 400 KB among 16 engines and
recording it takes 0.1 ms, beside 0.4 ms for its hashes.
"""

from collections.abc import Sequence

from pdrouter.policies.block_chain import BLOCK_TOKENS, BlockChain, block_chain
from pdrouter.policies.choice import Candidate, Features
from pdrouter.policies.held_blocks import HeldBlocks

DEFAULT_TOKENS = 524_288  # an engine of unknown size is thought rather too small than too large
MOST_TOKENS = 4_194_304


class PrefixIndex:
    """The blocks of each engine, by its name."""

    def __init__(
        self, block_tokens: int = BLOCK_TOKENS, default_tokens: int = DEFAULT_TOKENS, most_tokens: int = MOST_TOKENS
    ) -> None:
        """Prepare.

        Args:
            block_tokens: tokens of a full block in the chains of requests.
            default_tokens: what an engine of unknown size is thought to hold.
            most_tokens: what is remembered of an engine at most.
        """
        self._block_tokens = block_tokens
        self._default_blocks = max(1, default_tokens // block_tokens)
        self._most_blocks = max(1, most_tokens // block_tokens)
        self._held = HeldBlocks()
        # One request is asked about several times in a row: to choose, to count and to record.
        self._last: BlockChain | None = None
        self._lengths: dict[int, int] = {}  # of the last chain, until the index changes

    def _held_of(self, chain: BlockChain) -> dict[int, int]:
        """Give how many full blocks of the prompt's beginning each engine's bit is on; 0 is left out."""
        if chain is not self._last:
            self._last = chain
            self._lengths = self._found(chain.full(self._most_blocks))
        return self._lengths

    def _found(self, chain: list[int]) -> dict[int, int]:
        found: dict[int, int] = {}
        holders = self._held.holders
        known, count = 0, len(chain)
        engines = holders.get(chain[0], 0) if count else 0
        while engines:
            # `engines` hold the first `known + 1` blocks and more; the first block that they do not all hold is next.
            last, end = known, count
            if holders.get(chain[count - 1], 0) == engines:
                last = count - 1
            while end - last > 1:
                middle = (last + end) // 2
                if holders.get(chain[middle], 0) == engines:
                    last = middle
                else:
                    end = middle
            known = last + 1
            left = holders.get(chain[known], 0) if known < count else 0
            gone = engines & ~left
            while gone:
                bit = gone & -gone
                found[bit] = known
                gone ^= bit
            engines &= left
        return found

    def blocks(self, chain: BlockChain, candidate: Candidate) -> int:
        """Give how many full blocks of the prompt's beginning the engine holds."""
        return self._held_of(chain).get(self._held.bits.get(candidate.name, 0), 0)

    def uncached(self, request: Features, candidates: Sequence[Candidate]) -> list[int]:
        """Estimate how many of the prompt's tokens each engine would have to compute: at least the last one."""
        tokens, chain = request.tokens, request.chain
        lengths = self._held_of(chain)
        if not lengths:
            return [tokens] * len(candidates)
        bits = self._held.bits
        found = []
        for candidate in candidates:
            held = lengths.get(bits.get(candidate.name, 0), 0)
            found.append(chain.uncached(tokens, held) if held else tokens)
        return found

    def size(self, candidate: Candidate) -> int:
        """Give how many blocks are known of the engine."""
        return self._held.size(candidate.name)

    def capacity(self, candidate: Candidate) -> int:
        """Give how many blocks may be known of the engine."""
        tokens = candidate.kv_tokens
        return min(self._most_blocks, max(1, tokens // self._block_tokens)) if tokens > 0 else self._default_blocks

    def held(self, chain: BlockChain, candidate: Candidate) -> None:
        """Record that the engine holds the prompt, or used it again."""
        capacity = self.capacity(candidate)
        # The first block is used last, so that it is the last to be forgotten.
        self._held.use(candidate.name, chain.full(capacity)[::-1], capacity)
        self._last = None

    def continued(self, prefix: bytes, generated: bytes, candidate: Candidate) -> None:
        """Record that the engine holds the prompt and what it generated after it."""
        self.held(block_chain(prefix + generated), candidate)

    def gone(self, candidate: Candidate) -> None:
        """Forget all of an engine."""
        self._held.gone(candidate.name)
        self._last = None
