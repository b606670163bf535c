"""The virtual fleet against the fleet in real time, also by what its router recorded, and against two H200.

`make validate` runs the same tests with more requests: VALIDATE_REQUESTS, VALIDATE_SPEED (of the engines' time) and
VALIDATE_POLICIES say how.
"""

import asyncio
import json
import os
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from pdsim.timing.replay import measured
from pdsim.virtual.figures import Slo, figures
from pdsim.virtual.fleet import Fleet, Setup
from pdsim.virtual.synthetic import Shape, prefixes
from pdsim.virtual.traces import read_trace
from pdsim.virtual.workload import Asked, Workload
from support.processes import engine, router, start_all
from virtual.pair import errors, pair_like_two_h200, real_runs

REQUESTS = int(os.environ.get("VALIDATE_REQUESTS", "24"))
SPEED = float(os.environ.get("VALIDATE_SPEED", "0.25"))
POLICIES = os.environ.get("VALIDATE_POLICIES", "round_robin").split(",")
LIMIT = 0.10
STRETCH = 1.05  # decode steps of a real-time engine that took longer than this tell of the machine, not of the model
TRIES = 3  # a busy machine may have a quiet moment
HOP = 0.002  # seconds of this machine from the client to an engine or back


def ids(asked: Asked) -> list[int]:
    """Make the prompt: equal blocks are equal tokens."""
    tokens: list[int] = []
    for number in asked.chain.numbers:
        tokens += random.Random(number).choices(range(300, 8000), k=asked.chain.unit)
    return tokens[: asked.tokens]


@dataclass
class Sent:
    """What a client measured, seconds."""

    ttft: float
    latency: float


async def serve(url: str, workload: Workload, speed: float) -> list[Sent]:
    bodies = [
        {"model": "tiny", "prompt": ids(one), "max_tokens": one.output, "ignore_eos": True, "stream": True}
        for one in workload.requests
    ]
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:

        async def send(asked: Asked, body: dict, begin: float) -> Sent:
            await asyncio.sleep(begin + asked.arrival / speed - time.perf_counter())
            start, first = time.perf_counter(), 0.0
            async with client.stream("POST", url + "/v1/completions", json=body) as answer:
                assert answer.status_code == 200
                async for _ in answer.aiter_bytes():
                    first = first or time.perf_counter()
            return Sent(first - start, time.perf_counter() - start)

        begin = time.perf_counter() + 0.2
        return await asyncio.gather(
            *(send(asked, body, begin) for asked, body in zip(workload.requests, bodies, strict=True))
        )


def in_real_time(workload: Workload, policy: str, recording: Path) -> tuple[list[Sent], float]:
    """Give what clients of two prefill and two decode engines met, in modelled seconds, and the steps' stretch."""
    flags = ("--speed", str(SPEED), "--kv-lease-duration", "600")
    prefills, decodes = ([engine(role, *flags) for _ in range(2)] for role in ("prefill", "decode"))
    start_all([*prefills, *decodes])
    try:
        with router(prefills, decodes, "--policy", policy, "--seed", "0", "--record-dir", str(recording)) as front:
            sent = asyncio.run(serve(front.url, workload, SPEED))
        stretch = max(one.get("/sim/state")["clock"]["itl_stretch"] for one in decodes)
        for one in (*prefills, *decodes):
            assert one.get("/sim/violations") == []
    finally:
        for one in (*prefills, *decodes):
            one.stop()
    return [Sent(one.ttft * SPEED, one.latency * SPEED) for one in sent], stretch


