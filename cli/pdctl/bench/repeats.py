"""What repeats say together: the mean of a figure and how sure it is."""

from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
HEADLINES = {
    "output_throughput": "Output token throughput (tok/s)",
    "request_throughput": "Request throughput (req/s)",
    "request_goodput": "Request goodput (req/s)",
    "median_ttft_ms": "Median TTFT (ms)",
    "p99_ttft_ms": "P99 TTFT (ms)",
    "median_itl_ms": "Median ITL (ms)",
    "p99_itl_ms": "P99 ITL (ms)",
    "median_tpot_ms": "Median TPOT (ms)",
    "median_e2el_ms": "Median E2EL (ms)",
}
MORE_IS_BETTER = {"output_throughput", "request_throughput", "request_goodput"}


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over repeats with its 95 % confidence interval by Student's t; without bounds when there was one."""

    mean: float
    low: float | None
    high: float | None

    def text(self, digits: int = 2) -> str:
        """Write it for people."""
        if self.low is None or self.high is None:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {(self.high - self.low) / 2:.{digits}f}"


def interval(values: list[float]) -> Interval:
    """Give the mean of repeats and its interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, None, None)
    from scipy import stats  # noqa: PLC0415 it takes half a second, which other commands need not wait for

    error = float(stats.sem(values))
    if error == 0:
        return Interval(mean, mean, mean)
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, loc=mean, scale=error)
    return Interval(mean, float(low), float(high))


def headlines(told: list[dict[str, Any]]) -> dict[str, Interval]:
    """Give the headline figures of a run's repeats."""
    return {
        key: interval([one[key] for one in told])
        for key in HEADLINES
        if told and all(one.get(key) is not None for one in told)
    }


def spread(told: list[dict[str, Any]]) -> str:
    """Write the headline figures with their intervals."""
    lines = [f"{f' {len(told)} repeats, mean ± 95 % ':=^50}"]
    lines += [f"{HEADLINES[key] + ':':<40} {value.text()}" for key, value in headlines(told).items()]
    return "\n".join(lines)
