"""A run's figures: computed as `vllm bench serve` does, under its key names and in its table."""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pdctl.bench.client import Record
from pdctl.bench.slo import Slo, meeting, tpot
from pdctl.bench.workload import Workload

WIDTH = 50
LABEL = 40


@dataclass(slots=True)
class Outcome:
    """What was measured.

    Args:
        records: one a request that ended; `start` counts from the beginning of the run.
        duration: the run's length in seconds.
    """

    records: list[Record] = field(default_factory=list)
    duration: float = 0.0


def _peaks(records: list[Record]) -> tuple[float, int]:
    """Give the largest number of tokens and of requests under way in any whole second since the first request."""
    if not records:
        return 0.0, 0
    begin = min(record.start for record in records)
    seconds = int(max(record.start + record.latency for record in records) - begin) + 1
    tokens, requests = np.zeros(seconds + 1), np.zeros(seconds + 1)
    for record in records:
        at = record.start - begin + record.ttft
        times = at + np.concatenate(([0.0], np.cumsum(record.itls)))
        np.add.at(tokens, times.astype(int), 1)
        requests[int(record.start - begin) : int(record.start - begin + record.latency) + 1] += 1
    return float(tokens.max()), int(requests.max())


def _statistics(name: str, seconds: ArrayLike) -> dict[str, float]:
    values = np.asarray(seconds, dtype=float) * 1e3
    if values.size == 0:
        values = np.zeros(1)
    return {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
        f"p99_{name}_ms": float(np.percentile(values, 99)),
    }


def result(
    workload: Workload,
    outcome: Outcome,
    *,
    model: str,
    simulated: bool,
    slos: list[Slo],
    gpus: int | None,
    extra: dict[str, Any],
) -> dict[str, Any]:
    """Give the result with the keys of `vllm bench serve --save-result`, in its order, and ours behind them."""
    good = [record for record in outcome.records if record.ok]
    duration = outcome.duration or 1e-9
    prompt_tokens = sum(record.prompt_tokens for record in good)
    output_tokens = sum(record.output_tokens for record in good)
    peak_tokens, peak_requests = _peaks(good)
    failed = [record.error for record in outcome.records if record.error]
    told: dict[str, Any] = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai",
        "backend": "openai",
        "label": None,
        "model_id": model,
        "tokenizer_id": model,
        "num_prompts": workload.num_prompts,
        "request_rate": "inf" if workload.rate is None else workload.rate,
        "burstiness": workload.told()["burstiness"],
        "max_concurrency": workload.concurrency,
    }
    if workload.ramp:
        told |= {
            "ramp_up_strategy": workload.ramp.strategy,
            "ramp_up_start_rps": workload.ramp.start,
            "ramp_up_end_rps": workload.ramp.end,
        }
    told |= {
        "duration": outcome.duration,
        "completed": len(good),
        "failed": len(failed),
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(good) / duration,
        "request_goodput": meeting(good, slos) / duration if slos else None,
        "output_throughput": output_tokens / duration,
        "total_token_throughput": (prompt_tokens + output_tokens) / duration,
        "latencies": [record.latency for record in good],
        "queue_times": [record.queued for record in good],
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
        "rtfx": 0.0,
    }
    told |= _statistics("ttft", [record.ttft for record in good])
    told |= _statistics("tpot", [tpot(record) for record in good if record.output_tokens > 1])
    told |= _statistics("itl", [gap for record in good for gap in record.itls])
    told |= _statistics("e2el", [record.latency for record in good])
    ours = {
        "aborted": sum(record.aborted for record in outcome.records),
        "errors": dict(Counter(failed)),
        "slos": {slo.metric: slo.milliseconds for slo in slos},
        "slo_attainment": meeting(good, slos) / len(outcome.records) if slos and outcome.records else None,
    }
    return told | {"num_gpus": gpus, "simulated": simulated, "pdctl": ours | extra}


def table(told: dict[str, Any]) -> str:
    """Write the table that `vllm bench serve` prints."""

    def line(label: str, value: float | int) -> str:
        return f"{label:<{LABEL}} {value:<10}" if isinstance(value, int) else f"{label:<{LABEL}} {value:<10.2f}"

    lines = [
        f"{' Serving Benchmark Result ':=^{WIDTH}}",
        line("Successful requests:", told["completed"]),
        line("Failed requests:", told["failed"]),
    ]
    if told["max_concurrency"] is not None:
        lines.append(line("Maximum request concurrency:", told["max_concurrency"]))
    if told["request_rate"] != "inf":
        lines.append(line("Request rate configured (RPS):", float(told["request_rate"])))
    lines += [
        line("Benchmark duration (s):", told["duration"]),
        line("Total input tokens:", told["total_input_tokens"]),
        line("Total generated tokens:", told["total_output_tokens"]),
        line("Request throughput (req/s):", told["request_throughput"]),
    ]
    if told["request_goodput"] is not None:
        lines.append(line("Request goodput (req/s):", told["request_goodput"]))
    lines += [
        line("Output token throughput (tok/s):", told["output_throughput"]),
        line("Peak output token throughput (tok/s):", told["max_output_tokens_per_s"]),
        line("Peak concurrent requests:", float(told["max_concurrent_requests"])),
        line("Total token throughput (tok/s):", told["total_token_throughput"]),
    ]
    for name, title in (
        ("ttft", "Time to First Token"),
        ("tpot", "Time per Output Token (excl. 1st token)"),
        ("itl", "Inter-token Latency"),
    ):
        lines.append(f"{title:-^{WIDTH}}")
        short = name.upper()
        lines.append(line(f"Mean {short} (ms):", told[f"mean_{name}_ms"]))
        lines.append(line(f"Median {short} (ms):", told[f"median_{name}_ms"]))
        lines.append(line(f"P99 {short} (ms):", told[f"p99_{name}_ms"]))
    lines.append("=" * WIDTH)
    return "\n".join(lines)
