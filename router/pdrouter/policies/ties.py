"""Who wins among equals."""

import random
from collections.abc import Sequence

from pdrouter.policies.choice import C


def highest(candidates: Sequence[C], scores: Sequence[float], draw: random.Random) -> C:
    """Give the candidate with the highest score, each of equals being as likely as another."""
    top = max(scores)
    if scores.count(top) == 1:
        return candidates[scores.index(top)]
    equals = [candidate for candidate, score in zip(candidates, scores, strict=True) if score == top]
    return equals[int(draw.random() * len(equals))]


def idlest(candidates: Sequence[C], scores: Sequence[float], draw: random.Random) -> C:
    """Give the candidate with the highest score, of equals the one with fewest requests, then any."""
    top = max(scores)
    if scores.count(top) == 1:
        return candidates[scores.index(top)]
    equals = [candidate for candidate, score in zip(candidates, scores, strict=True) if score == top]
    return highest(equals, [-candidate.in_flight for candidate in equals], draw)
