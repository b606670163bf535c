"""The router's Prometheus metrics. Each label combination is looked up once and then kept."""

from collections.abc import Iterable
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from pdrouter.fleet.fleet import Fleet
from pdrouter.observe.log import RequestLog
from pdrouter.observe.record import Record

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class EngineGauges(Collector):
    """Reads the engines when it is scraped, so that requests pay nothing for it."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Give in-flight requests and health of each engine."""
        labels = ["engine", "role"]
        busy = GaugeMetricFamily("pd_router_in_flight", "Requests that an engine is working on.", labels=labels)
        healthy = GaugeMetricFamily("pd_router_engine_healthy", "1 while an engine may be chosen.", labels=labels)
        for engine in self._fleet:
            busy.add_metric([engine.url, engine.role], engine.in_flight)
            healthy.add_metric([engine.url, engine.role], int(engine.healthy))
        return [busy, healthy]


class Metrics:
    """All metrics of one router process."""

    def __init__(self, fleet: Fleet) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nothing reads
        self.registry = CollectorRegistry()
        registry = self.registry
        registry.register(EngineGauges(fleet))
        self._requests = Counter(
            "pd_router_requests_total", "Client requests, by path and the status answered.", ["path", "status"],
            registry=registry,
        )  # fmt: skip
        self._errors = Counter(
            "pd_router_errors_total", "Requests that ended early, by the leg at fault and why.", ["leg", "reason"],
            registry=registry,
        )  # fmt: skip
        self._pairs = Counter(
            "pd_router_pairs_total", "Handoffs by pair of engines; prefill is none where one engine served alone.",
            ["prefill", "decode"], registry=registry,
        )  # fmt: skip
        self._ttft = Histogram(
            "pd_router_ttft_seconds", "From a request's arrival to the first byte of its answer.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._handoff = Histogram(
            "pd_router_handoff_seconds", "From the prefill answer to the first byte of decode's answer.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._prefill = Histogram(
            "pd_router_prefill_seconds", "From a request's arrival at the prefill leg to the prefill answer.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        tokens = Counter("pd_router_tokens_total", "Tokens that engines' usage told.", ["kind"], registry=registry)
        self._prompt_tokens = tokens.labels("prompt")
        self._completion_tokens = tokens.labels("completion")
        self._kept: dict[tuple[str, str, str], Counter] = {}

    def _child(self, family: Counter, first: str, second: str) -> Counter:
        key = (family._name, first, second)
        child = self._kept.get(key)
        if child is None:
            child = self._kept[key] = family.labels(first, second)
        return child

    def finished(self, record: Record) -> None:
        """Count a finished request."""
        self._child(self._requests, record.path, str(record.status)).inc()
        if record.error_leg is not None:
            self._child(self._errors, record.error_leg, record.error_reason or "").inc()
        for prefill, decode in record.pairs():
            self._child(self._pairs, prefill, decode).inc()
        first = record.first_byte_at
        if first is not None:
            self._ttft.observe(first - record.started)
            if record.ticket_at is not None:
                self._handoff.observe(first - record.ticket_at)
        if record.prefill_seconds is not None:
            self._prefill.observe(record.prefill_seconds)
        if record.prompt_tokens:
            self._prompt_tokens.inc(record.prompt_tokens)
        if record.completion_tokens:
            self._completion_tokens.inc(record.completion_tokens)

    def page(self) -> bytes:
        """Give the page for Prometheus."""
        return generate_latest(self.registry)


class Observer:
    """Takes finished requests to metrics and log."""

    def __init__(self, metrics: Metrics, log: RequestLog) -> None:
        self.metrics = metrics
        self._log = log

    def finished(self, record: Record) -> None:
        """Count and log a finished request."""
        self.metrics.finished(record)
        self._log.write(record, perf_counter())
