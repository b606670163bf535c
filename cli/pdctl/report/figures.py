"""Which charts a run has: pure functions from what was measured to charts."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from pdctl.bench.client import Record
from pdctl.bench.repeats import HEADLINES, headlines
from pdctl.compare.difference import Difference
from pdctl.compare.told import Comparison, cost
from pdctl.report import chart
from pdctl.report.chart import GRID, Axes, Cell, Chart, heat, quantiles
from pdctl.runs.run import Run

SHARES = (50, 90, 95, 99, 99.9)


def title_of(run: Run) -> str:
    """Give what charts call a run."""
    return str(run.about.get("title") or run.about.get("label") or run.name)


def charts(runs: Sequence[Run], told: Comparison | None) -> list[Chart]:
    """Give the charts of runs with the same load, side by side."""
    records = {title_of(run): [record for record in run.records() if record.ok] for run in runs}
    found = (
        []
        if told is None
        else [changes(told.runs[0], run, one) for run, one in zip(told.runs[1:], told.others, strict=True)]
    )
    found += [
        distribution("ttft", "Time to first token", records, lambda record: [record.ttft * 1e3]),
        distribution("itl", "Inter-token latency", records, lambda record: [gap * 1e3 for gap in record.itls]),
        over_time(records),
        throughput(runs),
    ]
    found += [chart for chart in (router_cost(runs), *queues(runs)) if chart is not None]
    found += [chart for run in runs if (chart := pairs(run)) is not None]
    if (broken := failures(runs)) is not None:
        found.append(broken)
    return found


def distribution(name: str, title: str, records: dict[str, list[Record]], values: Any) -> Chart:
    """Draw how many requests (tokens) took at most so long."""
    axes = Axes("ms (logarithmic)", "% at or below", log_x=True)
    rows: list[list[Cell]] = []
    for run, some in records.items():
        all_values = [value for record in some for value in values(record) if value > 0]
        axes.line(run, quantiles(all_values), showSymbol=False)
        shown = np.percentile(all_values, SHARES) if all_values else [0.0] * len(SHARES)
        rows.append([run, len(all_values), *(round(float(value), 2) for value in shown)])
    return Chart(
        name, f"{title}: distribution", "The further left and the steeper, the better; the top right end is the tail.",
        axes.option(), ["run", "measured", *(f"p{share:g} ms" for share in SHARES)], rows,
    )  # fmt: skip


def over_time(records: dict[str, list[Record]]) -> Chart:
    """Draw each request's first-token time by when it was sent."""
    axes = Axes("seconds since the beginning", "TTFT, ms")
    rows: list[list[Cell]] = []
    for run, some in records.items():
        ordered = sorted(some, key=lambda record: record.start)
        axes.dots(run, [[record.start, record.ttft * 1e3] for record in ordered])
        for part, quarter in enumerate(np.array_split(np.array([record.ttft for record in ordered]), 4)):
            rows.append(
                [run, f"{part + 1}. quarter", round(float(np.median(quarter)) * 1e3, 2) if len(quarter) else None]
            )
    return Chart(
        "over-time", "Time to first token over time", "A dot a request; a cloud that climbs means a queue that grows.",
        axes.option(), ["run", "requests", "median TTFT ms"], rows,
    )  # fmt: skip


def throughput(runs: Sequence[Run]) -> Chart:
    """Draw the tokens of every second of each run's first repeat."""
    axes = Axes("seconds since the beginning", "output tok/s")
    rows: list[list[Cell]] = []
    for run in runs:
        records = [record for record in run.records(0) if record.ok]
        times = [record.start + record.ttft + np.concatenate(([0.0], np.cumsum(record.itls))) for record in records]
        counts = np.bincount(np.concatenate(times).astype(int)) if times else np.zeros(1)
        axes.line(title_of(run), [[float(second), float(count)] for second, count in enumerate(counts)])
        rows.append([title_of(run), float(counts.max()), round(float(counts.mean()), 1), len(counts)])
    return Chart(
        "throughput", "Output tokens of every second", "The first repeat of each run.", axes.option(),
        ["run", "highest tok/s", "mean tok/s", "seconds"], rows,
    )  # fmt: skip


