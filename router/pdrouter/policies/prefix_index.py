"""Which blocks of prompts each engine of one role holds, as far as the router can know.

An engine holds what it was sent and what it generated, until its KV cache is full. As vLLM does, the index forgets the
prefix that was used longest ago first, and of a prefix its last block first. Every use of a block is a use of all the
blocks before it, so a block is never forgotten later than one that follows it: what an engine holds of a prompt is
always a beginning without holes, and its length is found by bisection instead of block by block.

Memory: an engine has at most as many blocks as its KV cache has (`kv_tokens / 64`), or `DEFAULT_TOKENS` while that is
unknown, and never more than `MOST_TOKENS`. A block takes 130 to 190 bytes: 2 MB for the 919,808 tokens of one H200
with an 8B model, 12 MB at most. Looking up a prompt of 400 KB among 16 engines and recording it takes 0.4 ms.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence

from pdrouter.policies.block_chain import BLOCK_TOKENS, BlockChain, block_chain
from pdrouter.policies.choice import Candidate, Features

DEFAULT_TOKENS = 524_288  # an engine of unknown size is thought rather too small than too large
MOST_TOKENS = 4_194_304

_Held = OrderedDict[int, None]


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
        self._held: dict[str, _Held] = {}

    @staticmethod
    def _length(held: _Held, chain: list[int]) -> int:
        if not chain or chain[0] not in held:
            return 0
        if chain[-1] in held:
            return len(chain)
        return bisect_left(chain, True, key=lambda block: block not in held)

    def blocks(self, chain: BlockChain, candidate: Candidate) -> int:
        """Give how many full blocks of the prompt's beginning the engine holds."""
        held = self._held.get(candidate.name)
        return self._length(held, chain.full(self._most_blocks)) if held else 0

    def uncached(self, request: Features, candidates: Sequence[Candidate]) -> list[int]:
        """Estimate how many of the prompt's tokens each engine would have to compute: at least the last one."""
        tokens = request.tokens
        known = self._held
        if not known:
            return [tokens] * len(candidates)
        chain = request.chain
        full = chain.full(self._most_blocks)
        if not full:
            return [tokens] * len(candidates)
        first = full[0]
        found = []
        for candidate in candidates:
            held = known.get(candidate.name)
            if held is None or first not in held:
                found.append(tokens)
            else:
                found.append(chain.uncached(tokens, self._length(held, full)))
        return found

    def size(self, candidate: Candidate) -> int:
        """Give how many blocks are known of the engine."""
        return len(self._held.get(candidate.name, ()))

    def capacity(self, candidate: Candidate) -> int:
        """Give how many blocks may be known of the engine."""
        tokens = candidate.kv_tokens
        return min(self._most_blocks, max(1, tokens // self._block_tokens)) if tokens > 0 else self._default_blocks

    def held(self, chain: BlockChain, candidate: Candidate) -> None:
        """Record that the engine holds the prompt, or used it again."""
        held = self._held.get(candidate.name)
        if held is None:
            held = self._held[candidate.name] = OrderedDict()
        capacity = self.capacity(candidate)
        full = chain.full(capacity)
        # The first block is used last, so that it is the last to be forgotten.
        move = held.move_to_end
        for block in reversed(full):
            if block in held:
                move(block)
            else:
                held[block] = None
        for _ in range(len(held) - capacity):
            held.popitem(last=False)

    def continued(self, prefix: bytes, generated: bytes, candidate: Candidate) -> None:
        """Record that the engine holds the prompt and what it generated after it."""
        self.held(block_chain(prefix + generated), candidate)

    def gone(self, candidate: Candidate) -> None:
        """Forget all of an engine."""
        self._held.pop(candidate.name, None)
