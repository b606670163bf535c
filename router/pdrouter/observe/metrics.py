"""The router's Prometheus metrics: plain numbers while requests are served, a page when somebody asks.

Each worker process has its own numbers. A page adds up the states of all of them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from time import perf_counter
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from pdrouter.fleet.engine import Role
from pdrouter.fleet.fleet import Fleet
from pdrouter.observe import described
from pdrouter.observe.described import Described
from pdrouter.observe.log import RequestLog
from pdrouter.observe.record import Record
from pdrouter.observe.recorder import Recorder

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_LAST: Final = 15  # the bucket of all that took longer
_BOUNDS = (*map(str, _SECONDS), "+Inf")

State = dict[str, list[list[Any]]]
"""A process's numbers by metric: rows of label values with a number last; of histograms counts and a sum."""

# How rows with equal labels become one: numbers of a process add up, what each process sees of an engine does not.
_LEAST = frozenset((described.HEALTHY.name, described.METRICS_AGE.name))
_MOST = frozenset((
    described.BREAKER.name, described.SOURCE_AGE.name, described.EDGE_CLOSED.name, described.EDGE_SECONDS.name,
    described.CANARY_DIFFERS.name,
))  # fmt: skip


class _Durations:
    """Counts durations in buckets."""

    def __init__(self) -> None:
        self.counts = [0] * len(_BOUNDS)
        self.sum = 0.0
        self._bounds = list(_SECONDS)

    def add(self, seconds: float) -> None:
        place, bounds = 0, self._bounds
        # Compiled, this is quicker than bisect, which compares objects.
        while place < _LAST and seconds > bounds[place]:
            place += 1
        self.counts[place] += 1
        self.sum += seconds


def _rows(counts: Mapping[Any, int]) -> list[list[Any]]:
    return [[*labels, count] for labels, count in counts.items()]


class Metrics:
    """The numbers of one router process."""

    def __init__(self, fleet: Fleet, gauges: Callable[[], Iterable[tuple[Described, tuple[str, ...], float]]]) -> None:
        """Prepare.

        Args:
            fleet: whose engines have rows.
            gauges: gives the numbers that others keep: metric, labels, value.
        """
        self._fleet = fleet
        self._gauges = gauges
        self._requests: dict[tuple[str, int], int] = defaultdict(int)
        self._errors: dict[tuple[str, str], int] = defaultdict(int)
        self._decisions: dict[str, int] = defaultdict(int)
        self._pairs: dict[tuple[str, str], int] = defaultdict(int)
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._continued = 0
        self._duration = _Durations()
        self._routing = _Durations()
        self._ttft = _Durations()
        self._handoff = _Durations()
        self._prefill = _Durations()

    def finished(self, record: Record, ended: float) -> None:
        """Count a finished request."""
        self._requests[record.path, record.status] += 1
        if record.error_leg is not None:
            self._errors[record.error_leg, record.error_reason or ""] += 1
        if len(record.decode) == 1 and len(record.prefill) == 1:
            self._decisions[record.reason] += 1
            self._pairs[record.prefill[0], record.decode[0]] += 1
        else:
            self._decisions[record.reason.partition(":batch_of_")[0]] += 1
            for pair in record.pairs():
                self._pairs[pair] += 1
        self._duration.add(ended - record.started)
        first = record.first_byte_at
        if first is not None:
            self._ttft.add(first - record.started)
            if record.ticket_at is not None:
                self._handoff.add(first - record.ticket_at)
        if record.prefill_sent_at is not None:
            self._routing.add(record.prefill_sent_at - record.started)
        if record.prefill_seconds is not None:
            self._prefill.add(record.prefill_seconds)
        self._continued += record.continued
        self._prompt_tokens += record.prompt_tokens or 0
        self._completion_tokens += record.completion_tokens or 0

    def state(self) -> State:
        """Give all numbers as they are now."""
        state: State = {
            described.REQUESTS.name: _rows(self._requests),
            described.ERRORS.name: _rows(self._errors),
            described.PAIRS.name: _rows(self._pairs),
            described.DECISIONS.name: [[reason, count] for reason, count in self._decisions.items()],
            described.TOKENS.name: [["prompt", self._prompt_tokens], ["completion", self._completion_tokens]],
            described.CONTINUED.name: [[self._continued]],
            described.WORKERS.name: [[1]],
        }
        for metric, durations in (
            (described.DURATION, self._duration), (described.ROUTING, self._routing), (described.TTFT, self._ttft),
            (described.HANDOFF, self._handoff), (described.PREFILL, self._prefill),
        ):  # fmt: skip
            state[metric.name] = [[durations.counts, durations.sum]]
        for metric in (
            described.LEGS, described.PREDICTED, described.IN_FLIGHT, described.QUEUED_TOKENS, described.HELD_TOKENS,
            described.PINNED, described.HEALTHY, described.BREAKER, described.METRICS_AGE,
        ):  # fmt: skip
            state[metric.name] = []
        for engine in self._fleet:
            labels = [engine.url, engine.role.value]
            state[described.LEGS.name] += [[*labels, "ok", engine.answered], [*labels, "error", engine.failed]]
            if engine.role is Role.PREFILL:
                predicted = (("cached", engine.cached), ("uncached", engine.uncached))
                state[described.PINNED.name].append([engine.url, engine.own_pinned])
                state[described.PREDICTED.name] += [[engine.url, kind, tokens] for kind, tokens in predicted]
            state[described.IN_FLIGHT.name].append([*labels, engine.own_in_flight])
            state[described.QUEUED_TOKENS.name].append([*labels, engine.own_queued])
            state[described.HELD_TOKENS.name].append([*labels, engine.own_held])
            state[described.HEALTHY.name].append([*labels, int(engine.healthy)])
            state[described.BREAKER.name].append([*labels, int(self._fleet.tripped(engine))])
            if isfinite(engine.metrics_age):
                state[described.METRICS_AGE.name].append([*labels, engine.metrics_age])
        for metric, values, number in self._gauges():
            state.setdefault(metric.name, []).append([*values, number])
        return state


