"""Measures routers before real vLLM engines that are up already: one prefill and one decode engine with NIXL.

Everything is kept in one file as soon as it is measured. Called again with the same file it goes on where it stopped.
Run it with the Python that has vLLM. Exit status: 0 all done, 1 something failed or could not be measured, 2 wrong
usage, 3 the time given by --budget did not suffice (call it again).
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import drills
import httpx
import load
import texts
from asking import Asking, RefusedError
from plan import CONCURRENCIES, DIRECT, OURS, ROUTERS, THEIRS, Point, points
from results import Results, provenance
from routers import Programs, Router, RouterError

from engine import Engine, EngineError, counted, samples

KEPT = (
    "completed", "failed", "duration", "total_input_tokens", "total_output_tokens", "request_throughput",
    "output_throughput", "mean_ttft_ms", "median_ttft_ms", "p90_ttft_ms", "p99_ttft_ms", "mean_tpot_ms",
    "median_tpot_ms", "p99_tpot_ms", "mean_itl_ms", "median_itl_ms", "p99_itl_ms", "mean_e2el_ms", "p99_e2el_ms",
)  # fmt: skip
FAILURES = (load.LoadError, RouterError, RefusedError, EngineError, httpx.HTTPError, OSError, LookupError, ValueError)


class Bench:
    """The engines, how routers are called, and what was measured so far."""

    def __init__(self, told: argparse.Namespace) -> None:
        """Look at the engines.

        Raises:
            EngineError: one does not answer.
        """
        self.prefill = Engine("prefill", told.prefill)
        self.decodes = [Engine("decode", url) for url in told.decode]
        self.decode = self.decodes[0]
        self.results = Results(told.out)
        self.source = provenance(self.prefill, self.decode) | {"note": told.note}
        self.results.told["provenance"][told.what] = self.source
        model = self.decode.model
        self.model = str(model["id"])
        self.tokenizer = told.tokenizer or str(model["root"])
        self.block = int(self.decode.cache()["block_size"])
        logs = told.out.parent / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = logs
        self.programs = Programs(told.router, told.vllm_router, told.nginx, logs)
        self._deadline = time.monotonic() + told.budget
        self.fork = told.fork
        self.short = False

    def router(self, name: str, *flags: str, every: bool = False) -> Router:
        """Start a router before the pair, or before every decode engine."""
        decodes = [one.url for one in (self.decodes if every else self.decodes[:1])]
        return Router(name, self.programs, [self.prefill.url], decodes, self.model, flags)

    def time_for(self, seconds: float) -> bool:
        """Whether something that takes so long still fits."""
        fits: bool = time.monotonic() + seconds < self._deadline
        self.short = self.short or not fits
        return fits

    def attempt(self, section: str, key: str, seconds: float, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure something unless it is measured already or there is no time; a failure is kept and is no end."""
        if self.results.has(section, key):
            return
        if not self.time_for(seconds):
            print(f"{section} {key}: no time left for it ({seconds:.0f} s)", flush=True)
            return
        began = time.monotonic()
        try:
            found = measure()
        except FAILURES as error:
            print(f"{section} {key}: FAILED: {type(error).__name__}: {error}", flush=True)
            self.results.fail(f"{section} {key}", f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}")
            return
        self.results.put(section, key, found)
        print(f"{section} {key}: done in {time.monotonic() - began:.0f} s", flush=True)

    def point(self, point: Point) -> dict[str, Any]:
        """Run the benchmark through a router and count what it and the engines did meanwhile."""
        name = point.key.replace(" ", "_").replace(":", "-")
        result = self.logs / f"{name}.json"
        with self.router(point.router) as router:
            arguments = load.arguments(point, router.url, self.model, self.tokenizer, result)
            cpu, engines = router.cpu_seconds(), [one.counters() for one in (self.prefill, self.decode)]
            page = samples(router.metrics) if router.metrics else {}
            told = load.run(arguments, result, self.fork)
            cpu = router.cpu_seconds() - cpu
            found: dict[str, Any] = {
                "router": point.router, "concurrency": point.concurrency, "prompts": point.prompts,
                "repeat": point.repeat, "seed": point.seed, "at": time.strftime("%H:%M:%S"),
                "command": " ".join(["vllm", *arguments]),
            }  # fmt: skip
            found |= {key: told[key] for key in KEPT if key in told}
            found["errors"] = sorted({str(error)[:200] for error in told.get("errors", []) if error})[:3]
            if point.router != DIRECT:
                found |= {"router_cpu_s": round(cpu, 3), "router_rss_mib": round(router.resident_mib(), 1)}
            if router.metrics:
                found["compiled"] = router.compiled()
                after = samples(router.metrics)
                found["router_counted"] = {
                    key: value - page.get(key, 0.0) for key, value in after.items()
                    if key.endswith(("_total", "_seconds_sum", "_seconds_count")) and value != page.get(key, 0.0)
                }  # fmt: skip
            for one, before in zip((self.prefill, self.decode), engines, strict=True):
                found[one.role] = counted(before, one.counters())
        speed, first, last = (found[name] for name in ("output_throughput", "median_ttft_ms", "p99_ttft_ms"))
        print(
            f"{point.key:<36} {speed:>7.0f} tok/s  TTFT {first:>7.1f} p99 {last:>7.1f}"
            f"  TPOT {found['mean_tpot_ms']:>6.2f}  ITL {found['median_itl_ms']:>6.2f} ms"
            f"  CPU {found.get('router_cpu_s', 0.0):>5.2f} s  RSS {found.get('router_rss_mib', 0.0):>4.0f} MiB"
            f"  failed {found.get('failed', 0)}", flush=True,
        )  # fmt: skip
        return found


