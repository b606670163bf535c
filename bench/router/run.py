"""CPU, latency and memory of the router beside vllm-router and nginx, in the same minutes (`make bench-router`).

Candidates take turns, so that what disturbs the machine disturbs all of them. A figure is the median of its runs; a
ratio is only called better or worse when no run of one candidate overlaps a run of the other.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import measure
import peers
from rich.table import Table
from screen import console


@dataclass
class Figure:
    """One row: what each candidate needed, run by run. Smaller is better unless `more` is true."""

    name: str
    unit: str
    goal: str = ""
    met: bool | None = None
    more: bool = False
    runs: dict[str, list[float]] = field(default_factory=dict)

    def add(self, candidate: str, value: float) -> None:
        """Take one run's value."""
        self.runs.setdefault(candidate, []).append(value)

    def mid(self, candidate: str) -> float:
        """Median of a candidate's runs."""
        return median(self.runs[candidate])

    def ratio(self, one: str, other: str) -> float:
        """Median of one candidate over that of another."""
        return self.mid(one) / self.mid(other)

    def verdict(self, one: str, other: str) -> str:
        """Say how two candidates compare, or that the noise is larger than their difference."""
        ours, theirs = self.runs[one], self.runs[other]
        if max(ours) < min(theirs) or min(ours) > max(theirs):
            better = (max(ours) < min(theirs)) is not self.more
            return f"{self.ratio(one, other):.2f} of {other}, {'better' if better else 'worse'}"
        return f"{self.ratio(one, other):.2f} of {other}, no winner: runs overlap"


OURS, THEIRS, PLAIN = "pd-router", "vllm-router", "nginx"


def _say(text: str) -> None:
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {text}")


def _burst(rounds: int) -> list[Figure]:
    """Whole answers and 64-chunk streams, 64 at once, and latency."""
    whole = Figure("CPU, non-streaming P/D request", "us", "at most 0.33 of vllm-router")
    stream = Figure("CPU, stream of 64 chunks", "us", "at most 0.25 of vllm-router")
    rate = Figure("requests a second on one core, non-streaming", "1/s", more=True)
    one50 = Figure("added latency, 1 at once, p50", "ms", "at most 0.3 ms")
    one99 = Figure("added latency, 1 at once, p99", "ms", "at most 1 ms")
    many50 = Figure("added latency, 64 at once, p50", "ms", "stated")
    many99 = Figure("added latency, 64 at once, p99", "ms", "stated")
    large = Figure("added latency, prompt of 400 KB, p50", "ms", "at most 3 ms")
    small_body, large_body = measure.bodies()
    with peers.engines(64, 0), peers.ours() as ours, peers.vllm_router() as theirs, peers.nginx() as plain:
        for candidate in (ours, theirs, plain):
            measure.requests(candidate, False, 1.0)
        for number in range(rounds):
            _say(f"64 at once, round {number + 1} of {rounds}")
            for candidate in (ours, theirs, plain):
                told = measure.requests(candidate, False)
                whole.add(candidate.label, told["cpu_us"])
                rate.add(candidate.label, told["per_second"])
                stream.add(candidate.label, measure.requests(candidate, True)["cpu_us"])
            for slots, mid, tail in ((1, one50, one99), (64, many50, many99)):
                direct = measure.latency(measure.DIRECT, slots, small_body)
                for candidate in (ours, theirs):
                    told = measure.latency((candidate.port,), slots, small_body)
                    mid.add(candidate.label, (told["p50_us"] - direct["p50_us"]) / 1000)
                    tail.add(candidate.label, (told["p99_us"] - direct["p99_us"]) / 1000)
            direct = measure.latency(measure.DIRECT, 1, large_body)
            for candidate in (ours, theirs):
                told = measure.latency((candidate.port,), 1, large_body)
                large.add(candidate.label, (told["p50_us"] - direct["p50_us"]) / 1000)
    whole.met = whole.ratio(OURS, THEIRS) <= 1 / 3
    stream.met = stream.ratio(OURS, THEIRS) <= 1 / 4
    one50.met, one99.met = one50.mid(OURS) <= 0.3, one99.mid(OURS) <= 1.0
    large.met = large.mid(OURS) <= 3.0
    return [whole, stream, rate, one50, one99, many50, many99, large]


def _live(rounds: int) -> list[Figure]:
    """512 live streams, a token each every 20 ms."""
    token = Figure("CPU, relayed token, 512 live streams", "us", "at most 1.2 of nginx, 0.6 of vllm-router")
    memory = Figure("resident memory, 512 live streams", "MiB", "at most 64 MiB")
    with peers.engines(1000, 20), peers.ours() as ours, peers.vllm_router() as theirs, peers.nginx() as plain:
        for number in range(rounds):
            _say(f"512 live streams, round {number + 1} of {rounds}")
            for candidate in (ours, theirs, plain):
                told = measure.tokens(candidate)
                token.add(candidate.label, told["cpu_us"])
                memory.add(candidate.label, told["mib"])
    token.met = token.ratio(OURS, PLAIN) <= 1.2 and token.ratio(OURS, THEIRS) <= 0.6
    memory.met = memory.mid(OURS) <= 64
    return [token, memory]


def _idle(rounds: int, page: Path) -> list[Figure]:
    """Nothing but health checks and reading the metrics pages of 16 engines."""
    share = Figure("idle, scraping 16 engines", "% of a core", "at most 3 %")
    size = page.stat().st_size
    with peers.engines(1, 0, 8, page), peers.ours("--policy", "least_tokens", count=8) as ours:
        time.sleep(2)
        for number in range(rounds):
            _say(f"idle, pages of {size // 1000} KB, round {number + 1} of {rounds}")
            share.add(OURS, measure.idle(ours))
    share.met = share.mid(OURS) <= 3
    return [share]


