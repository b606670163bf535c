"""`pdctl runs`: what was measured and is kept."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pdctl.bench import in_pod
from pdctl.bench.repeats import HEADLINES, headlines
from pdctl.bench.result import table as vllm_table
from pdctl.commands.options import Json, Yes
from pdctl.console import err, out, print_json
from pdctl.errors import PdctlError, writing
from pdctl.evals import in_cluster
from pdctl.runs import Run, Store
from pdctl.runs.export import export
from pdctl.targets import KubernetesTarget

Named = Annotated[
    str, typer.Argument(help="Name, its beginning, its label, or last; RUN/POINT is a point of it.", metavar="RUN")
]
_OF_POINTS = ("output_throughput", "request_goodput", "median_ttft_ms", "p99_ttft_ms", "p99_itl_ms", "median_tpot_ms")
runs = typer.Typer(help="What was measured and is kept.", no_args_is_help=True)


@runs.command("ls")
def ls(json: Json = False) -> None:
    """List the runs, the newest last."""
    kept = Store().all()
    if json:
        print_json([_told_if_readable(run) for run in kept])
        return
    if not kept:
        out.print("No run is kept. next: pdctl bench 200 32")
        return
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("RUN", "STATE", "ENGINES", "WHAT"):
        table.add_column(title, overflow="fold", no_wrap=title == "RUN")
    for title in ("TOK/S", "TTFT P50 MS", "ITL P50 MS"):
        table.add_column(title, justify="right")
    for run in kept:
        try:
            table.add_row(*_row(run))
        except PdctlError as error:
            table.add_row(run.name, "[red]unreadable[/]", "", escape(error.cause))
    out.print(table)


def _row(run: Run) -> list[str]:
    figures = headlines(run.whole_results()) if run.measures else {}
    shown = [
        figures[key].text(digits) if key in figures else ""
        for key, digits in (("output_throughput", 0), ("median_ttft_ms", 1), ("median_itl_ms", 2))
    ]
    colour = {"done": "green", "running": "cyan", "detached": "cyan"}.get(run.state, "yellow")
    engines = "[yellow]simulated[/]" if run.simulated else "real"
    return [run.name, f"[{colour}]{run.state}[/]", engines, what(run), *shown]


def what(run: Run) -> str:
    """Say in a few words what a run is."""
    if run.kind == "eval":
        return f"eval {run.about['task']}, {run.about['requests'] or '?'} requests"
    title = run.workload.title()
    points = f", {len(run.points)} points" if run.points else ""
    return f"{run.kind}: {title}{points}"


def _told(run: Run) -> dict[str, Any]:
    figures = headlines(run.whole_results()) if run.measures else {}
    return {
        "name": run.name,
        "kind": run.kind,
        "state": run.state,
        "simulated": run.simulated,
        "model": run.about["model"],
        "what": what(run),
        "points": [_told(point) for point in run.points],
        "figures": {key: {"mean": one.mean, "low": one.low, "high": one.high} for key, one in figures.items()},
    }


def _told_if_readable(run: Run) -> dict[str, Any]:
    try:
        return _told(run)
    except PdctlError as error:
        unknown = dict.fromkeys(("kind", "simulated", "model"))
        return {"name": run.name, **unknown, "state": "unreadable", "what": error.cause, "points": [], "figures": {}}


@runs.command("show")
def show(name: Named = "last", json: Json = False) -> None:
    """Show a run; of one that was killed, what it had measured."""
    run = Store().find(name)
    if json:
        print_json(run.about | {"state": run.state, "results": run.results() if run.measures else []})
        return
    about = run.about
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("run", run.name)
    table.add_row("state", run.state)
    table.add_row("engines", "SIMULATED, modelled on H200" if run.simulated else "real")
    table.add_row("what", what(run))
    table.add_row("command", " ".join(about["command"]))
    table.add_row("fleet", ", ".join(f"{key} {value}" for key, value in about["fleet"].items()))
    table.add_row("values hash", about["values_hash"])
    table.add_row("machine", ", ".join(f"{key} {value}" for key, value in about["machine"].items()))
    table.add_row("versions", ", ".join(f"{key} {value}" for key, value in about["versions"].items()))
    table.add_row("begun", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(about["created"])))
    table.add_row("files", str(run.folder))
    out.print(table)
    if run.points:
        out.print(points_table(run))
    if run.measures:
        told = run.results()
        if any(one["pdctl"].get("partial") for one in told):
            asked = run.workload.num_prompts * about["repeats"]
            out.print(f"[yellow]PARTIAL[/]: {len(run.records())} of {asked} requests ended")
        if told:
            print(vllm_table(told[-1]))
            for key, value in headlines(run.whole_results()).items() if len(told) > 1 else ():
                print(f"{HEADLINES[key]}: {value.text()}")
    if run.kind == "eval":
        from pdctl.evals.scores import scores_table  # noqa: PLC0415 only here

        out.print(scores_table(run))


def points_table(run: Run) -> Table:
    """Make the table of a run's points."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("POINT", no_wrap=True)
    keys = [key for key in _OF_POINTS if any(key in headlines(point.whole_results()) for point in run.points)]
    for key in ("repeats", *keys):
        table.add_column(HEADLINES.get(key, key), justify="right", overflow="fold")
    for point in run.points:
        figures = headlines(point.whole_results())
        row = [figures[key].text() if key in figures else "" for key in keys]
        table.add_row(point.name, str(len(point.finished)), *row)
    return table


@runs.command("stop")
def stop(name: Named = "last") -> None:
    """End what goes on in a cluster for a run, and remove it there."""
    run = Store().find(name)
    if run.state != "detached":
        raise PdctlError(f"nothing goes on in a cluster for {run.name} ({run.state})", "see pdctl runs ls")
    with KubernetesTarget(**run.about["deployment"]) as target:
        if run.kind == "eval":
            in_cluster.take(run, target)
        else:
            in_pod.take(run, target, lambda text: err.print(text, style="dim", soft_wrap=True))
    run.end("failed")
    err.print(f"{run.name} was ended in {run.about['pod']}", soft_wrap=True)


@runs.command("rm")
def rm(
    names: Annotated[list[str], typer.Argument(help="Names of runs.", metavar="RUN...")],
    yes: Yes = False,
) -> None:
    """Remove runs."""
    store = Store()
    found = [store.find(name) for name in names]
    err.print("remove " + ", ".join(run.name for run in found), soft_wrap=True)
    if not yes and not typer.confirm("Remove these?", default=False, err=True):
        raise PdctlError("nothing was removed", "run the command again with --yes")
    for run in found:
        store.remove(run)


@runs.command("export")
def export_command(
    name: Named,
    to: Annotated[Path, typer.Option(help="Folder to write to.")] = Path(),
) -> None:
    """Write a run as others read it: JSON as vllm bench serve writes it, summary.json for vllm bench sweep plot."""
    run = Store().find(name)
    with writing(to, "--to"):
        written = export(run, to)
    for path in written:
        print(path)
