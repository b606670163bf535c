"""A run's report: gathered, and written as HTML or Markdown."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import orjson
from jinja2 import Environment, select_autoescape

from pdctl.bench.measure import worst
from pdctl.bench.repeats import HEADLINES
from pdctl.compare.fairness import Sheet, sheet
from pdctl.compare.told import Comparison, comparison
from pdctl.report import figures
from pdctl.report.chart import Cell, Chart
from pdctl.runs.run import Run

SIMULATED = (
    "Engines are SIMULATED: their times are modelled on measured H200 figures. Nothing here was measured on a GPU."
)


@dataclass(frozen=True, slots=True)
class Report:
    """What a page shows.

    Args:
        title: of the page.
        banner: said before anything else: that engines are simulated.
        facts: what was run, by name.
        columns: headers of the headline table.
        rows: the headline figures.
        effects: what a router and a policy do, told apart: title and rows.
        warnings: what makes figures doubtful.
        charts: the charts.
        command: how to repeat it.
        says: what came out, in sentences.
        sheet: of routers that took turns: what differed between them.
    """

    title: str
    banner: str | None
    facts: list[tuple[str, str]]
    columns: list[str]
    rows: list[list[Cell]]
    effects: list[tuple[str, list[list[Cell]]]]
    warnings: list[str]
    charts: list[Chart]
    command: str
    says: list[str] = field(default_factory=list)
    sheet: Sheet | None = None


def gathered(run: Run) -> Report:
    """Gather what a report of a run shows."""
    told: Comparison | None = None
    if run.kind == "eval":
        charts, columns, rows, runs = figures.scores(run), [], [], [run]
    elif run.kind == "sweep":
        charts, runs = figures.sweep(run), run.points
        columns, rows = charts[0].columns, charts[0].rows
    else:
        runs = run.points if run.kind == "compare" else [run]
        told = comparison(runs, paired=True) if len(runs) > 1 else None
        charts = figures.charts(runs, told)
        columns, rows = _headlines(told or comparison(runs))
    if run.kind == "eval" and charts:
        columns, rows = charts[0].columns, charts[0].rows
    return Report(
        f"pdctl {run.kind}: {_what(run)}",
        SIMULATED if run.simulated else None,
        _facts(run),
        columns,
        rows,
        _effects(told),
        sorted({f"{figures.title_of(one)}: {text}" for one in runs for text in _doubts(one)}),
        charts,
        shlex.join(run.about["command"]),
        sheet=sheet(run) if run.kind == "compare" else None,
    )


def _what(run: Run) -> str:
    if run.kind == "eval":
        return str(run.about["task"])
    if run.kind == "compare":
        return "; ".join(figures.title_of(point) for point in run.points)
    return run.workload.title()


def _doubts(run: Run) -> list[str]:
    found = list(run.about.get("warnings", ()))
    if run.measures:
        results = run.results()
        found += worst(results)
        if any(told["pdctl"].get("partial") for told in results):
            found.append("a repeat was cut short; the figures of whole repeats are shown where there are any")
    return found


def _facts(run: Run) -> list[tuple[str, str]]:
    about = run.about
    facts = [("run", run.name), ("state", run.state)]
    if run.kind == "eval":
        facts.append(("requests", str(about["requests"])))
    else:
        facts += [("load", run.workload.title()), ("repeats", str(about["repeats"]))]
    return [
        *facts,
        ("model", about["model"]),
        ("fleet", _list({key: value for key, value in about["fleet"].items() if key not in ("router", "policy")}
                        if run.kind == "compare" else about["fleet"])),
        ("values hash", about["values_hash"]),
        ("machine", _list(about["machine"])),
        ("versions", _list(about["versions"])),
        ("begun", time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(about["created"]))),
    ]  # fmt: skip


def _list(told: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in told.items()
    )


def _headlines(told: Comparison) -> tuple[list[str], list[list[Cell]]]:
    columns = ["", figures.title_of(told.runs[0])]
    for run in told.runs[1:]:
        columns += [figures.title_of(run), "change (95 %)", "verdict"]
    rows: list[list[Cell]] = []
    for metric in told.figures[0]:
        row: list[Cell] = [HEADLINES[metric], told.figures[0][metric].text()]
        for found, shown in zip(told.others, told.figures[1:], strict=True):
            one = next((one for one in found if one.metric == metric), None)
            row += [
                shown[metric].text() if metric in shown else "",
                one.told() if one else "",
                one.verdict if one else "",
            ]
        rows.append(row)
    for title, key in (("Requests that succeeded", "completed"), ("Requests that failed", "failed")):
        rows.append(_spread(title, [str(sum(one[key] for one in run.results())) for run in told.runs]))
    if all(told.costs):
        costs = [one for one in told.costs if one is not None]
        rows.append(_spread("Router CPU (ms a request)", [f"{sum(one.cpu_ms.values()):.3f}" for one in costs]))
        rows.append(_spread("Router memory (resident MB)", [f"{one.resident_mb:.0f}" for one in costs]))
        broken = [", ".join(f"{count} {rule}" for rule, count in one.violations.items()) or "0" for one in costs]
        rows.append(_spread("Breaches of the handoff protocol", broken))
    return columns, rows


def _spread(title: str, cells: list[str]) -> list[Cell]:
    """Put cells under the columns that have figures."""
    return [title, cells[0], *(part for cell in cells[1:] for part in (cell, "", ""))]


def _effects(told: Comparison | None) -> list[tuple[str, list[list[Cell]]]]:
    if told is None or len(told.runs) < 3:
        return []
    return [
        (effect.title, [[HEADLINES[one.metric], one.told(), one.verdict] for one in effect.differences])
        for effect in told.effects
    ]


def write(run: Run, path: Path) -> None:
    """Write a run's report; `.md` is Markdown, anything else HTML."""
    save(gathered(run), path)


