"""Each engine in turn."""

from collections.abc import Sequence

from pdrouter.policies.choice import C, Features


class RoundRobin:
    """Take the engines in their order, then start again."""

    name = "round_robin"
    uses_key = False

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, request: Features, candidates: Sequence[C]) -> C:
        """Give the next engine."""
        turn = self._turn
        self._turn = turn + 1
        return candidates[turn % len(candidates)]
