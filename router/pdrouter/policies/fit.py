"""What work costs, learned from what it took."""

MEMORY = 500.0  # observations: an older one counts for less than a third
BOUND = 4.0  # how far off the first guess the fit may go, either way
_PRIOR = 10.0  # observations that the first guess is worth


class Line:
    """`base + slope * x`, fitted by relative error to what was observed lately.

    Bounds keep it sane: neither number goes further than `BOUND` times from the first guess, and a single observation
    counts as at most that far off the line. Where `x` does not vary, both numbers are scaled alike.
    """

    __slots__ = ("_base", "_slope", "_w", "_wx", "_wxx", "_wxy", "_wy", "base", "slope")

    def __init__(self, base: float, slope: float, far: float) -> None:
        """Prepare.

        Args:
            base: the first guess at x = 0, above 0.
            slope: its growth, above 0.
            far: a large x; the guess counts as observed there and at 0.
        """
        self._base = self.base = base
        self._slope = self.slope = slope
        self._w = self._wx = self._wxx = self._wxy = self._wy = 0.0
        for x in (0.0, far):
            self._add(x, base + slope * x, _PRIOR)

    def at(self, x: float) -> float:
        """Give the value at x."""
        return self.base + self.slope * x

    def _add(self, x: float, y: float, count: float) -> None:
        line = self.base + self.slope * x
        weight = count / (line * line)
        self._w += weight
        self._wx += weight * x
        self._wxx += weight * x * x
        self._wxy += weight * x * y
        self._wy += weight * y

    def observe(self, x: float, y: float) -> None:
        """Learn that x took y; what is not above 0 is no observation."""
        if not (y > 0 and x >= 0):
            return
        line = self.base + self.slope * x
        y = min(max(y, line / BOUND), line * BOUND)
        kept = 1 - 1 / MEMORY
        self._w *= kept
        self._wx *= kept
        self._wxx *= kept
        self._wxy *= kept
        self._wy *= kept
        self._add(x, y, 1.0)
        w, wx = self._w, self._wx
        spread = w * self._wxx - wx * wx
        if spread > 1e-3 * w * self._wxx:
            slope = (w * self._wxy - wx * self._wy) / spread
        else:
            slope = self.slope * self._wy / (self.base * w + self.slope * wx)
        self.slope = min(max(slope, self._slope / BOUND), self._slope * BOUND)
        base = (self._wy - self.slope * wx) / w
        self.base = min(max(base, self._base / BOUND), self._base * BOUND)