def bench(told: argparse.Namespace, on: Bench) -> None:
    """All points that are not measured yet, after some requests that do not count."""
    try:
        on.point(Point(OURS, 32, told.warm_up, 0))
    except FAILURES as error:
        print(f"warm-up: {type(error).__name__}: {error}", flush=True)
    wished = points(told.routers, told.concurrency, told.repeats, told.prompts, told.prompts_alone)
    for one in wished:
        on.attempt("points", one.key, one.seconds, lambda point=one: on.point(point))  # type: ignore[misc]


def check_texts(told: argparse.Namespace, on: Bench) -> None:
    """Texts by hand and through each router."""
    with Asking(on.model, told.vocabulary) as asking:
        on.attempt("texts", "by hand", 60, lambda: texts.control(asking, on.prefill, on.decode, on.block))
        for name in told.routers:

            def through(name: str = name) -> dict[str, Any]:
                # vllm-router gives one ticket to all prompts of a request, which can end the decode engine.
                kinds = [kind for kind in texts.KINDS if name != THEIRS or kind != texts.BATCH]
                with on.router(name) as router:
                    return texts.through(asking, router.url, on.decode, on.block, kinds)

            on.attempt("texts", name, 90, through)


def leave(told: argparse.Namespace, on: Bench) -> None:
    """Clients that leave."""
    with Asking(on.model, told.vocabulary) as asking:
        for name in told.routers:

            def leaving(name: str = name) -> dict[str, Any]:
                with on.router(name) as router:
                    return drills.leaving(router, asking, on.prefill, on.decode, each=name != THEIRS)

            on.attempt("drills", f"clients leave: {name}", 60, leaving)


def kill(told: argparse.Namespace, on: Bench) -> None:
    """A decode engine is killed; it stays dead."""
    if told.kill_decode is None or len(on.decodes) < 2:
        raise EngineError("kill needs --kill-decode COMMAND and a second --decode that goes on with the streams")
    with Asking(on.model, told.vocabulary) as asking:

        def killing() -> dict[str, Any]:
            with on.router(OURS, every=True) as router:
                return drills.killing(
                    router, asking, on.prefill, on.decode, on.decodes[1], told.kill_decode, on.block
                )  # fmt: skip

        on.attempt("drills", "decode killed", 60, killing)


