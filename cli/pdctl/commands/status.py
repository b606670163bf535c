"""`pdctl status`: how each part of a deployment is."""

import time
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pdctl.commands.options import Context, Format, Json, Name, Namespace, Output
from pdctl.console import out, print_data, span
from pdctl.errors import ExitCode, PdctlError
from pdctl.targets import Health, Target, find

LOOK_SECONDS = 2.0
WELL = ("ready", "done", "finishing")
COLOURS = {"ready": "green", "done": "green"} | dict.fromkeys(
    ("finishing", "starting", "preparing", "waiting"), "yellow"
)


def status(
    name: Name = None,
    namespace: Namespace = None,
    context: Context = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look again and again until Ctrl-C.")] = False,
    output: Output = Format.TABLE,
    json: Json = False,
) -> None:
    """Show every process or pod: state, load, KV; and why one is not ready. Exit status 1 when a part is not ready."""
    target = find(name, namespace, context)
    try:
        if watch:
            _watch(target)
            return
        parts = target.health()
        if json or output is not Format.TABLE:
            told = {
                "name": target.name,
                "simulated": target.simulated,
                "router": target.router_url,
                "model": target.model,
                "parts": [asdict(part) for part in parts],
            }
            print_data(told, "json" if json else output.value)
        else:
            out.print(_screen(target, parts))
        if any(part.state not in WELL for part in parts):
            raise typer.Exit(ExitCode.FAILURE)
    finally:
        target.close()


def _watch(target: Target) -> None:
    """Draw the screen anew, at a terminal in place; a look that fails is told and tried again."""
    with Live(console=out, refresh_per_second=4, transient=False) as live:
        while True:
            try:
                live.update(_screen(target, target.health()))
            except PdctlError as error:
                live.update(Text(f"{error.cause}; looking again", "yellow"))
            time.sleep(LOOK_SECONDS)


def _screen(target: Target, parts: list[Health]) -> RenderableType:
    simulated = ("  (simulated)", "yellow") if target.simulated else ""
    head = Text.assemble((target.name, "bold"), f"  {target.router_url}/v1  {target.model}", simulated)
    here = any(part.pid is not None for part in parts) or not any(part.node for part in parts)
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    titles = ["NAME", "ADDRESS", "PID" if here else "NODE", "STATE", "UP", "RUNNING", "WAITING", "KV USED", "PINNED"]
    titles += [] if here else ["RESTARTS"]
    left = ("NAME", "ADDRESS", "NODE", "STATE")
    for title in titles:
        table.add_column(title, justify="left" if title in left else "right", no_wrap=True)
    for part in parts:
        state = f"{part.state} ({part.reason})" if part.reason else part.state
        row: list[str | Text] = [
            part.name, part.url.removeprefix("http://") or "-",
            str(part.pid or "-") if here else part.node or "-", Text(state, COLOURS.get(part.state, "red")),
            "-" if part.uptime_seconds is None else span(part.uptime_seconds), *_load(part),
        ]  # fmt: skip
        table.add_row(*row, *([] if here else [str(part.restarts or "")]))
    return Group(head, table, *target.troubles())


def _load(part: Health) -> tuple[str, str, str, str]:
    told = part.details
    if "blocks" in told:
        blocks = told["blocks"]
        used = 1 - blocks["free"] / blocks["total"]
        return str(told["running"]), str(told["waiting"]), f"{used:.1%}", str(blocks["pinned"])
    if "prefill" in told:
        sums = [f"{told[role]['healthy']}/{told[role]['total']}" for role in ("prefill", "decode")]
        return f"{sums[0]} P", f"{sums[1]} D", "", ""
    if "kv_usage" in told and told.get("metrics_age") is not None:
        return f"{told['running']:g}", f"{told['waiting']:g}", f"{told['kv_usage']:.1%}", ""
    if "in_flight" in told:  # the router reads engines' metrics only for policies that need them
        return str(told["in_flight"]), "-", "-", "-"
    return "-", "-", "-", "-"