def save(report: Report, path: Path) -> None:
    """Write a report; `.md` is Markdown, anything else HTML."""
    path.write_text(markdown(report) if path.suffix == ".md" else html(report), encoding="utf-8")


@cache
def _environment() -> Environment:
    return Environment(autoescape=select_autoescape(default=True), trim_blocks=True, lstrip_blocks=True)


def html(report: Report) -> str:
    """Write one file that has everything in it: styles, the chart library, the numbers."""
    folder = files("pdctl.report")
    template = _environment().from_string((folder / "page.html.jinja").read_text(encoding="utf-8"))
    options = {chart.name: chart.option for chart in report.charts}
    return template.render(
        report=report,
        style=(folder / "page.css").read_text(encoding="utf-8"),
        script=(folder / "page.js").read_text(encoding="utf-8"),
        library=(folder / "echarts.min.js").read_text(encoding="utf-8").replace("</script", "<\\/script"),
        options=orjson.dumps(options).decode().replace("</", "<\\/"),
    )


def markdown(report: Report) -> str:
    """Write the same without charts: their numbers as tables."""
    lines = [f"# {report.title}", ""]
    if report.banner:
        lines += [f"> **{report.banner}**", ""]
    if report.says:
        lines += [*(f"- {text}" for text in report.says), ""]
    lines += ["## What was run", "", *_table(["", ""], [[name, value] for name, value in report.facts])]
    lines += ["", "## Headline figures", "", *_table(report.columns, report.rows)]
    for title, rows in report.effects:
        lines += ["", f"### {title}", "", *_table(["metric", "change (95 %)", "verdict"], rows)]
    if report.sheet:
        told = report.sheet
        lines += ["", "## Fairness sheet", "", "Alike for all:", "", *(f"- {text}" for text in told.common)]
        lines += ["", *(f"> {text}" for text in told.notes), "", *_table(["", *told.titles], told.rows)]
        lines += ["", *_table(["router", "process", "command line"], told.commands)]
    if report.warnings:
        lines += ["", "## Doubts", "", *(f"- {text}" for text in report.warnings)]
    for chart in report.charts:
        lines += ["", f"## {chart.title}", "", chart.text, "", *_table(chart.columns, chart.rows)]
    return "\n".join([*lines, "", "## How to repeat it", "", "```sh", report.command, "```", ""])


def _table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[str]:
    def cell(value: Cell) -> str:
        return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")

    return [
        "| " + " | ".join(map(cell, columns)) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(map(cell, row)) + " |" for row in rows),
    ]
