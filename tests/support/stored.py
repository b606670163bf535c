"""Runs as a measurement leaves them, made without one."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from pdctl.bench.client import Record
from pdctl.bench.result import Outcome, result
from pdctl.bench.workload import Workload
from pdctl.runs import Run

SMALL = Workload(num_prompts=12, input_len=50, output_len=6, concurrency=4)
FLEET = {"where": "local", "prefill": 2, "decode": 2, "router": "pd-router 1", "policy": "random", "gpus": 4}


def about(workload: Workload, **more: Any) -> dict[str, Any]:
    """What a run writes down when it begins."""
    return {
        "kind": "bench", "command": ["pdctl", "bench", "12", "4"], "versions": {"pdctl": "1"},
        "machine": {"cpu": "a <b>", "cores": 2}, "workload": workload.told(), "repeats": 3, "model": "m",
        "simulated": True, "fleet": FLEET, "values_hash": "abc", "slos": {"ttft": 300.0}, "client": "pdctl",
        "caches_reset": True,
    } | more  # fmt: skip


def records(workload: Workload, factor: float, seed: int, failed: int = 0) -> list[Record]:
    """Draw what a client could have measured; everything takes `factor` times as long."""
    draw = random.Random(seed)
    made = []
    for number in range(workload.num_prompts):
        itls = [draw.uniform(0.009, 0.011) * factor for _ in range(workload.output_len - 1)]
        ttft = draw.uniform(0.1, 0.2) * factor
        made.append(
            Record(number * 0.1, workload.input_len, workload.output_len, ttft, itls, ttft + sum(itls), number=number)
        )
    for one in made[:failed]:
        one.error = "status 503: <script>alert(1)</script>"
    return made


def bench(
    folder: Path, workload: Workload = SMALL, *, factor: float = 1.0, repeats: int = 3, failed: int = 0, **more: Any
) -> Run:
    """Make a finished run."""
    run = Run(folder)
    run.begin(about(workload, repeats=repeats, **more))
    for repeat in range(repeats):
        # every other repeat is a little slower, for all runs alike
        some = records(workload, factor * (1 + 0.02 * (repeat % 2)), repeat, failed)
        with (folder / "requests.jsonl").open("ab") as file:
            file.write(b"".join(orjson.dumps(one.told(0.0) | {"repeat": repeat}) + b"\n" for one in some))
        with (folder / "watch.jsonl").open("ab") as file:
            for second in range(4):
                engines = {
                    f"{role}-{number}": {"running": 1, "waiting": second, "kv": 0.1, "pinned": second}
                    for role in ("prefill", "decode") for number in range(2)
                }  # fmt: skip
                file.write(orjson.dumps({"repeat": repeat, "at": second, "engines": engines}) + b"\n")
        duration = max(one.start + one.latency for one in some)
        pairs = [{"prefill": f"prefill-{n}", "decode": f"decode-{1 - n}", "transfers": 6, "bytes": 9} for n in (0, 1)]
        extra = {"partial": False, "repeat": repeat, "stretch": 1.3, "transfers": pairs,
                 "router": {"cpu_seconds": 0.2 * factor, "resident_mb": 50.0, "version": "1"}}  # fmt: skip
        run.keep(
            repeat,
            result(workload, Outcome(some, duration), model="m", simulated=True, slos=run.slos, gpus=4, extra=extra),
        )
    run.end("done")
    return run


def compare(folder: Path) -> Run:
    """Make a finished comparison of three routers; the last one is a quarter faster."""
    run = Run(folder)
    names = ["vllm-router-consistent_hash", "ours-consistent_hash", "ours-least_tokens"]
    contenders = [dict(zip(("router", "policy"), name.rsplit("-", 1), strict=True)) for name in names]
    run.begin(about(SMALL, kind="compare", points=names, contenders=contenders))
    for name, factor in zip(names, (1.0, 0.999, 0.75), strict=True):
        router, _, policy = name.rpartition("-")
        bench(folder / "points" / name, factor=factor, title=f"{router}, {policy}",
              fleet=FLEET | {"router": router, "policy": policy})  # fmt: skip
    run.end("done")
    return run


def sweep(folder: Path) -> Run:
    """Make a finished sweep over concurrency on two settings."""
    run = Run(folder)
    points = {f"{setting}-c{level}": (setting, level) for setting in ("1p3d", "2p2d") for level in (1, 4, 16)}
    run.begin(about(SMALL, kind="sweep", over="concurrency", points=list(points)))
    for name, (setting, level) in points.items():
        workload = replace(SMALL, concurrency=level)
        bench(
            folder / "points" / name, workload, factor=1 + level / 8, repeats=1, setting=setting, at=level, title=name
        )
    run.end("done")
    return run


def evaluation(folder: Path, right: str = "1" * 8 + "0" * 32, **wish: Any) -> Run:
    """Make a finished evaluation; `right` says of each document whether its answer is."""
    run = Run(folder)
    asked = {"task": "words", "limit": None, "num_fewshot": None, "seed": 1234} | wish
    run.begin(about(SMALL, kind="eval", task="words", requests=80, wish=asked,
                    warnings=["chance level: 0.2 over 40 samples"]))  # fmt: skip
    score, count = right.count("1") / len(right), len(right)
    stderr = (score * (1 - score) / (count - 1)) ** 0.5
    results = {
        "results": {"words": {"acc,none": score, "acc_stderr,none": stderr, "alias": "words"}},
        "groups": {}, "n-samples": {"words": {"original": count, "effective": count}},
        "higher_is_better": {"words": {"acc": True}},
    }  # fmt: skip
    (folder / "scores.json").write_bytes(orjson.dumps(results))
    lines = [
        {"task": "words", "doc_id": number, "filter": "none", "metrics": ["acc"], "acc": float(one)}
        for number, one in enumerate(right)
    ]
    (folder / "samples.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    run.end("done")
    return run
