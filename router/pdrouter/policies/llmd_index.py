"""llm-d's approximate prefix index, with its flaws.

Source: llm-d-router (commit ebab6879) `pkg/epp/framework/plugins/requestcontrol/dataproducer/approximateprefix/`. A
prompt is cut into blocks of 64 tokens (`max(64, block size)`), the last of which may be short, up to
`maxPrefixTokensToMatch`. Each engine has an LRU of blocks; an engine's match is how many of the prompt's blocks it has,
counted up to the first block that no engine at all has.

Known flaws, kept:
    1. the LRU holds as many 64-token blocks as the engine has 16-token blocks: four times what fits;
    2. blocks are added first to last, so that the LRU forgets a prefix's beginning before its end: where vLLM would
       still have most of it, its match falls to 0 at once;
    3. an engine that lacks a block still counts those after it as long as another engine has the missing one;
    4. generated text, which is part of the next turn's prompt, is not recorded;
    5. prefill and decode engines are in one index: a decode engine's block fills a prefill engine's hole.

Memory: as `prefix_index`; 31,250 blocks (llm-d's default) take 4 to 14 MB.
"""

from collections import Counter
from collections.abc import Sequence

from pdrouter.policies.block_chain import BLOCK_TOKENS, BlockChain
from pdrouter.policies.choice import Candidate, Commons, Features
from pdrouter.policies.held_blocks import HeldBlocks

DEFAULT_BLOCKS = 31_250  # lruCapacityPerServer
ENGINE_BLOCK_TOKENS = 16  # vLLM's default block size, by which an engine's KV cache is counted


class LlmdIndex:
    """The blocks of all engines of both roles."""

    def __init__(self, most_tokens: int, block_tokens: int = BLOCK_TOKENS) -> None:
        """Prepare.

        Args:
            most_tokens: how much of a prompt is looked at (`maxPrefixTokensToMatch`).
            block_tokens: tokens of a full block in the chains of requests.
        """
        self._most_blocks = most_tokens // block_tokens
        self._block_tokens = block_tokens
        self._held = HeldBlocks()
        # One request is asked about several times in a row: to choose, to count and to record.
        self._last: BlockChain | None = None
        self._matched: dict[int, int] | None = None  # of the last chain, until the index changes

    @classmethod
    def of(cls, commons: Commons, name: str, most_tokens: int) -> "LlmdIndex":
        """Give the index that both roles of a router share under a policy's name."""
        index = commons.shared.setdefault(name, cls(most_tokens, commons.block_tokens))
        assert isinstance(index, cls)
        return index

    def _chain(self, request: Features) -> list[int]:
        chain = request.chain
        if self._last is not chain:
            self._last = chain
            self._matched = None
        return chain.numbers if len(chain.numbers) <= self._most_blocks else chain.numbers[: self._most_blocks]

    def matches(self, request: Features, candidates: Sequence[Candidate]) -> tuple[list[int], int]:
        """Give how many of the prompt's blocks each engine is thought to have, and how many there are."""
        chain = self._chain(request)
        if self._matched is None:
            self._matched = self._match(chain)
        found, bits = self._matched, self._held.bits
        if not found:
            return [0] * len(candidates), len(chain)
        return [found.get(bits.get(candidate.name, 0), 0) for candidate in candidates], len(chain)

    def _match(self, chain: list[int]) -> dict[int, int]:
        """Give how many of the blocks each engine's bit is on, up to the first block without any."""
        found: dict[int, int] = {}
        holders = self._held.holders
        if chain and chain[0] in holders:
            for engines, count in Counter(iter(map(holders.get, chain).__next__, None)).items():
                left = engines or 0
                while left:
                    bit = left & -left
                    found[bit] = found.get(bit, 0) + count
                    left ^= bit
        return found

    def uncached(self, request: Features, candidates: Sequence[Candidate]) -> list[int]:
        """Give how many of the prompt's tokens each engine is thought to have to compute."""
        found, _ = self.matches(request, candidates)
        tokens = request.tokens
        return [max(0, tokens - match * self._block_tokens) for match in found]

    def capacity(self, candidate: Candidate) -> int:
        """Give how many blocks are kept of an engine (flaw 1)."""
        blocks = candidate.kv_tokens // ENGINE_BLOCK_TOKENS if candidate.kv_tokens > 0 else DEFAULT_BLOCKS
        return blocks * BLOCK_TOKENS // self._block_tokens

    def held(self, request: Features, candidate: Candidate) -> None:
        """Record that the engine has the prompt's blocks."""
        self._held.use(candidate.name, self._chain(request), self.capacity(candidate))
        self._matched = None

    def gone(self, candidate: Candidate) -> None:
        """Forget all of an engine."""
        self._held.gone(candidate.name)
        self._matched = None
