"""The virtual pair beside runs of `vllm bench serve` on two H200 (`docs/measured`).

`PYTHONPATH=tests python -m virtual.pair` prints how far off it is with other costs of joining a decode batch: what
decision 14 was fitted by (the first file) and judged by (the second).
"""

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from pdsim.timing import model
from pdsim.virtual.figures import Slo, figures
from pdsim.virtual.fleet import Fleet, Run, Setup
from pdsim.virtual.synthetic import Shape, uniform

MEASURED = ("two-h200", "two-h200-repeated")
ROUTERS = ("pd-router", "vllm-router")
FIGURES = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "mean_tpot_ms")


def pair_like_two_h200(concurrency: int) -> Run:
    """Serve what was served there: 200 prompts of 1000 tokens, 200 tokens each."""
    workload = uniform(Shape(requests=200, input_tokens=1000, output_tokens=200))
    setup = Setup(prefill=1, decode=1, prefill_policy="round_robin", concurrency=concurrency, text=True, hop=0.0015)
    return Fleet(setup, workload, 0).run()


def real_runs(told: dict[str, Any], concurrency: int) -> dict[str, float]:
    """Give the means of all runs through a router at a concurrency, by figure."""
    points = [one for one in told["points"].values() if (one["concurrency"], one["router"]) in
              [(concurrency, router) for router in ROUTERS]]  # fmt: skip
    return {name: mean(point[name] for point in points) for name in FIGURES}


def errors(run: Run, real: dict[str, float]) -> dict[str, float]:
    """Give the relative error of each figure."""
    told = figures(run, Slo())
    per_token = float(((run.latency - run.ttft) / (run.output - 1)).mean())
    virtual = (told["output_rate"], told["ttft_p50"] * 1e3, float(np.percentile(run.ttft, 99)) * 1e3, per_token * 1e3)
    return {name: value / real[name] - 1 for name, value in zip(FIGURES, virtual, strict=True)}


def main() -> None:
    """Print the sum of squared errors for some costs."""
    files = {name: json.loads(Path(f"docs/measured/{name}.json").read_text()) for name in MEASURED}
    profile = model.load_profile("h200")
    both = profile.transfer_notice + profile.decode_join
    for join in (0.0, 0.001, 0.0015, 0.002, 0.0025, 0.003, 0.004):
        model._known()["h200"] = replace(profile, decode_join=join, transfer_notice=both - join)
        runs = {concurrency: pair_like_two_h200(concurrency) for concurrency in (32, 64, 128)}
        print(f"{join * 1e3:.1f} ms", end="")
        for name, told in files.items():
            off = [one for at, run in runs.items() for one in errors(run, real_runs(told, at)).values()]
            print(f"   {name}: {sum(one * one for one in off):.3f}, most {max(map(abs, off)):.1%}", end="")
        print()


if __name__ == "__main__":
    main()
