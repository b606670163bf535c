"""When requests of an open loop come: the distributions of `vllm bench serve`, with a seed of their own."""

from dataclasses import dataclass
from math import isinf
from typing import Literal

import numpy as np


@dataclass(frozen=True, slots=True)
class Ramp:
    """A rate that grows with the share of requests that have been sent.

    Args:
        start: requests a second at the first request.
        end: at the last.
        strategy: by equal steps or by equal factors.
    """

    start: float
    end: float
    strategy: Literal["linear", "exponential"] = "linear"

    def rate(self, share: float) -> float:
        """Give the rate when this share has been sent."""
        if self.strategy == "linear":
            return self.start + (self.end - self.start) * share
        return float(self.start * (self.end / self.start) ** share)


def arrivals(count: int, rate: float | None, burstiness: float, ramp: Ramp | None, seed: int) -> list[float]:
    """Draw the times of arrival in seconds after the beginning, ascending.

    Gaps follow a gamma distribution of shape `burstiness` whose mean is one over the rate. Without a ramp the times are
    stretched so that the last one comes after exactly count / rate seconds, as `vllm bench serve` does: runs of other
    seeds then have the same rate.
    """
    shares = np.arange(count) / max(count - 1, 1)
    rates = np.array([ramp.rate(share) for share in shares]) if ramp else np.full(count, rate, dtype=float)
    draw = np.random.default_rng(seed)
    gaps = 1 / rates if isinf(burstiness) else draw.gamma(burstiness, 1 / (rates * burstiness))
    times = np.cumsum(gaps)
    if ramp is None and rate is not None and count and times[-1] > 0:
        times *= count / rate / times[-1]
    return [float(time) for time in times]
