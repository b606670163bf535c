"""Virtual time: what happens next."""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

Happening = Callable[[float, Any], None]


class Clock:
    """A heap of happenings. Of those at one time the one that was arranged first comes first."""

    __slots__ = ("_arranged", "_heap", "happened", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self.happened = 0
        self._arranged = 0
        self._heap: list[tuple[float, int, Happening, Any]] = []

    def __call__(self) -> float:
        """Give the time in seconds; policies take this for their clock."""
        return self.now

    def at(self, time: float, happening: Happening, about: Any = None) -> None:
        """Let `happening(time, about)` be called at a time that is not over."""
        self._arranged += 1
        heappush(self._heap, (time, self._arranged, happening, about))

    def run(self) -> None:
        """Let everything happen, until nothing is arranged."""
        heap = self._heap
        happened = 0
        while heap:
            time, _, happening, about = heappop(heap)
            self.now = time
            happened += 1
            happening(time, about)
        self.happened += happened
