"""Any engine, each as likely as another."""

import random
from collections.abc import Sequence

from pdrouter.policies.choice import C, Features


class RandomChoice:
    """Draw an engine; `seed` makes the draws repeat."""

    name = "random"
    uses_key = False

    def __init__(self, seed: int | None = None) -> None:
        self._draw = random.Random(seed)

    def choose(self, request: Features, candidates: Sequence[C]) -> C:
        """Draw one engine."""
        return candidates[int(self._draw.random() * len(candidates))]
