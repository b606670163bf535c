"""How two runs differ, metric by metric, and whether that is more than noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pdctl.bench.repeats import CONFIDENCE, HEADLINES, MORE_IS_BETTER
from pdctl.errors import ExitCode, PdctlError
from pdctl.runs.run import Run

Verdict = Literal["better", "worse", "within noise", "one run each"]
_OF_THE_LOAD = ("client", "caches_reset")


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of two runs.

    Args:
        metric: its key in the results.
        base: mean of the run that is compared with.
        other: mean of the other one.
        change: (other - base) / base.
        low: lower bound of the change's 95 % interval; nothing where there is but one run of either.
        high: its upper bound.
        verdict: of the other one: `within noise` when the interval has 0 in it.
    """

    metric: str
    base: float
    other: float
    change: float
    low: float | None
    high: float | None
    verdict: Verdict

    def told(self) -> str:
        """Write the change with its interval."""
        if self.low is None or self.high is None:
            return f"{self.change:+.1%}"
        return f"{self.change:+.1%} ({self.low:+.1%} to {self.high:+.1%})"


def difference(metric: str, base: Sequence[float], other: Sequence[float], paired: bool) -> Difference:
    """Compare the repeats of two runs.

    Repeats that took turns are compared pair by pair (paired t-test), so that what disturbed both does not count;
    others by Welch's t-test. The interval is that of the difference of the means, over the base's mean.
    """
    means = float(np.mean(base)), float(np.mean(other))
    scale = abs(means[0]) or 1e-12
    change = (means[1] - means[0]) / scale
    low, high = _bounds(base, other, paired)
    if low is None or high is None:
        return Difference(metric, *means, change, None, None, "one run each")
    verdict: Verdict = "within noise"
    if low > 0 or high < 0:
        verdict = "better" if (low > 0) == (metric in MORE_IS_BETTER) else "worse"
    return Difference(metric, *means, change, low / scale, high / scale, verdict)


def _bounds(base: Sequence[float], other: Sequence[float], paired: bool) -> tuple[float | None, float | None]:
    if min(len(base), len(other)) < 2:
        return None, None
    from scipy import stats  # noqa: PLC0415 it takes half a second, which other commands need not wait for

    if paired and len(base) == len(other):
        gaps = np.subtract(other, base)
        if np.ptp(gaps) == 0:
            return float(gaps[0]), float(gaps[0])
        found = stats.ttest_rel(other, base).confidence_interval(CONFIDENCE)
    elif np.ptp(base) == 0 and np.ptp(other) == 0:
        return other[0] - base[0], other[0] - base[0]
    else:
        found = stats.ttest_ind(other, base, equal_var=False).confidence_interval(CONFIDENCE)
    low, high = float(found.low), float(found.high)
    return (None, None) if math.isnan(low) or math.isnan(high) else (low, high)


def differences(base: Run, other: Run, paired: bool = False) -> list[Difference]:
    """Compare the headline figures of two runs."""
    told = base.whole_results(), other.whole_results()
    found = []
    for metric in HEADLINES:
        values = [[one[metric] for one in results if one.get(metric) is not None] for results in told]
        whole = all(len(some) == len(results) for some, results in zip(values, told, strict=True)) and all(values)
        if whole and any(
            values[0]
        ):  # tokens that all come in bursts have a median gap of 0, of which nothing is a share
            found.append(difference(metric, values[0], values[1], paired))
    return found


def unlike(base: Run, other: Run) -> list[str]:
    """Say how two runs' loads differ; nothing when they are alike."""
    wished = [{"model": run.about["model"]} | run.workload.told() | _load(run) for run in (base, other)]
    return [
        f"{key}: {wished[0].get(key)} and {wished[1].get(key)}"
        for key in wished[0] | wished[1]
        if wished[0].get(key) != wished[1].get(key)
    ]


def _load(run: Run) -> dict[str, Any]:
    return {key: run.about[key] for key in _OF_THE_LOAD if key in run.about}


def check_alike(runs: Sequence[Run]) -> None:
    """Refuse runs that cannot be compared.

    Raises:
        PdctlError: their loads differ, or one has no figures.
    """
    for run in runs:
        if not run.measures or not run.results():
            raise PdctlError(
                f"{run.name} has no figures of its own",
                "compare runs of pdctl bench, or points of a sweep: RUN/POINT",
                ExitCode.USAGE,
            )
    for other in runs[1:]:
        if found := unlike(runs[0], other):
            raise PdctlError(
                f"{runs[0].name} and {other.name} had different loads; their figures cannot be compared",
                "measure both with the same options of the load",
                ExitCode.USAGE,
                found,
            )
