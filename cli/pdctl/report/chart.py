"""A chart as a value: what ECharts draws, and the same numbers as a table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Cell = str | int | float | None
MOST_POINTS = 1500


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart.

    Args:
        name: its id in the page.
        title: what it shows.
        text: how to read it, one sentence.
        option: ECharts' option, without colours and fonts: those are the page's.
        columns: headers of the table with its numbers.
        rows: the table.
        height: pixels.
    """

    name: str
    title: str
    text: str
    option: dict[str, Any]
    columns: list[str]
    rows: list[list[Cell]]
    height: int = 320


@dataclass(slots=True)
class Axes:
    """Two axes and the series between them."""

    x: str
    y: str
    log_x: bool = False
    log_y: bool = False
    series: list[dict[str, Any]] = field(default_factory=list)

    def line(self, name: str, points: Sequence[Sequence[float]], **more: Any) -> None:
        """Add a line."""
        self.series.append({"type": "line", "name": name, "showSymbol": len(points) < 20, "data": _kept(points)} | more)

    def dots(self, name: str, points: Sequence[Sequence[float]]) -> None:
        """Add dots."""
        self.series.append({"type": "scatter", "name": name, "symbolSize": 4, "data": _kept(points)})

    def option(self) -> dict[str, Any]:
        """Give ECharts' option."""
        begins = {"min": 0} if self.x.startswith("seconds") else {}
        return {
            "legend": {"top": 0},
            "tooltip": {"trigger": "item"},
            "grid": GRID,
            "xAxis": _axis(self.x, self.log_x) | {"nameLocation": "middle", "nameGap": 28} | begins,
            "yAxis": _axis(self.y, self.log_y),
            "series": self.series,
        }


GRID = {"left": 8, "right": 24, "top": 52, "bottom": 36, "containLabel": True}


def _axis(name: str, log: bool) -> dict[str, Any]:
    return {"type": "log" if log else "value", "name": name, "scale": log}


def _kept(points: Sequence[Sequence[float]]) -> list[list[float]]:
    """Keep so many points that a page stays small, evenly."""
    step = max(1, -(-len(points) // MOST_POINTS))
    return [[round(float(value), 4) for value in point] for point in points[::step]]


def quantiles(milliseconds: Sequence[float]) -> list[list[float]]:
    """Give a distribution as (value, share at or below it in percent)."""
    if not milliseconds:
        return []
    shares = np.concatenate((np.arange(0, 99, 1.0), np.arange(99, 100.05, 0.1)))
    values = np.percentile(np.asarray(milliseconds), np.minimum(shares, 100))
    return [[float(value), float(share)] for value, share in zip(values, np.minimum(shares, 100), strict=True)]


def changes(
    name: str, title: str, text: str, dots: Sequence[tuple[str, float, float | None, float | None]],
    columns: list[str], rows: list[list[Cell]],
) -> Chart:  # fmt: skip
    """Make a chart of changes with their intervals, first to last from the top.

    Args:
        name: its id in the page.
        title: what it shows.
        text: how to read it.
        dots: what changed, by which share, and the bounds of the interval where they are known.
        columns: headers of the table.
        rows: the table.
    """
    ordered = list(reversed(dots))
    bounds: list[list[Any]] = []
    for what, _, low, high in ordered:
        if low is not None and high is not None:  # a gap ends each line
            bounds += [[round(low * 100, 2), what], [round(high * 100, 2), what], [None, what]]
    option = {
        "tooltip": {"trigger": "item"},
        "grid": GRID | {"right": 32, "top": 12},
        "xAxis": {"type": "value", "name": "change, %", "nameLocation": "middle", "nameGap": 28},
        "yAxis": {"type": "category", "data": [what for what, *_ in ordered]},
        "series": [
            {
                "type": "line", "name": "95 % interval", "data": bounds, "connectNulls": False, "symbol": "none",
                "lineStyle": {"width": 3, "type": "solid"}, "tooltip": {"show": False},
            },
            {
                "type": "scatter", "name": "change", "symbolSize": 11,
                "data": [[round(change * 100, 2), what] for what, change, *_ in ordered],
            },
        ],
    }  # fmt: skip
    return Chart(name, title, text, option, columns, rows, 80 + 30 * len(rows))


def heat(name: str, title: str, text: str, cells: dict[tuple[str, str], int], unit: str) -> Chart:
    """Make a heat map of prefill (down) by decode (across)."""
    prefills = sorted({prefill for prefill, _ in cells}, key=_number, reverse=True)
    decodes = sorted({decode for _, decode in cells}, key=_number)
    data = [[decodes.index(decode), prefills.index(prefill), count] for (prefill, decode), count in cells.items()]
    option = {
        "tooltip": {"position": "top"},
        "grid": {"left": 8, "right": 16, "top": 12, "bottom": 64, "containLabel": True},
        "xAxis": {"type": "category", "data": decodes, "axisLabel": {"rotate": 40}, "splitArea": {"show": True}},
        "yAxis": {"type": "category", "data": prefills, "splitArea": {"show": True}},
        "visualMap": {
            "min": 0, "max": max(cells.values(), default=1), "calculable": False, "orient": "horizontal",
            "left": "center", "bottom": 0, "itemHeight": 80,
        },
        "series": [{"type": "heatmap", "name": unit, "data": data, "label": {"show": True}}],
    }  # fmt: skip
    rows: list[list[Cell]] = [
        [prefill, *(cells.get((prefill, decode), 0) for decode in decodes)] for prefill in reversed(prefills)
    ]
    return Chart(name, title, text, option, [unit, *decodes], rows, 130 + 32 * len(prefills))


def _number(name: str) -> tuple[str, int]:
    role, _, number = name.rpartition("-")
    return (role, int(number)) if number.isdigit() else (name, -1)
