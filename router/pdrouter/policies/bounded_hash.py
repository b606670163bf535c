"""Consistent hashing with bounded loads.

Source: Mirrokni, Thorup, Zadimoghaddam, "Consistent Hashing with Bounded Loads" (2016). From the key's place the ring
is walked to the first engine that may take one more request: `in_flight + 1 <= ceil(factor * (total + 1) / engines)`.
With a factor above 1 such an engine always exists, for the least loaded one has at most `total / engines` requests.
The ring is the one of `consistent_hash`, so that keys have the same first engine under both policies.
"""

from collections.abc import Sequence
from math import ceil

from pdrouter.policies.choice import C, Features
from pdrouter.policies.consistent_hash import ConsistentHash

FACTOR = 1.25  # of the mean load: Vimeo's figure, and the least that HAProxy's documentation advises


class BoundedHash:
    """Keys stay with their engine unless it has more than its share; then they go to the next on the ring."""

    name = "chwbl"
    uses_key = True

    def __init__(self, factor: float = FACTOR) -> None:
        if factor < 1:
            raise ValueError("factor must be at least 1: below it no engine might have room")
        self._factor = factor
        self._ring = ConsistentHash()

    def bound(self, candidates: Sequence[C]) -> int:
        """Give how many requests an engine may have, the new one included."""
        total = 1
        for candidate in candidates:
            total += candidate.in_flight
        return ceil(self._factor * total / len(candidates))

    def choose(self, request: Features, candidates: Sequence[C]) -> C:
        """Give the first engine on the ring, from the key on, that has room."""
        bound = self.bound(candidates)
        first = self._ring.choose(request, candidates)
        if first.in_flight < bound:
            return first
        for candidate in self._ring.walk(request, candidates):
            if candidate.in_flight < bound:
                return candidate
        # Loads change while they are read (other processes write them), so the bound may hold for nobody any more.
        return min(candidates, key=lambda candidate: candidate.in_flight)
