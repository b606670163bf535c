"""`pdctl status`: how each part of a deployment is."""

from dataclasses import asdict

import typer
from rich.table import Table

from pdctl.commands.options import Json, Name
from pdctl.console import out, print_json
from pdctl.errors import ExitCode
from pdctl.targets import Health, LocalTarget


def status(name: Name = "local", json: Json = False) -> None:
    """Show every process: state, load, KV blocks. Exit status 1 when a part is not ready."""
    target = LocalTarget.find(name)
    parts = target.health()
    if json:
        print_json(
            {
                "name": name,
                "simulated": target.simulated,
                "router": target.router_url,
                "model": target.model,
                "parts": [asdict(part) for part in parts],
            }
        )
    else:
        _show(target, parts)
    if any(part.state != "ready" for part in parts):
        raise typer.Exit(ExitCode.FAILURE)


def _show(target: LocalTarget, parts: list[Health]) -> None:
    out.print(f"[bold]{target.name}[/]  {target.router_url}/v1  {target.model}  [yellow](simulated)[/]", soft_wrap=True)
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("NAME", "ADDRESS", "PID", "STATE", "UP", "RUNNING", "WAITING", "KV USED", "PINNED"):
        table.add_column(
            title, justify="right" if title in ("PID", "UP", "RUNNING", "WAITING", "KV USED", "PINNED") else "left"
        )
    for part in parts:
        table.add_row(
            part.name, part.url.removeprefix("http://"), str(part.pid or "-"),
            f"[{'green' if part.state == 'ready' else 'red'}]{part.state}[/]",
            "-" if part.uptime_seconds is None else _span(part.uptime_seconds), *_load(part),
        )  # fmt: skip
    out.print(table)


def _load(part: Health) -> tuple[str, str, str, str]:
    told = part.details
    if "blocks" in told:
        blocks = told["blocks"]
        used = 1 - blocks["free"] / blocks["total"]
        return str(told["running"]), str(told["waiting"]), f"{used:.1%}", str(blocks["pinned"])
    if "prefill" in told:
        sums = [f"{told[role]['healthy']}/{told[role]['total']}" for role in ("prefill", "decode")]
        return f"{sums[0]} P", f"{sums[1]} D", "", ""
    return "-", "-", "-", "-"


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