def changes(base: Run, other: Run, found: Sequence[Difference]) -> Chart:
    """Draw each metric's change from one run to another with its interval."""
    rows: list[list[Cell]] = [
        [HEADLINES[one.metric], round(one.base, 2), round(one.other, 2), one.told(), one.verdict] for one in found
    ]
    return chart.changes(
        f"changes-{other.name}", f"Change: {title_of(other)} instead of {title_of(base)}",
        "A dot is the change of the mean, the line its 95 % interval: one that touches 0 is within noise. "
        "More is better for throughput, less for times.",
        [(HEADLINES[one.metric], one.change, one.low, one.high) for one in found],
        ["metric", title_of(base), title_of(other), "change (95 %)", "verdict"], rows,
    )  # fmt: skip


def router_cost(runs: Sequence[Run]) -> Chart | None:
    """Draw what the router itself used of a processor, by kind of process."""
    costs = [(title_of(run), found) for run in runs if (found := cost(run)) is not None]
    if not costs:
        return None
    kinds = list(dict.fromkeys(kind for _, one in costs for kind in one.cpu_ms))
    option = {
        "legend": {"top": 0},
        "tooltip": {"trigger": "item"},
        "grid": GRID,
        "xAxis": {"type": "value", "name": "CPU, ms a request", "nameLocation": "middle", "nameGap": 28},
        "yAxis": {"type": "category", "data": [title for title, _ in reversed(costs)]},
        "series": [
            {
                "type": "bar", "name": kind, "stack": "cpu", "barMaxWidth": 28,
                "data": [round(one.cpu_ms[kind], 3) if kind in one.cpu_ms else None for _, one in reversed(costs)],
            }
            for kind in kinds
        ],
    }  # fmt: skip
    rows: list[list[Cell]] = [
        [title, one.cpu_text(), round(one.cpu_us_a_token, 2), round(one.resident_mb, 1), one.version]
        for title, one in costs
    ]
    return Chart(
        "router-cost", "Processor time of the router itself",
        "Measured, not simulated: of all the router's processes, over the measured requests. Of llm-d: Envoy, the "
        "endpoint picker and every sidecar, what they do between requests included.",
        option, ["run", "CPU ms a request", "µs a token", "resident MB", "version"], rows, 130 + 44 * len(rows),
    )  # fmt: skip


def queues(runs: Sequence[Run]) -> list[Chart | None]:
    """Draw requests that wait in engines, and pinned KV blocks, of each run's first repeat."""
    waiting, pinned = Axes("seconds since the beginning", "requests"), Axes("seconds since the beginning", "blocks")
    rows: tuple[list[list[Cell]], list[list[Cell]]] = ([], [])
    for run in runs:
        lines = [line for line in run.lines("watch.jsonl") if line["repeat"] == 0 and line["engines"]]
        sums: dict[str, list[list[float]]] = defaultdict(list)
        for line in lines:
            for role in ("prefill", "decode"):
                of_role = [told for name, told in line["engines"].items() if name.startswith(role)]
                sums[f"waiting {role}"].append([line["at"], sum(told["waiting"] for told in of_role)])
                sums[f"pinned {role}"].append([line["at"], sum(told["pinned"] for told in of_role)])
        for key, points in sums.items():
            what, role = key.split()
            axes, into = (waiting, rows[0]) if what == "waiting" else (pinned, rows[1])
            if role == "decode" and what == "pinned":
                continue  # decode engines pin nothing for others
            axes.line(f"{title_of(run)}: {role}", points, showSymbol=False)
            values = [value for _, value in points]
            into.append([title_of(run), role, max(values), round(float(np.mean(values)), 2)])
    if not rows[0]:
        return []
    return [
        Chart("waiting", "Requests that wait in the engines", "Sum over the engines of a role, once a second.",
              waiting.option(), ["run", "role", "highest", "mean"], rows[0]),
        Chart("pinned", "KV blocks pinned for decode",
              "Blocks of prefill engines whose prompt is done and whose KV nobody has fetched yet.",
              pinned.option(), ["run", "role", "highest", "mean"], rows[1]),
    ]  # fmt: skip


def pairs(run: Run) -> Chart | None:
    """Draw who handed KV to whom, all repeats together."""
    cells: Counter[tuple[str, str]] = Counter()
    for told in run.results():
        for one in told["pdctl"].get("transfers", ()):
            cells[one["prefill"], one["decode"]] += one["transfers"]
    if not cells:
        return None
    return heat(
        f"pairs-{run.name}", f"KV handoffs by pair: {title_of(run)}",
        "Prefill engines down, decode engines across; all repeats together, warm-up included.", dict(cells),
        "handoffs",
    )  # fmt: skip


