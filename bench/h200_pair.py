"""`make bench`: one simulated prefill and one decode engine behind the router, beside what real ones did on H200.

The real figures are vLLM 0.26 behind vllm-router 0.1.17, `vllm bench serve`, 200 prompts of 1000 tokens, 200 out
(`pdsim/timing/h200.json`). Exit status 1 when the run at concurrency 32 is further off than 10 % in throughput or 20 %
in median first-token time, counted from the nearer of the two real runs.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pdsim.timing.replay import measured

NAME = "h200-pair"
PDCTL = [sys.executable, "-m", "pdctl"]
JUDGED = "c32"


def run(concurrency: int, folder: Path, prompts: int = 200) -> dict[str, Any]:
    """Bench a fresh pair."""
    subprocess.run([*PDCTL, "deploy", "--local", "--name", NAME, "--prefill", "1", "--decode", "1", "-y"], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        path = folder / f"{concurrency}.json"
        sizes = ["--input-len", "1000", "--output-len", "200"]
        command = ["bench", str(prompts), str(concurrency), *sizes, "--name", NAME]
        subprocess.run([*PDCTL, *command, "--output", str(path)], check=True, stdout=subprocess.DEVNULL)
        told: dict[str, Any] = json.loads(path.read_text())
        return told
    finally:
        subprocess.run([*PDCTL, "cleanup", "--name", NAME, "-y"], check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)  # fmt: skip


def off(value: float, runs: list[float]) -> float:
    """Give the relative distance to the range of the real runs; 0 within it."""
    nearest = min(max(value, min(runs)), max(runs))
    return value / nearest - 1


def main() -> int:
    """Run and compare."""
    real = measured()["router_runs"]
    print("SIMULATED 1 prefill + 1 decode against real vLLM on 2 H200; 200 prompts, 1000 tokens in, 200 out")
    print(f"{'':<6}{'tok/s':>10}{'real':>14}{'off':>8}   {'TTFT p50 ms':>12}{'real':>14}{'off':>8}")
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for name, runs in real.items():
            told = run(int(name[1:]), Path(folder))
            speed, ttft = told["output_throughput"], told["median_ttft_ms"]
            errors = off(speed, runs["tokens_per_second"]), off(ttft, runs["ttft_p50_ms"])
            shown = ["–".join(f"{value:g}" for value in runs[key]) for key in ("tokens_per_second", "ttft_p50_ms")]
            left = f"{name:<6}{speed:>10.0f}{shown[0]:>14}{errors[0]:>+8.1%}"
            print(f"{left}   {ttft:>12.1f}{shown[1]:>14}{errors[1]:>+8.1%}", flush=True)
            if name == JUDGED:
                good = abs(errors[0]) <= 0.10 and abs(errors[1]) <= 0.20
    print(f"{JUDGED}: within 10 % in throughput and 20 % in TTFT" if good else f"{JUDGED}: too far off")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
