"""A run's figures: computed as `vllm bench serve` does, under its key names and in its table."""

import time
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pdctl.bench.client import Record
from pdctl.bench.load import Outcome, Workload

WIDTH = 50
LABEL = 40


def _peaks(records: list[Record], begin: float) -> tuple[float, int]:
    """Give the largest number of tokens and of requests under way in any whole second of the run."""
    if not records:
        return 0.0, 0
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


def result(workload: Workload, outcome: Outcome, *, simulated: bool, extra: dict[str, Any]) -> dict[str, Any]:
    """Give the result with the keys of `vllm bench serve --save-result`, in its order, and ours behind them."""
    good = [record for record in outcome.records if record.ok]
    duration = outcome.duration or 1e-9
    prompt_tokens = sum(record.prompt_tokens for record in good)
    output_tokens = sum(record.output_tokens for record in good)
    tpots = [(r.latency - r.ttft) / (r.output_tokens - 1) for r in good if r.output_tokens > 1]
    peak_tokens, peak_requests = _peaks(good, outcome.begin)
    told: dict[str, Any] = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai",
        "backend": "openai",
        "label": None,
        "model_id": workload.model,
        "tokenizer_id": workload.model,
        "num_prompts": len(workload.prompts),
        "request_rate": "inf",
        "burstiness": 1.0,
        "max_concurrency": workload.concurrency,
        "duration": outcome.duration,
        "completed": len(good),
        "failed": len(outcome.records) - len(good),
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(good) / duration,
        "request_goodput": None,
        "output_throughput": output_tokens / duration,
        "total_token_throughput": (prompt_tokens + output_tokens) / duration,
        "latencies": [record.latency for record in good],
        "queue_times": [0.0] * len(good),
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
        "rtfx": 0.0,
    }
    told |= _statistics("ttft", [record.ttft for record in good])
    told |= _statistics("tpot", tpots)
    told |= _statistics("itl", [gap for record in good for gap in record.itls])
    return told | {"simulated": simulated, "pdctl": extra}


def table(told: dict[str, Any]) -> str:
    """Write the table that `vllm bench serve` prints."""

    def line(label: str, value: float | int) -> str:
        return f"{label:<{LABEL}} {value:<10}" if isinstance(value, int) else f"{label:<{LABEL}} {value:<10.2f}"

    lines = [
        f"{' Serving Benchmark Result ':=^{WIDTH}}",
        line("Successful requests:", told["completed"]),
        line("Failed requests:", told["failed"]),
        line("Maximum request concurrency:", told["max_concurrency"]),
        line("Benchmark duration (s):", told["duration"]),
        line("Total input tokens:", told["total_input_tokens"]),
        line("Total generated tokens:", told["total_output_tokens"]),
        line("Request throughput (req/s):", told["request_throughput"]),
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
