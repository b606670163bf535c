"""Service level objectives of a request, and how many meet them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pdctl.bench.client import Record
from pdctl.errors import ExitCode, PdctlError


def tpot(record: Record) -> float:
    """Give the mean time of a token after the first, seconds; 0 for one token, as `vllm bench serve` counts it."""
    return (record.latency - record.ttft) / (record.output_tokens - 1) if record.output_tokens > 1 else 0.0


MEASURES: dict[str, Callable[[Record], float]] = {
    "ttft": lambda record: record.ttft,
    "tpot": tpot,
    "itl": lambda record: float(np.percentile(record.itls, 99)) if record.itls else 0.0,
    "e2el": lambda record: record.latency,
}


@dataclass(frozen=True, slots=True)
class Slo:
    """One objective of a request.

    Args:
        metric: `ttft`, `tpot` (mean of its tokens), `itl` (99th percentile of its tokens) or `e2el`.
        milliseconds: the most it may take.
    """

    metric: str
    milliseconds: float

    @classmethod
    def read(cls, text: str) -> "Slo":
        """Read `ttft:300`.

        Raises:
            PdctlError: it is none.
        """
        metric, _, value = text.partition(":")
        try:
            if metric not in MEASURES or float(value) <= 0:
                raise ValueError
        except ValueError:
            raise PdctlError(
                f"{text!r} is no objective",
                f"write METRIC:MILLISECONDS with one of {', '.join(MEASURES)}, as in --slo ttft:300 --slo itl:30",
                ExitCode.USAGE,
            ) from None
        return cls(metric, float(value))

    def met(self, record: Record) -> bool:
        """Whether a request met it."""
        return MEASURES[self.metric](record) * 1000 <= self.milliseconds


def meeting(records: list[Record], slos: list[Slo]) -> int:
    """Count the requests that succeeded and met every objective."""
    return sum(record.ok and all(slo.met(record) for slo in slos) for record in records)
