"""`vllm bench serve` itself, a process for each run.

Loading vLLM takes some ten seconds. So the processes are forks of one that has loaded it and done nothing else.
"""

import json
import multiprocessing
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from plan import Point

_MODULES = [
    f"vllm.entrypoints.cli.{name}"
    for name in ("main", "benchmark.main", "collect_env", "launch", "openai", "run_batch", "serve")
]
_FORKS = multiprocessing.get_context("forkserver")
_FRESH = multiprocessing.get_context("spawn")
_FORKS.set_forkserver_preload([*_MODULES, "vllm.benchmarks.serve"])
PATIENCE = 240.0  # seconds for a run
INPUT, OUTPUT = 1000, 200  # tokens


class LoadError(Exception):
    """A run gave no result; the message has the end of its log."""


def _vllm(arguments: list[str], log: str) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = ["vllm", *arguments]
    import_module("vllm.entrypoints.cli.main").main()


def arguments(point: Point, url: str, model: str, tokenizer: str, result: Path) -> list[str]:
    """Give what follows `vllm` on the command line."""
    return [
        "bench", "serve", "--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions", "--model", model,
        "--tokenizer", tokenizer, "--dataset-name", "random", "--random-input-len", str(INPUT),
        "--random-output-len", str(OUTPUT), "--num-prompts", str(point.prompts),
        "--max-concurrency", str(point.concurrency), "--ignore-eos", "--seed", str(point.seed), "--disable-tqdm",
        "--ready-check-timeout-sec", "0", "--percentile-metrics", "ttft,tpot,itl,e2el",
        "--metric-percentiles", "50,90,99", "--save-result", "--result-dir", str(result.parent),
        "--result-filename", result.name,
    ]  # fmt: skip


def run(arguments: list[str], result: Path, fork: bool) -> dict[str, Any]:
    """Run it and give the JSON that it wrote.

    Args:
        arguments: what follows `vllm` on the command line.
        result: file that they name.
        fork: whether the process may be a fork; else it loads vLLM anew.

    Raises:
        LoadError: it failed, or took longer than `PATIENCE`.
    """
    log = result.with_suffix(".log")
    result.unlink(missing_ok=True)
    process = (_FORKS if fork else _FRESH).Process(target=_vllm, args=(arguments, str(log)))
    process.start()
    process.join(PATIENCE)
    late = process.is_alive()
    if late:
        process.kill()
        process.join()
    if late or process.exitcode or not result.exists():
        end = log.read_text(errors="replace")[-1500:] if log.exists() else "no log"
        how = f"took over {PATIENCE:.0f} s" if late else f"ended with status {process.exitcode}"
        raise LoadError(f"vllm bench serve {how}; {log} ends:\n{end}")
    told: dict[str, Any] = json.loads(result.read_text())
    return told
