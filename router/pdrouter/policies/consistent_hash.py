"""Consistent hashing with the very choices of vllm-router 0.1.17.

Each engine has 160 places on a ring, `fbi_hash("URL:i")`; a key belongs to the first place at or after its own hash,
wrapping at the end (vllm-project/router `src/policies/consistent_hash.rs`). Where two engines have the same place, the
one listed later has it. The ring holds the engines that are healthy now, as vllm-router's does in P/D mode.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

from pdrouter.policies.choice import C, Features
from pdrouter.policies.fbi_hash import fbi_hash

PLACES_PER_ENGINE = 160


class ConsistentHash:
    """Keys stay with their engine while it is healthy; a lost engine's keys alone move."""

    name = "consistent_hash"
    uses_key = True

    def __init__(self) -> None:
        self._places: dict[str, list[int]] = {}
        self._of: Sequence[Any] = ()
        self._ring: list[int] = []
        self._owners: list[Any] = []

    def choose(self, request: Features, candidates: Sequence[C]) -> C:
        """Give the engine that owns the key."""
        if candidates is not self._of:
            self._build(candidates)
        at = bisect_left(self._ring, request.key.place)
        owner: C = self._owners[at if at < len(self._owners) else 0]
        return owner

    def walk(self, request: Features, candidates: Sequence[C]) -> Iterator[C]:
        """Give the owner of each place on the ring, once around, from the one that owns the key."""
        if candidates is not self._of:
            self._build(candidates)
        at = bisect_left(self._ring, request.key.place)
        for number in range(at - len(self._owners), at):
            yield self._owners[number]

    def _build(self, candidates: Sequence[C]) -> None:
        owners: dict[int, C] = {}
        for candidate in candidates:
            # Hashing 160 places takes milliseconds, so they are kept for when an engine comes back.
            places = self._places.get(candidate.name)
            if places is None:
                places = [fbi_hash(f"{candidate.name}:{number}") for number in range(PLACES_PER_ENGINE)]
                self._places[candidate.name] = places
            owners.update(dict.fromkeys(places, candidate))
        self._ring = sorted(owners)
        self._owners = [owners[place] for place in self._ring]
        self._of = candidates
