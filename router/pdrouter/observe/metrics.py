"""The router's Prometheus metrics: plain numbers while requests are served, metric families when they are scraped."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from time import perf_counter

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from pdrouter.fleet.fleet import Fleet
from pdrouter.observe.log import RequestLog
from pdrouter.observe.record import Record

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BOUNDS = (*map(str, _SECONDS), "+Inf")


class _Durations:
    """Counts durations in buckets."""

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._text = text
        self._counts = [0] * len(_BOUNDS)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(_SECONDS, seconds)] += 1
        self._sum += seconds

    def family(self) -> HistogramMetricFamily:
        below, buckets = 0, []
        for bound, count in zip(_BOUNDS, self._counts, strict=True):
            below += count
            buckets.append((bound, float(below)))
        return HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


def _counter(
    name: str, text: str, labels: list[str], counts: Mapping[tuple[str, str], int] | Mapping[tuple[str, int], int]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in counts.items():
        family.add_metric([str(value) for value in values], count)
    return family


class Metrics(Collector):
    """All metrics of one router process."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._requests: dict[tuple[str, int], int] = defaultdict(int)
        self._errors: dict[tuple[str, str], int] = defaultdict(int)
        self._pairs: dict[tuple[str, str], int] = defaultdict(int)
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._ttft = _Durations("pd_router_ttft_seconds", "From a request's arrival to the first byte of its answer.")
        self._handoff = _Durations(
            "pd_router_handoff_seconds", "From the prefill answer to the first byte of decode's answer."
        )
        self._prefill = _Durations("pd_router_prefill_seconds", "From sending the prefill leg to its answer.")
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def finished(self, record: Record) -> None:
        """Count a finished request."""
        self._requests[record.path, record.status] += 1
        if record.error_leg is not None:
            self._errors[record.error_leg, record.error_reason or ""] += 1
        if len(record.decode) == 1 and len(record.prefill) == 1:
            self._pairs[record.prefill[0], record.decode[0]] += 1
        else:
            for pair in record.pairs():
                self._pairs[pair] += 1
        first = record.first_byte_at
        if first is not None:
            self._ttft.add(first - record.started)
            if record.ticket_at is not None:
                self._handoff.add(first - record.ticket_at)
        if record.prefill_seconds is not None:
            self._prefill.add(record.prefill_seconds)
        self._prompt_tokens += record.prompt_tokens or 0
        self._completion_tokens += record.completion_tokens or 0

    def collect(self) -> Iterable[Metric]:
        """Give all families (prometheus_client)."""
        yield _counter(
            "pd_router_requests", "Client requests, by path and answered status.", ["path", "status"], self._requests
        )
        yield _counter(
            "pd_router_errors", "Requests that ended early, by leg at fault and why.", ["leg", "reason"], self._errors
        )
        yield _counter(
            "pd_router_pairs", "Handoffs by engines; prefill is none where one engine served alone.",
            ["prefill", "decode"], self._pairs,
        )  # fmt: skip
        yield self._ttft.family()
        yield self._handoff.family()
        yield self._prefill.family()
        tokens = CounterMetricFamily("pd_router_tokens", "Tokens that engines' usage told.", labels=["kind"])
        tokens.add_metric(["prompt"], self._prompt_tokens)
        tokens.add_metric(["completion"], self._completion_tokens)
        yield tokens
        labels = ["engine", "role"]
        busy = GaugeMetricFamily("pd_router_in_flight", "Requests that an engine is working on.", labels=labels)
        healthy = GaugeMetricFamily("pd_router_engine_healthy", "1 while an engine may be chosen.", labels=labels)
        for engine in self._fleet:
            busy.add_metric([engine.url, engine.role], engine.in_flight)
            healthy.add_metric([engine.url, engine.role], int(engine.healthy))
        yield busy
        yield healthy

    def page(self) -> bytes:
        """Give the page for Prometheus."""
        return generate_latest(self._registry)


class Observer:
    """Takes finished requests to metrics and log."""

    def __init__(self, metrics: Metrics, log: RequestLog) -> None:
        self._metrics = metrics
        self._log = log

    def finished(self, record: Record) -> None:
        """Count and log a finished request."""
        self._metrics.finished(record)
        self._log.write(record, perf_counter())
