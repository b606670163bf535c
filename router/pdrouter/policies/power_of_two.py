"""Two engines drawn at random, the less loaded of which is taken.

Formula: vllm-project/router 0.1.17 `src/policies/power_of_two.rs`: two distinct healthy workers, the first drawn wins
when both carry the same load. vllm-router compares a cached answer of `/load` where it has one and its own count of
requests otherwise; the cache is up to 30 s old, so that all requests of half a minute run to the same engines
(vllm-project/router issue 177), and one engine's cached number may be compared with another's own count. Here the
load is always the router's own count, which is the other half of that either/or and never old.

Known flaw, kept: every request counts the same, however long its prompt.
"""

import random
from collections.abc import Sequence

from pdrouter.policies.choice import C, Features


class PowerOfTwo:
    """The one with fewer requests of two drawn engines."""

    name = "power_of_two"
    uses_key = False

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw.random

    def choose(self, request: Features, candidates: Sequence[C]) -> C:
        """Draw two engines and give the less loaded."""
        count = len(candidates)
        if count == 1:
            return candidates[0]
        first = int(self._draw() * count)
        other = int(self._draw() * (count - 1))
        one, two = candidates[first], candidates[other + (other >= first)]
        return one if one.in_flight <= two.in_flight else two