def _workers(rounds: int) -> list[Figure]:
    """Two workers against one; they need a core each that nothing else uses."""
    free = (peers.machine().cores or 1) >= 8
    label = "" if free else ", no free second core here"
    rate = Figure(f"requests a second, 2 workers against 1{label}", "1/s", "at least 1.7 times", more=True)
    cores = "0,2" if free else "0,1"
    with ExitStack() as stack:
        stack.enter_context(peers.engines(64, 0))
        one = stack.enter_context(peers.ours(core=cores, label="1 worker"))
        two = stack.enter_context(peers.ours("--workers", "2", port=9311, core=cores, label="2 workers"))
        for number in range(rounds):
            _say(f"workers, round {number + 1} of {rounds}")
            for candidate in (one, two):
                rate.add(candidate.label, measure.requests(candidate, False)["per_second"])
    rate.met = rate.ratio("2 workers", "1 worker") >= 1.7 if free else None
    return [rate]


def _features(rounds: int) -> list[Figure]:
    """What each thing that can be seen from outside costs."""
    cost = Figure("CPU, non-streaming P/D request, by what is switched on", "us")
    variants: dict[str, tuple[str, ...]] = {
        "default": (),
        "no request log": ("--log-level", "warning"),
        "log as JSON": ("--log-format", "json"),
        "routing kept": ("--debug-routing", "256"),
    }
    with peers.engines(64, 0):
        for number in range(rounds):
            _say(f"cost of log and routing record, round {number + 1} of {rounds}")
            for label, flags in variants.items():
                with peers.ours(*flags, label=label) as router:
                    measure.requests(router, False, 1.0)
                    cost.add(label, measure.requests(router, False)["cpu_us"])
    return [cost]


def _table(figures: list[Figure]) -> Table:
    table = Table(title="Router, one core; median (lowest to highest) of each candidate's runs", title_justify="left")
    for column in ("figure", "candidate", "median", "runs", "compared", "goal"):
        table.add_column(column, overflow="fold")
    for figure in figures:
        first = next(iter(figure.runs))
        for candidate, runs in figure.runs.items():
            head = candidate == first
            others = [other for other in figure.runs if other != first]
            verdicts = "\n".join(figure.verdict(first, other) for other in others) if head else ""
            met = {True: " [green]met[/green]", False: " [red]missed[/red]", None: ""}[figure.met]
            table.add_row(
                f"{figure.name} ({figure.unit})" if head else "", candidate, f"{figure.mid(candidate):.3g}",
                f"{min(runs):.3g} to {max(runs):.3g}", verdicts, figure.goal + met if head and figure.goal else "",
            )  # fmt: skip
    return table


def _markdown(figures: list[Figure], machine: peers.Machine, rounds: int) -> str:
    lines = [
        f"Machine: {machine.cpu}, {machine.cores} cores, Linux {machine.kernel}. "
        + ", ".join(f"{name} {version}" for name, version in machine.versions.items())
        + f". {time.strftime('%Y-%m-%d')}, {rounds} runs of each candidate in turn.",
        "",
        "| figure | candidate | median | runs | compared | goal |",
        "|---|---|---|---|---|---|",
    ]
    for figure in figures:
        first = next(iter(figure.runs))
        for candidate, runs in figure.runs.items():
            head = candidate == first
            compared = (
                "; ".join(figure.verdict(first, other) for other in figure.runs if other != first) if head else ""
            )
            met = {True: ": met", False: ": missed", None: ""}[figure.met]
            goal = figure.goal + met if head and figure.goal else ""
            name = f"{figure.name} ({figure.unit})" if head else ""
            lines.append(
                f"| {name} | {candidate} | {figure.mid(candidate):.3g} | {min(runs):.3g} to {max(runs):.3g} "
                f"| {compared} | {goal} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each candidate (default 3)")
    parts: dict[str, Callable[[int], list[Figure]]] = {
        "burst": _burst,
        "live": _live,
        "idle": lambda rounds: _idle(rounds, _page()),
        "workers": _workers,
        "features": _features,
    }
    parser.add_argument("--part", action="append", choices=list(parts), help="only this part; repeat for more")
    parser.add_argument("--out", type=Path, default=peers.BUILD / "router.json", help="where the JSON goes")
    parser.add_argument("--report", type=Path, help="write the table as Markdown between the marks in this file")
    told = parser.parse_args()
    try:
        peers.prepare()
        figures = [figure for name in told.part or parts for figure in parts[name](told.rounds)]
    except (peers.NotPossibleError, measure.FailedError) as error:
        console.print(f"[red]bench-router: {error}[/red]")
        sys.exit(1)
    machine = peers.machine()
    console.print(_table(figures))
    told.out.write_text(
        json.dumps({"machine": asdict(machine), "figures": [asdict(figure) for figure in figures]}, indent=1) + "\n",
        encoding="utf-8",
    )
    console.print(f"written: {told.out}")
    if told.report is not None:
        text = told.report.read_text(encoding="utf-8")
        before, _, rest = text.partition("<!-- measured -->\n")
        _, _, after = rest.partition("<!-- end -->")
        table = _markdown(figures, machine, told.rounds)
        told.report.write_text(f"{before}<!-- measured -->\n{table}<!-- end -->{after}", encoding="utf-8")


def _page() -> Path:
    """Give a metrics page of a real vLLM 0.32 engine."""
    return peers.ROOT / "tests" / "router" / "data" / "vllm_metrics.txt"


if __name__ == "__main__":
    main()
