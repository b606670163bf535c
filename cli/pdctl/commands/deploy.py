"""`pdctl deploy`: bring a deployment up."""

import sys
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pdctl.commands.options import Name, Yes
from pdctl.console import err, out
from pdctl.deployment import Deployment, Member
from pdctl.errors import ExitCode, PdctlError
from pdctl.targets.local import MOST_OF_A_ROLE, LocalTarget, Wish, plan
from pdrouter.policies import POLICIES


def deploy(
    name: Name = "local",
    local: Annotated[
        bool, typer.Option("--local", help="As processes on this machine, with simulated engines.")
    ] = False,
    prefill: Annotated[int, typer.Option(min=1, max=MOST_OF_A_ROLE, help="Prefill engines.")] = 8,
    decode: Annotated[int, typer.Option(min=1, max=MOST_OF_A_ROLE, help="Decode engines.")] = 8,
    model: Annotated[str, typer.Option(help="Served model name.")] = "meta-llama/Llama-3.1-8B-Instruct",
    speed: Annotated[
        float, typer.Option(min=0.01, help="How much faster than an H200 the simulated engines run.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes the simulated engines repeat.")] = None,
    policy: Annotated[str, typer.Option(help=f"How engines are chosen: {', '.join(POLICIES)}.")] = "consistent_hash",
    port: Annotated[
        int | None, typer.Option(help="The router's port.", show_default="10001 or the next free one")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds until everything must be ready.")] = 120.0,
    yes: Yes = False,
) -> None:
    """Bring up prefill and decode engines with the router in front of them."""
    if not local:
        raise PdctlError(
            "this version deploys on this machine only", "add --local; Kubernetes is the next step", ExitCode.USAGE
        )
    if policy not in POLICIES:
        raise PdctlError(f"there is no policy {policy!r}", f"choose one of {', '.join(POLICIES)}", ExitCode.USAGE)
    planned = plan(Wish(name, prefill, decode, model, speed, seed, policy, port))
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
    suffix = "" if name == "local" else f" --name {name}"
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
