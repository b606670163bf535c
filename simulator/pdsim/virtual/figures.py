"""What runs come to: figures of one run, and of several seeds with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from pdsim.virtual.fleet import Floats, Run

# Student's t at 97.5 %, by degrees of freedom
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
_T_MANY = 1.96

SHARES = (10, 25, 50, 75, 90, 95, 99, 99.9)  # of requests, percent, whose first token had come by `ttft_p…`


@dataclass(frozen=True)
class Slo:
    """What a client is promised, seconds.

    Args:
        ttft: until the first token.
        itl: between tokens, on average over the answer.
    """

    ttft: float = 2.0
    itl: float = 0.025


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and how far from it the true one may be (95 %)."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Give the interval of some seeds' figures; of a single one nobody can tell how far it is off."""
        many = len(values)
        mean = sum(values) / many
        if many < 2:
            return cls(mean, float("nan"))
        spread = sqrt(sum((value - mean) ** 2 for value in values) / (many - 1))
        t = _T[many - 2] if many - 2 < len(_T) else _T_MANY
        return cls(mean, t * spread / sqrt(many))


def _weighted(values: Floats, weights: Floats, share: float) -> float:
    if not values.size:
        return 0.0
    order = np.argsort(values)
    sums = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(sums, share * sums[-1])])


def figures(run: Run, slo: Slo) -> dict[str, float]:
    """Give a run's figures. Times are seconds, shares 0 to 1, `moved_bytes` all that was moved between engines."""
    ttft, requests, seconds = run.ttft, len(run.ttft), max(run.seconds, 1e-9)
    many = run.output > 1
    tpot = np.zeros(requests)
    tpot[many] = (run.latency[many] - ttft[many]) / (run.output[many] - 1)
    good = (ttft <= slo.ttft) & (tpot <= slo.itl)
    gaps = float(run.gap_counts.sum())
    return {
        "requests": float(requests),
        "seconds": run.seconds,
        "ttft_mean": float(ttft.mean()),
        **{f"ttft_p{share:g}": float(value) for share, value in zip(SHARES, np.percentile(ttft, SHARES), strict=True)},
        "tpot_mean": float(tpot[many].mean()) if many.any() else 0.0,
        "itl_mean": float((run.gaps * run.gap_counts).sum() / gaps) if gaps else 0.0,
        "itl_p50": _weighted(run.gaps, run.gap_counts, 0.5),
        "itl_p99": _weighted(run.gaps, run.gap_counts, 0.99),
        "good_share": float(good.mean()),
        "good_ttft": float((ttft <= slo.ttft).mean()),
        "good_itl": float((tpot <= slo.itl).mean()),
        "goodput": float(good.sum()) / seconds,
        "request_rate": requests / seconds,
        "output_rate": float(run.output.sum()) / seconds,
        "hit_share": float(run.cached.sum() / run.prompt.sum()),
        "moved_bytes": float(run.moved_bytes),
        "bypassed_share": run.bypassed / requests,
        "preempted": float(run.preempted),
    }


def over_seeds(runs: Sequence[Mapping[str, float]]) -> dict[str, Interval]:
    """Give each figure's interval over seeds."""
    return {name: Interval.of([run[name] for run in runs]) for name in runs[0]}


def ratio(ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]], name: str) -> Interval:
    """Give how a figure compares, seed by seed: the same seed has the same arrivals in both."""
    return Interval.of([one[name] / other[name] for one, other in zip(ours, theirs, strict=True)])
