"""Writes what `run.py` measured as Markdown, with what the simulated pair does at the same points beside it.

`--simulate` runs those points on a simulated pair first (5 minutes) and keeps them in the file of `--simulated`.
`--report FILE` puts the text between `<!-- gpu: NAME -->` and `<!-- end gpu: NAME -->` of a file, or at its end; else
it is printed. Exit status 1 when a file cannot be read.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from plan import DIRECT, OURS, PLAIN, THEIRS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
PREDICTED = {  # figures that the simulated pair predicts: key, name, goal for the error
    "output_throughput": "tok/s", "median_ttft_ms": "TTFT p50", "p99_ttft_ms": "TTFT p99", "median_itl_ms": "ITL p50",
}  # fmt: skip
GOAL = 0.10
Points = list[dict[str, Any]]


def simulate(points: Points, into: Path) -> None:
    """Run the points of the default router on a fresh simulated pair each."""
    from h200_pair import run  # noqa: PLC0415 -- needs the project's own Python, all else here does not

    wished = sorted({(point["concurrency"], point["prompts"]) for point in points if point["router"] == OURS})
    found: dict[str, Any] = {"simulated": True, "points": []}
    with tempfile.TemporaryDirectory() as folder:
        for concurrency, prompts in wished:
            told = run(concurrency, Path(folder), prompts)
            kept = {key: told[key] for key in PREDICTED}
            found["points"].append({"concurrency": concurrency, "prompts": prompts} | kept)
            print(f"simulated c={concurrency}: {kept}", file=sys.stderr, flush=True)
    into.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _runs(points: Points, router: str, concurrency: int) -> Points:
    return [point for point in points if (point["router"], point["concurrency"]) == (router, concurrency)]


def _span(values: Sequence[float], form: str) -> str:
    """Show runs: one figure, or the lowest and the highest."""
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"


def _column(runs: Points, key: str, form: str) -> str:
    values = [float(run[key]) for run in runs if run.get(key) is not None]
    return _span(values, form) if values else "–"


def _cost(runs: Points) -> list[float]:
    return [run["router_cpu_s"] / run["prompts"] * 1e3 for run in runs if "router_cpu_s" in run]


def _transfer(runs: Points) -> str:
    moved = sum(run["decode"].get("transfers", 0) for run in runs)
    seconds = sum(run["decode"].get("transfer_s", 0) for run in runs)
    size = sum(run["decode"].get("bytes", 0) for run in runs)
    return f"{seconds / moved * 1e3:.1f} ms, {size / moved / 1e6:.0f} MB" if moved else "none"


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _row(router: str, concurrency: int, runs: Points) -> str:
    cost = _cost(runs)
    return _line(
        concurrency,
        router,
        _column(runs, "output_throughput", ".0f"),
        _column(runs, "median_ttft_ms", ".1f"),
        _column(runs, "p99_ttft_ms", ".0f"),
        _column(runs, "mean_tpot_ms", ".2f"),
        _column(runs, "median_itl_ms", ".2f"),
        _span(cost, ".2f") if cost else "–",
        _column(runs, "router_rss_mib", ".0f"),
        _transfer(runs),
        sum(run["failed"] for run in runs),
    )


def _table(points: Points, routers: Iterable[str]) -> Iterator[str]:
    yield (
        "| at once | router | output tok/s | TTFT p50 ms | TTFT p99 ms | TPOT mean ms | ITL p50 ms"
        " | router CPU ms/request | router RSS MiB | KV transfer, mean | failed |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for concurrency in sorted({point["concurrency"] for point in points}):
        for router in routers:
            runs = _runs(points, router, concurrency)
            if runs:
                yield _row(router, concurrency, runs)


def _compared(ours: Points, theirs: Points, key: str, more: bool) -> str:
    """Say how two routers compare; runs that overlap have no winner."""
    one, other = ([float(run[key]) for run in runs] for runs in (ours, theirs))
    ratio = f"{mean(one) / mean(other):.2f}"
    if len(one) < 2 or len(other) < 2:
        return f"{ratio}, one run"
    if max(one) < min(other) or min(one) > max(other):
        return f"{ratio}, {'better' if (min(one) > max(other)) is more else 'worse'}"
    return f"{ratio}, no winner: runs overlap"


def _verdicts(points: Points) -> Iterator[str]:
    yield "| at once | throughput, ours over vllm-router's | TTFT p50 | TTFT p99 | router CPU (goal: at most 0.33) |"
    yield "|---|---|---|---|---|"
    for concurrency in sorted({point["concurrency"] for point in points}):
        ours, theirs = (_runs(points, router, concurrency) for router in (OURS, THEIRS))
        if ours and theirs:
            cpu = mean(_cost(ours)) / mean(_cost(theirs)) if mean(_cost(theirs)) else float("nan")
            yield _line(
                concurrency,
                _compared(ours, theirs, "output_throughput", True),
                _compared(ours, theirs, "median_ttft_ms", False),
                _compared(ours, theirs, "p99_ttft_ms", False),
                f"{cpu:.2f}, {'met' if cpu <= 1 / 3 else 'missed'}",
            )


def _fidelity(points: Points, simulated: Points) -> Iterator[str]:
    """Each figure of the simulated pair beside the real runs; the error is the distance to the mean of the runs."""
    yield "| at once | figure | real, through our router | simulated | error |"
    yield "|---|---|---|---|---|"
    within = total = 0
    for one in simulated:
        runs = _runs(points, OURS, one["concurrency"])
        for key, name in PREDICTED.items():
            if not runs:
                continue
            real = [float(run[key]) for run in runs]
            error = one[key] / mean(real) - 1
            within, total = within + (abs(error) <= GOAL), total + 1
            yield f"| {one['concurrency']} | {name} | {_span(real, '.5g')} | {one[key]:.5g} | {error:+.1%} |"
    yield ""
    yield f"{within} of {total} figures are within {GOAL:.0%}."


def _texts(told: dict[str, Any]) -> Iterator[str]:
    for name, found in told.items():
        if name == "by hand":
            yield (
                f"- Tickets handed over by hand: {found['right_ticket_equal']} of {found['asked']} answers equal to "
                "the decode engine's own to the bit; with another prompt's ticket "
                f"{found['foreign_ticket_equal']} of {found['asked']}."
            )
            continue
        for kind, one in found.items():
            if "refused" in one:
                yield f"- {name}, {kind}: {one['refused']}"
                continue
            line = f"- {name}, {kind}: {one['texts_equal']} of {one['asked']} texts equal, {one['begin_equal']} begin "
            line += f"alike, {one['and_logprobs_equal']} with their log-probabilities"
            if "moved" in one:
                line += f"; {one['moved'].get('bytes', 0):.0f} bytes moved, {one['bytes_expected']} expected"
            yield line + "."


def _left(name: str, found: dict[str, Any]) -> str:
    moments = found["moments"]
    free = [row["free_after_s"] for row in moments if row.get("free_after_s") is not None]
    each = f"prefill's KV blocks were free after {_span(free, '.3f')} s; " if free else ""
    return (
        f"- {name}: {len(moments)} clients left {moments[0]['left_after_ms']:.0f} to "
        f"{moments[-1]['left_after_ms']:.0f} ms after asking ({found['tokens']} tokens, prefill "
        f"{found['prefill_ms']} ms, TTFT {found['ttft_ms']} ms); {each}"
        f"prompts still held 1 s after the last: {found['prompts_held_after_1_s']}; "
        f"all free after {found['all_free_after_s']} s; decode generated {found['generated_for_nobody']:.0f} tokens "
        "for nobody."
    )


def _killed(name: str, found: dict[str, Any]) -> str:
    cut = [row for row in found["streams"] if row["was_cut"]]
    errors = [row["error"] for row in found["streams"] if row["error"]]
    gap = max((row["longest_gap_ms"] for row in cut), default=0)
    by_hand = sum(row.get("rest_equal_by_hand", False) for row in cut)
    return (
        f"- {name}: {found['complete']} of {len(found['streams'])} streams complete, {found['continued']:.0f} "
        f"went on elsewhere; of {len(cut)} that were cut, {by_hand} went on "
        f"as by hand, longest gap {gap} ms; errors: {errors or 'none'}."
    )


def _drills(told: dict[str, Any]) -> Iterator[str]:
    for name, found in told.items():
        yield _left(name, found) if "moments" in found else _killed(name, found)


def markdown(told: dict[str, Any], simulated: Points) -> str:
    """Give the whole section."""
    points = list(told["points"].values())
    sources = told["provenance"]
    source = sources.get("bench") or next(iter(sources.values()))
    versions = {"vllm": source.get("engine_version")} | source["versions"]
    lines = [
        f"Engines: {source['engines_are']}. "
        f"{len(source['gpus'])} GPU: {'; '.join(sorted(set(source['gpus']))) or 'none'}. "
        f"{source['cpu']}, {source['cores']} cores, Linux {source['kernel']}. "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f". {source['date']}. {source['note']}".rstrip(),
        "",
        "`vllm bench serve`, 1000 tokens in, 200 out, routers in turn, one at a time; runs as lowest–highest. "
        + f"Prompts: {_prompts(points)}. Ours is {_build(points)}.",
        "",
        *_table(points, (OURS, THEIRS)),
        "",
        *_verdicts(points),
    ]
    rest = [name for name in sorted({point["router"] for point in points}) if name not in (OURS, THEIRS)]
    if rest:
        lines += [
            "",
            _other(rest),
            "",
            *_table(points, (OURS, *rest)),
        ]
    if simulated:
        lines += ["", "**Simulated** figures of the same points, one prefill and one decode engine:", ""]
        lines += _fidelity(points, simulated)
    if told.get("texts"):
        lines += ["", f"Texts at temperature 0. {sources['texts']['note']}".rstrip(), "", *_texts(told["texts"])]
    if told.get("drills"):
        notes = dict.fromkeys(sources[name]["note"] for name in ("leave", "kill") if name in sources)
        lines += ["", f"Drills. {' '.join(notes)}".rstrip(), "", *_drills(told["drills"])]
    if told["failures"]:
        lines += ["", "Could not be measured:", ""]
        lines += [f"- {one['what']}: {one['why'].splitlines()[0]}" for one in told["failures"]]
    return "\n".join(lines) + "\n"


def _other(routers: Sequence[str]) -> str:
    meanings = {DIRECT: "the decode engine alone, no router", PLAIN: "a plain proxy before it"}
    told = "; ".join(f"{name}: {meaning}" for name, meaning in meanings.items() if name in routers)
    return f"Other ways ({told}):" if told else "Other ways:"


def _prompts(points: Points) -> str:
    counts = {point["concurrency"]: point["prompts"] for point in points}
    usual = max(counts.values(), default=0)
    other = [f"{prompts} at {concurrency}" for concurrency, prompts in sorted(counts.items()) if prompts != usual]
    return ", ".join([str(usual), *other])


def _build(points: Points) -> str:
    return "compiled" if all(point["compiled"] for point in points if "compiled" in point) else "plain Python"


def main() -> int:
    """Read, simulate if wished, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="file that run.py wrote")
    parser.add_argument("--simulated", type=Path, help="file with the simulated pair's figures")
    parser.add_argument("--simulate", action="store_true", help="measure the simulated pair into that file first")
    parser.add_argument("--report", type=Path, help="file that gets the section")
    parser.add_argument("--name", default="pair", help="name of the section (%(default)s)")
    told = parser.parse_args()
    if told.simulate and told.simulated is None:
        parser.error("--simulate needs --simulated FILE")
    try:
        results = json.loads(told.results.read_text(encoding="utf-8"))
        if told.simulate:
            simulate(list(results["points"].values()), told.simulated)
        simulated = json.loads(told.simulated.read_text(encoding="utf-8"))["points"] if told.simulated else []
        text = markdown(results, simulated)
        if told.report is None:
            print(text, end="")
            return 0
        page = told.report.read_text(encoding="utf-8")
    except (OSError, json.JSONDecodeError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 1
    begin, end = f"<!-- gpu: {told.name} -->\n", f"<!-- end gpu: {told.name} -->"
    if begin not in page:
        page = f"{page.rstrip()}\n\n{begin}{end}\n"
    before, _, rest = page.partition(begin)
    told.report.write_text(before + begin + text + end + rest.partition(end)[2], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