def check(told: argparse.Namespace, on: Bench) -> None:
    """Say what is there; nothing is measured."""
    del told
    for key in ("gpus", "links", "cpu", "cores", "memory_gib", "versions", "engine_version", "model"):
        print(f"{key}: {on.source[key]}")
    print(f"block size {on.block}; KV cache: {[one.cache().get('num_gpu_blocks') for one in (on.prefill, on.decode)]}")
    for name in (OURS, THEIRS):
        began = time.monotonic()
        with on.router(name) as router:
            took, compiled = time.monotonic() - began, " compiled" if router.compiled() else ""
            print(f"{name}: a request came through after {took:.1f} s{compiled}, {router.resident_mib():.0f} MiB")
    counters = on.decode.counters()
    print(f"decode engine so far: {counters}")
    if not counters.get("transfers"):
        raise EngineError("no KV cache came over NIXL; look into both engines' logs")


def main() -> int:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=("check", "bench", "texts", "leave", "kill"),
        help="check: is everything there? bench: speed; texts: correctness; leave, kill: drills")  # fmt: skip
    add("--prefill", required=True, metavar="URL", help="the prefill engine, http://HOST:PORT")
    add("--decode", required=True, action="append", metavar="URL", help="the decode engine; a second one is for kill")
    add("--out", type=Path, default=Path(".build/gpu/results.json"), help="file of results (%(default)s)")
    add("--router", default="pd-router", metavar="COMMAND", help="how our router is called (%(default)s)")
    add("--vllm-router", default=f"{sys.executable} -m vllm_router.launch_router", metavar="COMMAND",
        help="how vllm-router is called (this Python, -m vllm_router.launch_router)")  # fmt: skip
    add("--nginx", default="nginx", metavar="COMMAND", help="how nginx is called (%(default)s)")
    add("--tokenizer", metavar="DIR", help="the model's tokenizer (where the engine says its model is)")
    add("--vocabulary", type=int, default=100_000, help="prompts' token ids are below this (%(default)s)")
    add("--budget", type=float, default=3600.0, metavar="S", help="begin nothing that would end later (%(default)s)")
    add("--routers", nargs="+", choices=ROUTERS, default=[OURS, THEIRS], metavar="NAME",
        help=f"what is measured, of {', '.join(ROUTERS)} ({OURS} {THEIRS})")  # fmt: skip
    add("--concurrency", nargs="+", type=int, default=list(CONCURRENCIES), metavar="N",
        help="requests at once, the most telling first (32 8 64 128 1)")  # fmt: skip
    add("--repeats", type=int, default=2, help="runs of each point (%(default)s)")
    add("--prompts", type=int, default=200, help="requests of a run (%(default)s)")
    add("--prompts-alone", type=int, default=24, help="requests of a run with one at a time (%(default)s)")
    add("--fork", action=argparse.BooleanOptionalAction, default=True, help="load vLLM once, not for each run (yes)")
    add("--warm-up", type=int, default=64, help="requests before the first point (%(default)s)")
    add("--kill-decode", metavar="COMMAND", help="shell command that kills the first decode engine")
    add("--note", default="", help="how the engines were started, for the results")
    told = parser.parse_args()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        on = Bench(told)
        before = len(on.results.told["failures"])
        {"check": check, "bench": bench, "texts": check_texts, "leave": leave, "kill": kill}[told.what](told, on)
    except (EngineError, RouterError, httpx.HTTPError) as error:
        print(f"run.py: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    on.results.write()
    print(f"written: {told.out}")
    if len(on.results.told["failures"]) > before:
        return 1
    return 3 if on.short else 0


if __name__ == "__main__":
    sys.exit(main())
