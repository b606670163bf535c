"""The load generator beside the real `vllm bench serve`, in turn, on the same simulated fleet (`make bench-client`).

Also what the load generator itself costs a token, against a server in C that streams tokens as fast as they are taken.
Needs vLLM: its program by VLLM=PROGRAM. Exit status 1 when throughput differs by more than 3 % or a median by more than
5 %, counted by the means of the rounds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "router"))
import peers

NAME = "agreement"
PDCTL = [sys.executable, "-m", "pdctl"]
JUDGED = {"output_throughput": 0.03, "median_ttft_ms": 0.05, "median_itl_ms": 0.05, "median_tpot_ms": 0.05,
          "median_e2el_ms": 0.05}  # fmt: skip
STREAMS, TOKENS = 64, 500
PACES = {"as fast as they come": 0, "one every 20 ms": 20}


def pdctl(*arguments: str, environment: dict[str, str] | None = None) -> None:
    """Run pdctl quietly; its errors are shown."""
    subprocess.run([*PDCTL, *arguments], check=True, stdout=subprocess.DEVNULL, env=os.environ | (environment or {}))


def rounds(count: int, vllm: str, options: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Measure by both clients in turn; another one begins each time."""
    told: dict[str, list[dict[str, Any]]] = {"pdctl": [], "vllm": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            clients = ["pdctl", "vllm"] if number % 2 == 0 else ["vllm", "pdctl"]
            for client in clients:
                path = Path(folder) / f"{client}-{number}.json"
                pdctl(
                    "bench", *options, "--client", client, "--seed", str(100 + number), "--name", NAME,
                    "--label", f"agreement-{client}", "--output", str(path), environment={"PDCTL_VLLM": vllm},
                )  # fmt: skip
                told[client].append(json.loads(path.read_text()))
    return told


def cost(pace_ms: int) -> tuple[float, float]:
    """Give what a token costs the load generator in us, and tokens a second, against the router bench's C engines."""
    peers.BUILD.mkdir(parents=True, exist_ok=True)
    program = peers.BUILD / "engines"
    subprocess.run(["cc", "-O2", "-o", str(program), str(peers.HERE / "engines.c")], check=True)
    with peers.engines(TOKENS, pace_ms), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cost.json"
        pdctl(
            "bench", str(STREAMS * (1 if pace_ms else 20)), str(STREAMS), "--url", f"http://127.0.0.1:{peers.DECODE}",
            "--model", "m", "--input-len", "100", "--output-len", str(TOKENS), "--prompts", "ids",
            "--label", "client-cost", "--output", str(path),
        )  # fmt: skip
        told = json.loads(path.read_text())
    return told["pdctl"]["strain"]["cpu_seconds"] / told["total_output_tokens"] * 1e6, told["output_throughput"]


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", default=os.environ.get("VLLM"), help="the program vllm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--speed", default="1", help="of the simulated engines")
    parser.add_argument("--cost-only", action="store_true", help="only what a token costs")
    parser.add_argument("options", nargs="*", help="of pdctl bench, after --")
    told = parser.parse_args()
    for pace, milliseconds in PACES.items():
        microseconds, speed = cost(milliseconds)
        print(
            f"tokens {pace}, {STREAMS} streams: {microseconds:.1f} us a token, {speed:.0f} tok/s by one client process"
        )
    if told.cost_only:
        return 0
    if not told.vllm:
        print("bench-client: say where real vLLM is: make bench-client VLLM=PROGRAM", file=sys.stderr)
        return 2
    options = told.options or ["200", "8", "--input-len", "500", "--output-len", "100"]
    pdctl("deploy", "--local", "--name", NAME, "--prefill", "2", "--decode", "2", "--speed", told.speed, "-y")
    try:
        measured = rounds(told.rounds, told.vllm, options)
    finally:
        pdctl("cleanup", "--name", NAME, "-y")
    print(f"SIMULATED 2 + 2 engines; pdctl bench {' '.join(options)}; {told.rounds} rounds in turn")
    print(f"{'':<20}{'pdctl':>12}{'vllm':>12}{'off':>9}{'most':>8}")
    good = True
    for key, most in JUDGED.items():
        ours, theirs = (mean(one[key] for one in measured[client]) for client in ("pdctl", "vllm"))
        off = ours / theirs - 1
        good = good and abs(off) <= most
        print(f"{key:<20}{ours:>12.2f}{theirs:>12.2f}{off:>+9.1%}{most:>8.0%}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
