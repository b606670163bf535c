"""The engine's Prometheus page: vLLM 0.32's names, labels and buckets."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, GCCollector, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

if TYPE_CHECKING:
    from pdsim.engine.engine import Engine, EngineSettings
    from pdsim.engine.sequence import Sequence

TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TRANSFER = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 5)
POST = (0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 5)
BYTES = tuple(2**exponent for exponent in range(11, 34, 2))
DESCRIPTORS = (10, 20, 30, 50, 75, 100, 200, 400, 1000, 2000, 4000, 10_000, 20_000, 50_000)
FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
LABELS = ("model_name", "engine")


class EngineMetrics:
    """Counters and histograms of one engine; gauges are read from it when the page is asked for."""

    def __init__(self, settings: "EngineSettings", engine: "Engine") -> None:
        self._settings = settings
        self._engine = engine
        self.registry = CollectorRegistry()
        GCCollector(self.registry)
        PlatformCollector(self.registry)
        ProcessCollector(registry=self.registry)
        values = (settings.model, "0")
        self._values = list(values)
        longest = settings.max_model_len
        tokens = tuple(edge for edge in TOKENS if edge <= longest)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(f"vllm:{name}", text, LABELS, buckets=buckets, registry=self.registry)
            return metric.labels(*values)

        self.xfer_time = histogram("nixl_xfer_time_seconds", "Transfer duration of NIXL KV cache transfers.", TRANSFER)
        self.post_time = histogram("nixl_post_time_seconds", "Time to post NIXL KV cache transfers.", POST)
        self.bytes = histogram("nixl_bytes_transferred", "Bytes of each NIXL KV cache transfer.", BYTES)
        self.descriptors = histogram("nixl_num_descriptors", "Descriptors of each NIXL KV cache transfer.", DESCRIPTORS)
        self.prompt_tokens = histogram("request_prompt_tokens", "Number of prefill tokens processed.", tokens)
        self.generation_tokens = histogram("request_generation_tokens", "Number of generation tokens.", tokens)
        self.iteration_tokens = histogram(
            "iteration_tokens_total", "Number of tokens of each engine step.", STEP_TOKENS
        )
        self.max_generation = histogram("request_max_num_generation_tokens", "Largest generation of a request.", tokens)
        self.params_n = histogram("request_params_n", "The n request parameter.", (1, 2, 5, 10, 20))
        self.params_max_tokens = histogram("request_params_max_tokens", "The max_tokens request parameter.", tokens)
        self.ttft = histogram("time_to_first_token_seconds", "Time to first token in seconds.", TTFT)
        self.inter_token = histogram("inter_token_latency_seconds", "Inter-token latency in seconds.", ITL)
        self.per_output = histogram("request_time_per_output_token_seconds", "Time per output token of a request.", ITL)
        self.e2e = histogram("e2e_request_latency_seconds", "End-to-end request latency in seconds.", LATENCY)
        self.queue_time = histogram("request_queue_time_seconds", "Time spent in WAITING phase.", LATENCY)
        self.inference_time = histogram("request_inference_time_seconds", "Time spent in RUNNING phase.", LATENCY)
        self.prefill_time = histogram("request_prefill_time_seconds", "Time spent in PREFILL phase.", LATENCY)
        self.decode_time = histogram("request_decode_time_seconds", "Time spent in DECODE phase.", LATENCY)
        self.preemptions = histogram("request_num_preemptions", "Preemptions of a request.", (0, 1, 2, 5, 10))
        self.computed_tokens = histogram("request_prefill_kv_computed_tokens", "New KV tokens of a prefill.", tokens)
        self.http = Counter(
            "http_requests", "Total number of requests by method, status and handler.", ("method", "status", "handler"),
            registry=self.registry,
        )  # fmt: skip
        self.successes = dict.fromkeys(FINISH_REASONS, 0)
        self.prompt_total = self.generation_total = 0
        self.by_source = {"local_compute": 0, "local_cache_hit": 0, "external_kv_transfer": 0}
        self.failed_transfers = self.failed_notifications = 0
        self.registry.register(self)

    def first_token(self, sequence: "Sequence", now: float) -> None:
        """Count a sequence's prompt when its first token is there."""
        self.ttft.observe(now - sequence.arrival)
        length = len(sequence.prompt)
        self.prompt_total += length
        local = min(sequence.cached_tokens, length)
        self.by_source["local_cache_hit"] += local
        self.by_source["external_kv_transfer"] += sequence.external_tokens
        self.by_source["local_compute"] += length - local - sequence.external_tokens

    def transferred(self, seconds: float, moved: int, blocks: int) -> None:
        """Count one KV transfer: modelled seconds, bytes, blocks."""
        self.xfer_time.observe(seconds)
        self.post_time.observe(seconds / 4)
        self.bytes.observe(moved)
        self.descriptors.observe(blocks)

    def finished(self, sequence: "Sequence", reason: str, now: float) -> None:
        """Count a sequence that ended."""
        self.successes[reason] += 1
        count = len(sequence.outputs)
        self.generation_total += count
        self.e2e.observe(now - sequence.arrival)
        self.prompt_tokens.observe(len(sequence.prompt))
        self.generation_tokens.observe(count)
        self.max_generation.observe(count)
        self.params_n.observe(1)
        self.params_max_tokens.observe(sequence.sampling.max_tokens)
        self.preemptions.observe(sequence.preemptions)
        self.computed_tokens.observe(len(sequence.prompt) - sequence.cached_tokens - sequence.external_tokens)
        if sequence.scheduled_at is None or sequence.first_token_at is None:
            return
        self.queue_time.observe(sequence.scheduled_at - sequence.arrival)
        self.prefill_time.observe(sequence.first_token_at - sequence.scheduled_at)
        self.decode_time.observe(now - sequence.first_token_at)
        self.inference_time.observe(now - sequence.scheduled_at)
        self.per_output.observe((now - sequence.first_token_at) / (count - 1) if count > 1 else 0)

    def collect(self) -> Iterator[Metric]:
        """Give the metrics that are read rather than counted (called by prometheus_client)."""
        engine, scheduler = self._engine, self._engine.scheduler
        waiting, deferred = len(scheduler.waiting), len(scheduler.fetching)
        by_source = self.by_source
        cached = by_source["local_cache_hit"] + by_source["external_kv_transfer"]
        yield self._gauge(
            "num_requests_running", "Number of requests in model execution batches.", len(scheduler.running)
        )
        yield self._gauge("num_requests_waiting", "Number of requests waiting to be processed.", waiting + deferred)
        yield self._gauge(
            "num_requests_waiting_by_reason", "Number of waiting requests by reason.",
            {"capacity": waiting, "deferred": deferred}, "reason",
        )  # fmt: skip
        yield self._gauge(
            "engine_sleep_state", "Engine sleep state.",
            {"awake": 1, "weights_offloaded": 0, "discard_all": 0}, "sleep_state",
        )  # fmt: skip
        yield self._gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", engine.pool.usage)
        for name, text, value in (
            ("prefix_cache_queries", "Prefix cache queries, in tokens.", scheduler.prefix_queries),
            ("prefix_cache_hits", "Prefix cache hits, in tokens.", scheduler.prefix_hits),
            ("external_prefix_cache_queries", "Queries of the KV connector, in tokens.", scheduler.external_queries),
            ("external_prefix_cache_hits", "Hits of the KV connector, in tokens.", scheduler.external_hits),
            ("num_preemptions", "Cumulative number of preemptions.", scheduler.preempted),
            ("prompt_tokens", "Number of prefill tokens processed.", self.prompt_total),
            ("prompt_tokens_cached", "Number of cached prompt tokens (local and external).", cached),
            ("generation_tokens", "Number of generation tokens processed.", self._generated()),
            ("nixl_num_failed_transfers", "Failed NIXL transfers.", self.failed_transfers),
            ("nixl_num_failed_notifications", "Failed NIXL notifications.", self.failed_notifications),
            ("nixl_num_kv_expired_reqs", "Requests whose KV expired before it was read.", engine.leases.expired),
            ("nixl_num_notifications_after_expiry", "Notifications after expiry.", engine.leases.late_notifications),
        ):
            yield self._counter(name, text, value)
        yield self._counter("prompt_tokens_by_source", "Number of prompt tokens by source.", by_source, "source")
        yield self._counter(
            "prompt_tokens_cached_by_source", "Prefix-cache hit tokens by the cache tier that supplied them.",
            {
                "device": by_source["local_cache_hit"], "host": 0, "p2p": by_source["external_kv_transfer"],
                "disk": 0, "external_unspecified": 0,
            }, "source",
        )  # fmt: skip
        yield self._counter("request_success", "Count of processed requests.", self.successes, "finished_reason")
        info = InfoMetricFamily("vllm:cache_config", "Information of the LLMEngine CacheConfig")
        settings = self._settings
        config = {
            "block_size": str(settings.block_size),
            "cache_dtype": "auto",
            "enable_prefix_caching": "True",
            "engine": "0",
            "kv_cache_size_tokens": str((settings.num_blocks - 1) * settings.block_size),
            "num_gpu_blocks": str(settings.num_blocks),
        }
        info.add_metric([], config)
        yield info

    def _generated(self) -> int:
        return self.generation_total + sum(len(sequence.outputs) for sequence in self._engine.scheduler.running)

    def _gauge(self, name: str, text: str, value: float | dict[str, int], label: str = "") -> Metric:
        return self._fill(GaugeMetricFamily(f"vllm:{name}", text, labels=self._labels(label)), value)

    def _counter(self, name: str, text: str, value: float | dict[str, int], label: str = "") -> Metric:
        return self._fill(CounterMetricFamily(f"vllm:{name}", text, labels=self._labels(label)), value)

    def _labels(self, label: str) -> list[str]:
        return [*LABELS, label] if label else list(LABELS)

    def _fill(self, family: Any, value: float | dict[str, int]) -> Metric:
        for label, amount in value.items() if isinstance(value, dict) else [("", value)]:
            family.add_metric([*self._values, label] if label else self._values, amount)
        metric: Metric = family
        return metric