def _merged(name: str, states: Sequence[State]) -> dict[tuple[str, ...], float]:
    together: dict[tuple[str, ...], float] = {}
    for state in states:
        for *labels, number in state.get(name, ()):
            key = tuple(map(str, labels))
            if key not in together:
                together[key] = number
            elif name in _LEAST:
                together[key] = min(together[key], number)
            elif name in _MOST:
                together[key] = max(together[key], number)
            else:
                together[key] += number
    return together


def _histogram(metric: Described, states: Sequence[State]) -> HistogramMetricFamily:
    counts, total = [0] * len(_BOUNDS), 0.0
    for state in states:
        for more, seconds in state.get(metric.name, ()):
            counts = [one + other for one, other in zip(counts, more, strict=True)]
            total += seconds
    below, buckets = 0, []
    for bound, count in zip(_BOUNDS, counts, strict=True):
        below += count
        buckets.append((bound, float(below)))
    return HistogramMetricFamily(metric.name, metric.text, buckets=buckets, sum_value=total)


class _Families:
    """Metric families of some states, for prometheus_client."""

    def __init__(self, states: Sequence[State]) -> None:
        self._states = states

    def collect(self) -> Iterable[Metric]:
        for metric in described.ALL:
            if metric.kind == "histogram":
                yield _histogram(metric, self._states)
                continue
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(metric.name, metric.text, labels=list(metric.labels))
            for labels, number in _merged(metric.name, self._states).items():
                family.add_metric(list(labels), number)
            yield family


def page(states: Sequence[State]) -> bytes:
    """Give the page for Prometheus out of the states of all processes."""
    registry = CollectorRegistry()
    registry.register(_Families(states))
    return generate_latest(registry)


class Observer:
    """Takes finished requests to metrics, traces and log."""

    def __init__(self, metrics: Metrics, log: RequestLog, recorder: Recorder | None = None) -> None:
        self._metrics = metrics
        self._log = log
        self.recorder = recorder

    def finished(self, record: Record) -> None:
        """Count and log a finished request, end its span."""
        ended = perf_counter()
        self._metrics.finished(record, ended)
        if record.span is not None:
            record.span.ended(record)
        self._log.write(record, ended)
        if self.recorder is not None:
            self.recorder.note(record, ended)
