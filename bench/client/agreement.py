"""The load generator beside `vllm bench serve` and AIPerf, in turn, on the same simulated fleet (`make bench-client`).

Also what the load generator itself costs a token, against a server in C that streams tokens as fast as they are taken.
vLLM's program is named by VLLM=PROGRAM, and left out where it is not; AIPerf is installed into an environment of its
own. Exit status 1 when throughput differs from another's by more than 3 % or a median by more than 5 %, counted by the
medians of the rounds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import pdsim.engine
from pdctl import deployment
from pdctl.environments import Environment

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "router"))
import peers

NAME = "agreement"
AIPERF = Environment("aiperf-0.13.0", ("aiperf==0.13.0",))
PDCTL = [sys.executable, "-m", "pdctl"]
JUDGED = {"output_throughput": 0.03, "median_ttft_ms": 0.05, "median_itl_ms": 0.05, "median_tpot_ms": 0.05,
          "median_e2el_ms": 0.05}  # fmt: skip
STREAMS, TOKENS = 64, 500
PACES = {"as fast as they come": 0, "one every 20 ms": 20}


def pdctl(*arguments: str, environment: dict[str, str] | None = None) -> None:
    """Run pdctl quietly; its errors are shown."""
    subprocess.run([*PDCTL, *arguments], check=True, stdout=subprocess.DEVNULL, env=os.environ | (environment or {}))


def by_pdctl(client: str, options: list[str], seed: int, folder: Path, vllm: str) -> dict[str, float]:
    """Measure by `pdctl bench`, which runs either client."""
    path = folder / "result.json"
    pdctl(
        "bench", *options, "--client", client, "--seed", str(seed), "--name", NAME, "--label", f"agreement-{client}",
        "--output", str(path), environment={"PDCTL_VLLM": vllm},
    )  # fmt: skip
    told: dict[str, float] = json.loads(path.read_text())
    return told


def by_aiperf(options: list[str], seed: int, folder: Path) -> dict[str, float]:
    """Measure by AIPerf, and give its figures under our names.

    What vLLM calls the inter-token latency is AIPerf's inter-chunk latency; AIPerf's inter-token latency is a request's
    mean, vLLM's time per output token.
    """
    parser = argparse.ArgumentParser()
    for name in ("prompts", "concurrency", "--input-len", "--output-len"):
        parser.add_argument(name, required=True) if name.startswith("-") else parser.add_argument(name)
    told = parser.parse_args(options)
    tokenizer = Path(pdsim.engine.__file__).parent / "tokenizer"
    target = deployment.load(NAME)
    command = [
        AIPERF.program("aiperf", print), "profile", "-m", target.model, "-u", target.router_url, "--endpoint-type",
        "completions", "--streaming", "--tokenizer", tokenizer, "--concurrency", told.concurrency, "--request-count",
        told.prompts, "--synthetic-input-tokens-mean", told.input_len, "--synthetic-input-tokens-stddev", "0",
        "--output-tokens-mean", told.output_len, "--output-tokens-stddev", "0", "--extra-inputs", "ignore_eos:true",
        "--extra-inputs", "temperature:0", "--use-server-token-count", "--random-seed", str(seed), "--ui", "none",
        "--output-artifact-dir", folder / "aiperf",
    ]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = json.loads((folder / "aiperf/profile_export_aiperf.json").read_text())
    if found["request_count"]["avg"] != int(told.prompts):
        raise SystemExit(f"AIPerf counts {found['request_count']['avg']} of {told.prompts} requests")
    return {
        "output_throughput": found["output_token_throughput"]["avg"],
        "median_ttft_ms": found["time_to_first_token"]["p50"],
        "median_itl_ms": found["inter_chunk_latency"]["p50"],
        "median_tpot_ms": found["inter_token_latency"]["p50"],
        "median_e2el_ms": found["request_latency"]["p50"],
    }


def rounds(count: int, others: list[str], vllm: str, options: list[str]) -> dict[str, list[dict[str, float]]]:
    """Measure by all clients in turn; another one begins each time."""
    clients = ["pdctl", *others]
    told: dict[str, list[dict[str, float]]] = {client: [] for client in clients}
    for number in range(count):
        at = number % len(clients)
        for client in clients[at:] + clients[:at]:
            with tempfile.TemporaryDirectory() as folder:
                seed = 100 + number
                told[client].append(
                    by_aiperf(options, seed, Path(folder)) if client == "aiperf"
                    else by_pdctl(client, options, seed, Path(folder), vllm)
                )  # fmt: skip
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
    parser.add_argument("--vllm", default=os.environ.get("VLLM"), help="the program vllm; none: without it")
    parser.add_argument("--no-aiperf", action="store_true", help="without AIPerf")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--speed", default="0.5", help="of the simulated engines; they and the clients share this machine's cores"
    )
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
    others = ["vllm"] * bool(told.vllm) + ["aiperf"] * (not told.no_aiperf)
    options = told.options or ["150", "4", "--input-len", "500", "--output-len", "60"]
    pdctl("deploy", "--local", "--name", NAME, "--prefill", "2", "--decode", "2", "--speed", told.speed, "-y")
    try:
        measured = rounds(told.rounds, others, told.vllm or "", options)
    finally:
        pdctl("cleanup", "--name", NAME, "-y")
    print(f"SIMULATED 2 + 2 engines at {told.speed} of an H200's speed; medians of {told.rounds} rounds in turn")
    print(f"pdctl bench {' '.join(options)}")
    print(f"{'':<20}{'pdctl':>12}" + "".join(f"{other:>12}{'off':>9}" for other in others) + f"{'most':>8}")
    good = True
    for key, most in JUDGED.items():
        figures = {client: median(one[key] for one in some) for client, some in measured.items()}
        offs = {other: figures["pdctl"] / figures[other] - 1 for other in others}
        good = good and all(abs(off) <= most for off in offs.values())
        beside = "".join(f"{figures[other]:>12.2f}{off:>+9.1%}" for other, off in offs.items())
        print(f"{key:<20}{figures['pdctl']:>12.2f}{beside}{most:>8.0%}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
