"""Rendezvous hashing as vllm-router 0.1.17 does it.

The engine with the highest `fbi_hash("KEY:URL")` has the key; where two hash alike, the one listed later has it
(vllm-project/router `src/policies/rendezvous_hash.rs`). Known flaws, kept: load is not looked at, and a request without
a session is placed by its whole body, so that requests which share a beginning are scattered.
"""

from collections.abc import Sequence

from pdrouter.policies.choice import C, Features
from pdrouter.policies.fbi_hash import fbi_hash


class RendezvousHash:
    """Keys stay with their engine while it is healthy; a lost engine's keys alone move, evenly over the others."""

    name = "rendezvous_hash"
    uses_key = True

    def choose(self, request: Features, candidates: Sequence[C]) -> C:
        """Give the engine with the highest weight for the key."""
        return heaviest(request.key.text, candidates)


def heaviest(text: str, candidates: Sequence[C]) -> C:
    """Give the candidate whose hash together with the text is highest, the last of equals."""
    chosen, highest = candidates[0], -1
    if len(candidates) > 1:
        for candidate in candidates:
            weight = fbi_hash(f"{text}:{candidate.name}")
            if weight >= highest:
                chosen, highest = candidate, weight
    return chosen
