"""What `pdctl replay` found, as sentences and as a page."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from pdctl.report.chart import Axes, Cell, Chart, changes
from pdctl.report.write import SIMULATED, Report
from pdsim.virtual.figures import SHARES

COMPARED = {"ttft_mean": "mean TTFT", "ttft_p99": "p99 TTFT", "itl_mean": "mean ITL", "goodput": "goodput"}

Row = Mapping[str, Any]


def sentences(told: Mapping[str, Any]) -> list[str]:
    """Say of each setting what its policy would have changed against the baseline."""
    return [_sentence(row, told["baseline"]) for row in told["rows"] if "ratios" in row]


def _sentence(row: Row, baseline: str) -> str:
    said: dict[str, list[str]] = {"cut": [], "raised": []}
    for key, name in COMPARED.items():
        one = row["ratios"].get(key)
        if one is not None:
            change = (one["mean"] - 1) * 100
            said["cut" if change < 0 else "raised"].append(f"{name} by {abs(change):.0f} %{_half(one, 100, 0)}")
    told = " and ".join(f"{verb} {', '.join(parts)}" for verb, parts in said.items() if parts)
    return f"{row['split']} at {row['speed']:g}x: {row['policy']} instead of {baseline} would have {told}"


def _half(one: Mapping[str, float], scale: float, digits: int) -> str:
    return "" if one["half"] != one["half"] else f" (±{one['half'] * scale:.{digits}f})"


def gathered(
    told: Mapping[str, Any],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    facts: Sequence[tuple[str, str]],
    command: Sequence[str],
) -> Report:
    """Gather what the page of a replay shows.

    Args:
        told: what the command prints as JSON.
        columns: headers of its table.
        rows: the cells of its table.
        facts: what was simulated, by name.
        command: what was called.
    """
    slo = told["slo"]
    return Report(
        f"pdctl replay: {told['trace']}",
        SIMULATED + " Time was virtual; policies were the router's own.",
        [
            ("trace", f"{told['trace']}, {told['part'][0]:g} to {told['part'][1]:g} of its time"),
            ("seeds", f"{told['seeds']}; ± and lines are 95 % intervals over them"),
            ("baseline", told["baseline"]),
            ("good", f"first token within {slo['ttft']:g} s, {slo['itl'] * 1e3:g} ms between tokens"),
            *facts,
        ],
        [*columns],
        [[*row] for row in rows],
        [],
        [] if told["seeds"] > 1 else ["one seed: nobody knows how far other arrivals would be off"],
        [chart for chart in _charts(told) if chart is not None],
        shlex.join(command),
        sentences(told),
    )


def _titles(rows: Sequence[Row]) -> list[str]:
    """Give each row a name that tells it from the others, and no more."""
    several = {key for key in ("split", "speed") if len({row[key] for row in rows}) > 1}
    found = []
    for row in rows:
        where = [f"{row['split']}"] * ("split" in several) + [f"{row['speed']:g}x"] * ("speed" in several)
        found.append(", ".join([row["policy"], *where]))
    return found


def _charts(told: Mapping[str, Any]) -> list[Chart | None]:
    rows: list[Row] = told["rows"]
    titles = _titles(rows)
    compared = [(title, row) for title, row in zip(titles, rows, strict=True) if "ratios" in row]
    return [
        *(_changes(key, name, told["baseline"], compared) for key, name in COMPARED.items()),
        _distribution(titles, rows),
        *(_by_load(key, name, rows) for key, name in (("ttft_p99", "p99 TTFT"), ("itl_mean", "Mean ITL"))),
    ]


def _changes(key: str, name: str, baseline: str, compared: Sequence[tuple[str, Row]]) -> Chart | None:
    found = [(title, row["ratios"][key]) for title, row in compared if key in row["ratios"]]
    if not found:
        return None
    better = "to the right" if key == "goodput" else "to the left"
    dots = []
    for title, one in found:
        known = one["half"] == one["half"]
        low, high = (one["mean"] - one["half"] - 1, one["mean"] + one["half"] - 1) if known else (None, None)
        dots.append((title, one["mean"] - 1, low, high))
    return changes(
        f"changes-{key}", f"{name[0].upper()}{name[1:]} against {baseline}",
        f"A dot is the change of the mean over seeds, the line its 95 % interval; {better} is better.", dots,
        ["policy", "change %", "± %"],
        [[title, round((one["mean"] - 1) * 100, 1), _half(one, 100, 1).strip(" (±)")] for title, one in found],
    )  # fmt: skip


def _distribution(titles: Sequence[str], rows: Sequence[Row]) -> Chart:
    axes = Axes("ms (logarithmic)", "% at or below", log_x=True)
    shown: list[list[Cell]] = []
    for title, row in zip(titles, rows, strict=True):
        values = [row["figures"][f"ttft_p{share:g}"]["mean"] * 1e3 for share in SHARES]
        axes.line(title, list(zip(values, SHARES, strict=True)))
        shown.append([title, *(round(value, 1) for value in values)])
    return Chart(
        "ttft", "Time to first token: distribution",
        "Each share is the mean of the seeds'. The further left and the steeper, the better.", axes.option(),
        ["", *(f"p{share:g} ms" for share in SHARES)], shown,
    )  # fmt: skip


def _by_load(key: str, name: str, rows: Sequence[Row]) -> Chart | None:
    """Draw a figure by load, a line for each policy and split, where there are several loads."""
    loads = sorted({row["speed"] for row in rows})
    if len(loads) < 2:
        return None
    lines: dict[str, list[tuple[float, float]]] = {}
    splits = {row["split"] for row in rows}
    for row in sorted(rows, key=lambda one: float(one["speed"])):
        title = row["policy"] if len(splits) == 1 else f"{row['policy']}, {row['split']}"
        lines.setdefault(title, []).append((row["speed"], row["figures"][key]["mean"] * 1e3))
    log = key.startswith("ttft")
    axes = Axes("times the trace's load", "ms (logarithmic)" if log else "ms", log_y=log)
    for title, points in lines.items():
        axes.line(title, points)
    return Chart(
        f"load-{key}", f"{name} by load", "A line that bends upwards is a fleet that fills up.", axes.option(),
        ["", *(f"{load:g}x, ms" for load in loads)],
        [[title, *(round(value, 2) for _, value in points)] for title, points in lines.items()],
    )  # fmt: skip