def replayed(recording: Path, setup: Setup) -> dict[str, tuple[float, float]]:
    """Serve what the router recorded by the virtual fleet; give TTFTs of both, in modelled seconds."""
    (path,) = recording.iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == REQUESTS
    times = np.array([line["ttft_ms"] for line in lines]) / 1e3 * SPEED
    again = Fleet(replace(setup, speed=1 / SPEED), read_trace(path), 0).run().ttft
    shares = {"TTFT p50": 50, "TTFT p90": 90}
    told = {name: (float(np.percentile(again, at)), float(np.percentile(times, at))) for name, at in shares.items()}
    return told | {"TTFT mean": (float(again.mean()), float(times.mean()))}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_virtual_fleet_gives_what_clients_of_the_real_time_fleet_measure(policy, tmp_path):
    workload = prefixes(Shape(requests=REQUESTS, rate=6.0, input_tokens=1500, output_tokens=60, seed=3))
    for attempt in range(TRIES):
        recording = tmp_path / str(attempt)
        sent, stretch = in_real_time(workload, policy, recording)
        if stretch <= STRETCH:
            break
    setup = Setup(prefill=2, decode=2, prefill_policy=policy, hop=HOP * SPEED)
    run = Fleet(setup, workload, 0).run()
    first = min(one.arrival for one in workload.requests)
    ends = [asked.arrival - first + one.latency for asked, one in zip(workload.requests, sent, strict=True)]
    ttft = np.array([one.ttft for one in sent])
    many = np.array([one.output > 1 for one in workload.requests])
    tokens = np.array([one.output for one in workload.requests])
    itl = (np.array([one.latency for one in sent]) - ttft)[many].sum() / (tokens[many] - 1).sum()
    told = figures(run, Slo())
    pairs = {
        "TTFT mean": (told["ttft_mean"], ttft.mean()),
        "TTFT p50": (told["ttft_p50"], np.percentile(ttft, 50)),
        "TTFT p99": (told["ttft_p99"], np.percentile(ttft, 99)),
        "ITL": (float((run.latency - run.ttft)[run.output > 1].sum() / (run.output[run.output > 1] - 1).sum()), itl),
        "tokens/s": (told["output_rate"], tokens.sum() / max(ends)),
    }
    for name, (again, recorded) in replayed(recording, setup).items():
        pairs[f"recorded {name}"] = again, recorded
    print(f"\n{policy}, {REQUESTS} requests, 2 + 2 engines, stretch {stretch:.3f}")
    for name, (virtual, real) in pairs.items():
        print(f"  {name:<18} virtual {virtual:9.4f}  real time {real:9.4f}  {virtual / real - 1:+.1%}")
    off = [name for name, (virtual, real) in pairs.items() if abs(virtual / real - 1) > LIMIT]
    if stretch > STRETCH:
        busy = f"this machine is too busy to run engines in real time: steps took {stretch:.2f} times their length"
        print(f"verdict: none; {busy}")
        pytest.skip(busy)
    print(f"verdict: {'off by more than' if off else 'all within'} {LIMIT:.0%}{': ' * bool(off)}{', '.join(off)}")
    assert off == []


# The first run on such machines. At 8 its clients stayed in step, which they did not since; at 128 it prefilled quicker
# than in the measurements that the model is fitted to, and than in later runs.
@pytest.mark.parametrize(
    ("concurrency", "speed_off", "ttft_off"), [(1, 0.10, 0.10), (32, 0.10, 0.20), (64, 0.10, 0.20)]
)
def test_the_virtual_pair_is_near_what_was_measured_on_two_h200(concurrency, speed_off, ttft_off):
    real = measured()["router_runs"][f"c{concurrency}"]
    told = figures(pair_like_two_h200(concurrency), Slo())

    def off(value: float, runs: list[float]) -> float:
        return value / min(max(value, min(runs)), max(runs)) - 1

    speed = off(told["output_rate"], real["tokens_per_second"])
    ttft = off(told["ttft_p50"] * 1e3, real["ttft_p50_ms"])
    print(
        f"\nc{concurrency}: {told['output_rate']:.0f} tok/s {speed:+.1%}, {told['ttft_p50'] * 1e3:.1f} ms {ttft:+.1%}"
    )
    within = abs(speed) <= speed_off and abs(ttft) <= ttft_off
    print(f"verdict: {'within' if within else 'off by more than'} {speed_off:.0%} and {ttft_off:.0%}")
    assert within


@pytest.mark.parametrize("concurrency", [32, 64, 128])
def test_the_virtual_pair_is_near_the_runs_on_two_h200_that_it_was_not_fitted_to(concurrency):
    told = json.loads(Path("docs/measured/two-h200-repeated.json").read_text())
    for name, off in errors(pair_like_two_h200(concurrency), real_runs(told, concurrency)).items():
        print(f"c{concurrency} {name}: {off:+.1%}")
        assert abs(off) < LIMIT, name
