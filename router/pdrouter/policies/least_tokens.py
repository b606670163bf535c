"""The engine with the fewest tokens to work on.

A prefill engine is busy for as long as the prompts before take to compute, so prompt tokens say more than a count of
requests does; a decode engine's steps grow with the KV that it reads, which is what its requests hold.
"""

import random
from collections.abc import Sequence

from pdrouter.policies.choice import C, Features, RoleName
from pdrouter.policies.ties import idlest


class LeastTokens:
    """Fewest queued tokens (prefill) or held tokens (decode); ties by requests in flight, then at random."""

    name = "least_tokens"
    uses_key = False

    def __init__(self, role: RoleName, draw: random.Random) -> None:
        self._prefill = role == "prefill"
        self._draw = draw

    def choose(self, request: Features, candidates: Sequence[C]) -> C:
        """Give the engine with the fewest tokens."""
        return idlest(candidates, self.scores(request, candidates), self._draw)

    def scores(self, request: Features, candidates: Sequence[C]) -> list[float]:
        """Give the tokens, negative."""
        if self._prefill:
            return [-candidate.queued_tokens for candidate in candidates]
        return [-candidate.held_tokens for candidate in candidates]
