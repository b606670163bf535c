"""One repeat of a run: client processes are started, watched, and what they measured becomes a result."""

import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil

from pdctl.bench.caches import reset
from pdctl.bench.result import Outcome, result
from pdctl.bench.watch import Watch, breaches, stretch, transfers
from pdctl.bench.workload import Workload
from pdctl.errors import PdctlError
from pdctl.runs.run import Run, parsed, put
from pdctl.runs.setting import Place

START_AHEAD_SECONDS = 0.1
LAG_LIMIT_SECONDS = 0.010
CPU_LIMIT = 0.9
STRETCH_LIMIT = 1.10

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Client:
    """How the load is made.

    Args:
        processes: client processes.
        trace: where the workload's trace is.
        watch: look at the engines meanwhile.
        reset_caches: empty the prefix caches of a deployment of ours before each repeat.
    """

    processes: int = 1
    trace: Path | None = None
    watch: bool = True
    reset_caches: bool = True


@dataclass(slots=True)
class _Sender:
    process: subprocess.Popen[bytes]
    done: int = 0
    failed: int = 0
    strain: dict[str, Any] | None = None


@dataclass(slots=True)
class _Senders:
    """The client processes of a repeat."""

    told: "queue.SimpleQueue[tuple[int, dict[str, Any] | None]]" = field(default_factory=queue.SimpleQueue)
    all: list[_Sender] = field(default_factory=list)

    def start(self, orders: dict[str, Any]) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "pdctl.bench.sender"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is ours to pass on: they end when their input does
        )  # fmt: skip
        number = len(self.all)
        self.all.append(_Sender(process))
        threading.Thread(target=self._listen, args=(number, process), daemon=True).start()
        self.say(number, orjson.dumps(orders))

    def say(self, number: int, line: bytes) -> None:
        pipe = self.all[number].process.stdin
        assert pipe is not None
        pipe.write(line + b"\n")
        pipe.flush()

    def _listen(self, number: int, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.told.put((number, orjson.loads(line)))
        self.told.put((number, None))

    def hear(self) -> tuple[int, dict[str, Any]]:
        """Wait for what one of them tells.

        Raises:
            PdctlError: it could not prepare, or ended.
        """
        number, told = self.told.get()
        while told is None and self.all[number].strain is not None:  # it has told all, and ended
            number, told = self.told.get()
        if told is None:
            raise PdctlError("a client process ended by itself", "see above for its error, then run the command again")
        if "error" in told:
            raise PdctlError(f"the requests cannot be made: {told['error']}", "check the workload's options")
        return number, told

    def stop(self) -> None:
        for sender in self.all:
            if sender.process.stdin is not None:
                sender.process.stdin.close()
        for sender in self.all:
            try:
                sender.process.wait(5)
            except subprocess.TimeoutExpired:
                sender.process.kill()
                sender.process.wait()


def measure(
    run: Run,
    workload: Workload,
    place: Place,
    repeat: int,
    client: Client,
    on_progress: Progress,
    meter: Callable[[], Callable[[], dict[str, Any]]] = lambda: dict,
) -> dict[str, Any]:
    """Send a workload once and write the result into the run's folder.

    Each repeat has other prompts (the seed and its number), so that no repeat finds those of another in a cache.

    Args:
        run: where it is kept; begun.
        workload: what is sent.
        place: where to.
        repeat: its number.
        client: by what.
        on_progress: told how many requests have ended and failed.
        meter: called when the load begins, after warm-up; gives what tells, once it is over, what else is written down.

    Raises:
        KeyboardInterrupt: interrupted; the partial result has been written.
        PdctlError: a client process cannot do its work.
    """
    path = run.folder / "requests.jsonl"
    forget(path, repeat)  # a repeat that was cut short is made anew
    processes = max(1, min(client.processes, workload.concurrency or client.processes))
    begin = time.perf_counter()
    senders = _Senders()
    target = place.target if client.watch else None
    if place.target is not None and client.reset_caches:
        reset(place.target)
    before = target.health() if target else []
    routed = target.routing() if target else None
    with ExitStack() as stack:
        stack.callback(senders.stop)
        for number in range(processes):
            senders.start(
                {
                    "url": place.url, "model": place.model, "process": number,
                    "workload": replace(workload, seed=workload.seed + repeat).told(),
                    "processes": processes, "repeat": repeat, "records": str(path),
                    "trace": client.trace and str(client.trace),
                }
            )  # fmt: skip
        try:
            _wait(senders, "ready")
            read = meter()
            begin = time.perf_counter() + START_AHEAD_SECONDS
            for number in range(processes):
                senders.say(number, b"%r" % begin)
            stack.enter_context(Watch(target, run.folder / "watch.jsonl", repeat, lambda: begin))
            _wait(senders, "strain", lambda: on_progress(*_sums(senders)))
            more = read()
        except KeyboardInterrupt:
            senders.stop()
            run.keep(repeat, run.partial_result(repeat))
            raise
    strain = _strain([sender.strain for sender in senders.all if sender.strain])
    after = target.health() if target else []
    now = target.routing() if target else None
    told = result(
        workload, Outcome(run.records(repeat), strain["seconds"]), model=place.model, simulated=place.simulated,
        slos=run.slos, gpus=place.gpus,
        extra={
            "partial": False, "repeat": repeat, "client": "pdctl", "processes": processes, "strain": strain,
            "stretch": stretch(before, after),
            "transfers": transfers(routed.transfers, now.transfers) if routed and now else [],
            "violations": breaches(routed.violations, now.violations) if routed and now else {}, **more,
        },
    )  # fmt: skip
    run.keep(repeat, told)
    return told


def forget(path: Path, repeat: int) -> None:
    """Take a repeat's requests out of a file of them."""
    if not path.exists():
        return
    kept = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    put(path, b"".join(line for line in kept if parsed(path, line)["repeat"] != repeat))


def _sums(senders: _Senders) -> tuple[int, int]:
    return sum(sender.done for sender in senders.all), sum(sender.failed for sender in senders.all)


def _wait(senders: _Senders, key: str, on_told: Callable[[], None] = lambda: None) -> None:
    """Wait until every client process has told something of this name."""
    missing = set(range(len(senders.all)))
    while missing:
        number, told = senders.hear()
        sender = senders.all[number]
        sender.done, sender.failed = told.get("done", sender.done), told.get("failed", sender.failed)
        sender.strain = told.get("strain", sender.strain)
        if key in told:
            missing.discard(number)
        on_told()


def _strain(told: list[dict[str, Any]]) -> dict[str, Any]:
    """Say how hard the client worked, and whether that shows in the figures."""
    lags = [lag for one in told for lag in one["lags"]]
    late = [seconds for one in told for seconds in one["late"]]
    lag = float(np.percentile(lags, 99)) if lags else 0.0
    cpu = max((one["cpu_seconds"] / max(one["seconds"], 1e-9) for one in told), default=0.0)
    why = []
    if lag > LAG_LIMIT_SECONDS:
        why.append(f"its event loop was late by {lag * 1e3:.0f} ms (p99)")
    if cpu > CPU_LIMIT:
        why.append(f"a client process used {cpu:.0%} of a core")
    if late and (worst := float(np.percentile(late, 99))) > 5 * LAG_LIMIT_SECONDS:
        why.append(f"requests were sent {worst * 1e3:.0f} ms after they were due (p99)")
    return {
        "seconds": max((one["seconds"] for one in told), default=0.0),
        "cpu_seconds": sum(one["cpu_seconds"] for one in told),
        "cpu_share": cpu,
        "lag_p99_ms": lag * 1e3,
        "late_p99_ms": float(np.percentile(late, 99)) * 1e3 if late else 0.0,
        "machine_cpu_percent": psutil.cpu_percent(),
        "saturated": why,
    }


def worst(results: list[dict[str, Any]]) -> list[str]:
    """Give the warnings of the repeat that has most of them."""
    found = sorted((warnings(told) for told in results), key=len)
    return found[-1] if found else []


def warnings(told: dict[str, Any]) -> list[str]:
    """Say what makes a result doubtful: a client or a machine that was too slow."""
    found = []
    ours = told["pdctl"]
    if saturated := ours.get("strain", {}).get("saturated"):
        found.append(
            f"the load generator was saturated: {'; '.join(saturated)}. First-token and inter-token times include "
            "that: use more --processes, less load, or a machine of its own"
        )
    if (slow := ours.get("stretch")) and slow > STRETCH_LIMIT:
        found.append(
            f"this machine was too slow: simulated decode steps took {slow:.2f} times their modelled length; use fewer "
            "engines, less load, or a lower --speed"
        )
    return found
