"""Writes the tables of docs/policies.md: `make policies TRACE=conversation_trace.jsonl`.

What was computed is kept in .build/policies.json, so that a run that was broken off goes on; `--fresh` forgets it.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from pdrouter.policies import POLICIES
from pdsim.virtual.figures import Interval, over_seeds, ratio
from pdsim.virtual.fleet import Setup
from pdsim.virtual.judge import Case, Source, run
from pdsim.virtual.synthetic import SHAPES, Shape

SEEDS = 5
SPEEDS = (6.0, 4.0, 1.0, 8.0)
BASELINE, OURS = "llmd_pd_guide", "pd_cost"
KEPT = Path(".build/policies.json")
PAGE = Path("docs/policies.md")
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
SESSIONS = ("consistent_hash", "sticky_least_loaded")
PARTS = {"tuning": (0.0, 0.5), "test": (0.5, 1.0)}
LOADS = (20.0, 60.0)

Runs = list[dict[str, float]]


class Book:
    """Figures by case, on disk."""

    def __init__(self, fresh: bool) -> None:
        KEPT.parent.mkdir(exist_ok=True)
        self._figures: dict[str, dict[str, float]] = {}
        if KEPT.exists() and not fresh:
            self._figures = json.loads(KEPT.read_text())

    def runs(self, setup: Setup, source: Source, compute: bool) -> Runs | None:
        """Give all seeds' figures, computed where they are missing and that is wanted."""
        found = []
        for seed in range(SEEDS):
            case = Case(setup, source, seed)
            key = repr(case)
            if key not in self._figures:
                if not compute:
                    return None
                self._figures[key] = run(case)
                written = KEPT.with_suffix(".new")
                written.write_text(json.dumps(self._figures))
                written.replace(KEPT)  # whole or not at all: whoever breaks the run off loses one case
                print(f"{len(self._figures)}: {setup.prefill_policy} {setup.speed:g}x {source.name} {seed}", flush=True)
            found.append(self._figures[key])
        return found


def cell(runs: Runs, name: str, scale: float, digits: int) -> str:
    """Write a figure with its interval."""
    one = over_seeds(runs)[name]
    return f"{one.mean * scale:.{digits}f} ±{one.half * scale:.{digits}f}"


def compared(one: Interval) -> str:
    """Write a ratio with its interval."""
    return f"{one.mean:.3f} ±{one.half:.3f}"


COLUMNS = (
    ("TTFT mean s", "ttft_mean", 1, 3),
    ("p50 s", "ttft_p50", 1, 3),
    ("p99 s", "ttft_p99", 1, 2),
    ("ITL mean ms", "itl_mean", 1e3, 2),
    ("p99 ms", "itl_p99", 1e3, 2),
    ("good/s", "goodput", 1, 2),
    ("hit %", "hit_share", 100, 1),
    ("moved TB", "moved_bytes", 1e-12, 2),
)


def policies(book: Book, trace: str, compute: bool) -> Iterator[str]:
    """Write a table for each speed."""
    rows = [(name, name, False) for name in sorted(POLICIES)]
    rows += [(f"{name}, by session", name, True) for name in SESSIONS]
    for speed in SPEEDS if compute else sorted(SPEEDS):
        found = {}
        for title, name, sessions in rows:
            source = Source(trace, sessions=sessions)
            runs = book.runs(Setup(prefill_policy=name, speed=speed), source, compute)
            if runs is not None:
                found[title] = runs
        if not found:
            continue
        yield f"\n### {speed:g}x\n"
        yield f"| policy | {' | '.join(title for title, *_ in COLUMNS)} |"
        yield "|---" * (len(COLUMNS) + 1) + "|"
        for title, runs in sorted(found.items(), key=lambda one: over_seeds(one[1])["ttft_mean"].mean):
            shown = f"**{title}**" if title in (OURS, BASELINE) else title
            yield f"| {shown} | {' | '.join(cell(runs, *column) for _, *column in COLUMNS)} |"


NAMES = ("ttft_mean", "ttft_p99", "itl_mean", "itl_p99", "goodput")
RATIOS = "| TTFT mean | p99 | ITL mean | p99 | goodput |"


def ratios(book: Book, setup: Setup, baseline: Setup, source: Source, compute: bool) -> str | None:
    """Write the ratios of two policies' figures."""
    ours, theirs = book.runs(setup, source, compute), book.runs(baseline, source, compute)
    if ours is None or theirs is None:
        return None
    return " | ".join(compared(ratio(ours, theirs, name)) for name in NAMES)


def halves(book: Book, trace: str, compute: bool) -> Iterator[str]:
    """Write how ours compares on the tuning and on the test part."""
    yield f"\n| part | speed {RATIOS}"
    yield "|---" * 7 + "|"
    for part, share in PARTS.items():
        for speed in sorted(SPEEDS):
            ours, theirs = (Setup(prefill_policy=name, speed=speed) for name in (OURS, BASELINE))
            told = ratios(book, ours, theirs, Source(trace, share), compute)
            if told is not None:
                yield f"| {part} | {speed:g}x | {told} |"


def shapes(book: Book, compute: bool) -> Iterator[str]:
    """Write how ours compares on made-up traffic."""
    yield f"\n| shape | requests/s {RATIOS}"
    yield "|---" * 7 + "|"
    for name in SHAPES:
        for load in LOADS:
            source = Source(f"synthetic:{name}", shape=Shape(requests=3000, rate=load))
            told = ratios(book, Setup(prefill_policy=OURS), Setup(prefill_policy=BASELINE), source, compute)
            if told is not None:
                yield f"| {name} | {load:g} | {told} |"


def main() -> int:
    """Compute and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", help="Mooncake's conversation_trace.jsonl")
    parser.add_argument("--fresh", action="store_true", help="compute everything again")
    parser.add_argument("--write-only", action="store_true", help="write what was computed before")
    options = parser.parse_args()
    book, compute = Book(options.fresh), not options.write_only
    digest = sha256(Path(options.trace).read_bytes()).hexdigest()[:12]
    lines = [
        f"pd-router {version('pd-router')}, pd-simulator {version('pd-simulator')}, "
        f"seeds 0 to {SEEDS - 1}, 8 + 8 engines, "
        f"timing profile h200, prompts as token ids, trace with sha256 {digest}….",
        f"\n## Ratios to {BASELINE}\n",
        "Below 1 is better, for goodput above 1.",
    ]
    if compute:
        for speed in SPEEDS[:1]:
            list(halves(book, options.trace, True))
            print(f"then all policies, beginning at {speed:g}x", flush=True)
        list(shapes(book, True))
        list(policies(book, options.trace, True))
    lines += [*halves(book, options.trace, False), *shapes(book, False)]
    lines += ["\n## All policies on the conversation trace", *policies(book, options.trace, False)]
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