def failures(runs: Sequence[Run]) -> Chart | None:
    """Draw why requests failed; nothing when none did."""
    rows: list[list[Cell]] = []
    for run in runs:
        errors: Counter[str] = Counter()
        for told in run.results():
            errors.update(told["pdctl"].get("errors", {}))
        rows += [[title_of(run), reason[:160], count] for reason, count in errors.most_common(10)]
    if not rows:
        return None
    option = {
        "tooltip": {"trigger": "item"},
        "grid": GRID,
        "xAxis": {"type": "value", "name": "requests", "nameLocation": "middle", "nameGap": 28},
        "yAxis": {"type": "category", "data": [f"{number + 1}" for number in reversed(range(len(rows)))]},
        "series": [{"type": "bar", "barMaxWidth": 24, "data": [row[2] for row in reversed(rows)]}],
    }
    return Chart(
        "failures", "Failed requests by reason", "Numbered as in the table below.", option,
        ["run", "reason", "requests"], rows, 120 + 34 * len(rows),
    )  # fmt: skip


def sweep(run: Run) -> list[Chart]:
    """Give the charts over a sweep's points."""
    curve = Axes("output tok/s", "median TTFT, ms")
    pareto = Axes("tok/s a user", "output tok/s a GPU")
    good = Axes(run.about["over"], "requests a second within the objectives, a GPU")
    rows: list[list[Cell]] = []
    groups: dict[str, list[tuple[float, Run]]] = defaultdict(list)
    for point in run.points:
        groups[point.about["setting"]].append((float(point.about["at"]), point))
    for setting, points in groups.items():
        lines: tuple[list[list[float]], list[list[float]], list[list[float]]] = ([], [], [])
        for at, point in sorted(points, key=lambda one: one[0]):
            told = point.whole_results()
            if not told:
                continue
            figures = headlines(told)
            speed, ttft = figures["output_throughput"].mean, figures["median_ttft_ms"].mean
            gpus, tpot = point.about["fleet"]["gpus"] or 1, figures["median_tpot_ms"].mean
            per_user = 1000 / tpot if tpot else 0.0
            lines[0].append([speed, ttft])
            lines[1].append([per_user, speed / gpus])
            goodput = figures.get("request_goodput")
            if goodput is not None:
                lines[2].append([at, goodput.mean / gpus])
            rows.append([
                setting, at, round(speed, 1), round(ttft, 2), round(per_user, 2), round(speed / gpus, 2),
                None if goodput is None else round(goodput.mean / gpus, 4), len(told),
            ])  # fmt: skip
        curve.line(setting, lines[0], showSymbol=True)
        pareto.line(setting, lines[1], showSymbol=True)
        if lines[2]:
            good.line(setting, lines[2], showSymbol=True)
    columns = [
        "setting",
        run.about["over"],
        "tok/s",
        "TTFT p50 ms",
        "tok/s a user",
        "tok/s a GPU",
        "goodput a GPU",
        "repeats",
    ]
    found = [
        Chart("curve", "Throughput and latency", "Each dot is a point of the sweep; right and down is better.",
              curve.option(), columns, rows),
        Chart("pareto", "Speed of one user against use of a GPU",
              "tok/s a user is one over the median TPOT; the upper right edge is what can be had.",
              pareto.option(), columns, rows),
    ]  # fmt: skip
    if good.series:
        found.append(Chart("goodput", "Goodput a GPU", "Requests a second that met every objective.",
                           good.option(), columns, rows))  # fmt: skip
    return found


def scores(run: Run) -> list[Chart]:
    """Give the charts of an evaluation."""
    from pdctl.evals.scores import Score, scores_of  # noqa: PLC0415 evaluations only

    found: list[Score] = scores_of(run)
    rows: list[list[Cell]] = [
        [one.task, one.metric, one.filter, round(one.value, 4), None if one.stderr is None else round(one.stderr, 4),
         one.samples] for one in found
    ]  # fmt: skip
    if not rows:
        return []
    names = [f"{one.task} {one.metric}" for one in reversed(found)]
    option = {
        "tooltip": {"trigger": "item"},
        "grid": GRID,
        "xAxis": {"type": "value", "min": 0, "max": 1, "name": "score", "nameLocation": "middle", "nameGap": 28},
        "yAxis": {"type": "category", "data": names},
        "series": [{"type": "bar", "barMaxWidth": 24, "data": [round(one.value, 4) for one in reversed(found)]}],
    }
    return [Chart(
        "scores", "Scores by task", "The table has their standard errors and numbers of samples.", option,
        ["task", "metric", "filter", "score", "stderr", "samples"], rows, 120 + 34 * len(rows),
    )]  # fmt: skip
