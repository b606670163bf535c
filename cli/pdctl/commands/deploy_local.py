"""`pdctl deploy --local`: what a person sees while processes come up on this machine."""

import sys

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pdctl.console import err, out
from pdctl.deployment import Deployment, Member
from pdctl.errors import ExitCode, PdctlError
from pdctl.targets.local import LocalTarget, Wish, plan


def deploy_local(wish: Wish, timeout: float, yes: bool) -> None:
    """Show what would be started, ask, start it and wait until it is ready.

    Raises:
        PdctlError: it cannot be, or did not become ready in time.
    """
    planned = plan(wish)
    _show(planned)
    if not yes and sys.stdin.isatty() and not typer.confirm("Deploy this?", default=True, err=True):
        raise PdctlError("not deployed", "run the command again when you are ready")
    target = LocalTarget(planned)
    try:
        _start(target, planned, timeout)
    except KeyboardInterrupt:
        raise PdctlError(
            "interrupted; what had been started has been stopped, nothing is left running",
            "run the command again",
            ExitCode.INTERRUPTED,
        ) from None
    suffix = target.flags
    out.print(
        f"[bold green]ready[/] {planned.router_url}/v1  model {planned.model}  [yellow](simulated)[/]", soft_wrap=True
    )
    out.print(f"next:  pdctl bench 200 32{suffix}   pdctl routing{suffix}   pdctl cleanup{suffix}", soft_wrap=True)


def _show(planned: Deployment) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for role in ("prefill", "decode"):
        members = planned.of_role(role)
        urls = members[0].url if len(members) == 1 else f"{members[0].url} … {members[-1].url}"
        table.add_row(role, f"{len(members)} simulated engine{'s' if len(members) > 1 else ''}", urls)
    table.add_row("router", f"policy {planned.policy}", planned.router_url)
    table.add_row("metrics", "", planned.metrics_url)
    table.add_row("model", f"speed {planned.speed:g}", planned.model)
    table.add_row("files", "", str(planned.folder))
    err.print(f"[bold]deploy {planned.name}[/] on this machine")
    err.print(table)


def _start(target: LocalTarget, planned: Deployment, timeout: float) -> None:
    if not err.is_terminal:
        target.start(timeout, lambda member, seconds: err.print(f"{member.name} ready after {seconds:.1f} s"))
        return
    columns = (TextColumn("{task.description:<8}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err) as progress:
        tasks = {
            role: progress.add_task(role, total=len(planned.of_role(role))) for role in ("prefill", "decode", "router")
        }

        def ready(member: Member, seconds: float) -> None:
            progress.advance(tasks[member.role])

        target.start(timeout, ready)
