"""Stands in for `vllm bench serve` where vLLM is not: pdctl's own load generator under its command line.

It takes the options that pdctl gives, writes such a log (progress bar, table) and such a result, each request with it.
What it measures is no measurement by vLLM.
"""

import argparse
import asyncio
import json
import pathlib
import sys
import time
from typing import Any

from pdctl.bench.client import Record
from pdctl.bench.load import Load, Share
from pdctl.bench.result import Outcome, result, table
from pdctl.bench.workload import Workload


def parser() -> argparse.ArgumentParser:
    """Make the parser; an option that vLLM has and pdctl does not give is an error."""
    made = argparse.ArgumentParser(prog="vllm bench serve")
    numbers = ("--num-prompts", "--random-input-len", "--random-prefix-len", "--random-output-len", "--seed",
               "--max-concurrency", "--num-warmups")  # fmt: skip
    for name in numbers:
        made.add_argument(name, type=int)
    texts = ("--base-url", "--model", "--result-dir", "--result-filename", "--backend", "--endpoint", "--tokenizer",
             "--dataset-name", "--random-range-ratio", "--temperature", "--burstiness",
             "--percentile-metrics")  # fmt: skip
    for name in texts:
        made.add_argument(name)
    made.add_argument("--request-rate", type=float)
    for name in ("--ignore-eos", "--save-result", "--save-detailed"):
        made.add_argument(name, action="store_true", required=True)
    return made


def bar(done: int, total: int, seconds: float) -> str:
    """Write a progress bar as tqdm does."""
    filled = "█" * (10 * done // total)
    return (
        f"\r{100 * done // total:3}%|{filled:<10}| {done}/{total} [00:{seconds:02.0f}<00:00, {done / seconds:.2f}it/s]"
    )


async def measured(told: argparse.Namespace, workload: Workload) -> tuple[list[Record], float]:
    """Send the load."""
    records: list[Record] = []
    began = time.perf_counter()

    def on_done(record: Record) -> None:
        records.append(record)
        print(bar(len(records), told.num_prompts, time.perf_counter() - began), end="", file=sys.stderr, flush=True)

    load = Load(Share(told.base_url, told.model, workload, workload.requests(None), workload.concurrency), on_done)
    load.begin = time.perf_counter()
    await load.run()
    return records, load.strain.seconds


def detailed(records: list[Record]) -> dict[str, Any]:
    """Give what --save-detailed adds."""
    return {
        "input_lens": [one.prompt_tokens for one in records],
        "output_lens": [one.output_tokens for one in records],
        "ttfts": [one.ttft for one in records],
        "itls": [one.itls for one in records],
        "start_times": [one.start for one in records],
        "generated_texts": ["" for _ in records],
        "errors": [one.error for one in records],
        "latencies": [one.latency for one in records],
        "queue_times": [one.queued for one in records],
    }


def main() -> None:
    """Measure, print, write."""
    if sys.argv[1:3] != ["bench", "serve"]:
        sys.exit(f"this program only stands in for `vllm bench serve`, not for {sys.argv[1:3]}")
    told = parser().parse_args(sys.argv[3:])
    workload = Workload(
        num_prompts=told.num_prompts, input_len=told.random_input_len + told.random_prefix_len,
        output_len=told.random_output_len, concurrency=told.max_concurrency, rate=told.request_rate, seed=told.seed,
        shared_prefix=told.random_prefix_len,
    )  # fmt: skip
    print("Namespace:", told)
    print("Starting initial single prompt test run... (left out by the stand-in)", flush=True)
    records, seconds = asyncio.run(measured(told, workload))
    figures = result(
        workload, Outcome(records, seconds), model=told.model, simulated=True, slos=[], gpus=None, extra={}
    )
    print("\n" + table(figures))
    for key in ("num_gpus", "simulated", "pdctl"):
        del figures[key]
    path = pathlib.Path(told.result_dir) / told.result_filename
    path.write_text(json.dumps(figures | detailed(records)))


if __name__ == "__main__":
    main()
